"""`check-adapter` on files: stock PEFT's and ours, and what is no adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from helpers.served_adapters import grown, sizes, write_adapter
from helpers.tiny_models import llama
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.serving.facts import PairShape, read_facts

PAIRS = {f"model.layers.{i}.self_attn.{kind}": (4, 16, 16) for i in range(2) for kind in ("q_proj", "v_proj")}


def check(arguments: list[str], capsys: Any) -> tuple[int, dict[str, str], str]:
    """Exit status, label -> verdict, and the line of the adapter."""
    status = 0
    try:
        main(["check-adapter", *arguments])
    except SystemExit as stop:
        status = stop.code
    first, *lines = capsys.readouterr().out.splitlines()
    return status, {line[: line.index("  ")]: line[line.index("  ") :].strip() for line in lines}, first


def test_a_stock_lora_with_rank_pattern(tmp_path: Path, capsys: Any) -> None:
    """PEFT's own files; its scaling of every module is that of its layers."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.*q_proj": 4})
    model = get_peft_model(llama(2, 16), config)
    model.save_pretrained(tmp_path / "stock")
    facts = read_facts(tmp_path / "stock")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in layers.items():
        short = name.removeprefix("base_model.model.")
        a = load_file(tmp_path / "stock" / "adapter_model.safetensors")[f"{name}.lora_A.weight"]
        assert facts.scaling(short) == module.scaling["default"] and facts.pairs[short].rank == a.shape[0]
    status, verdicts, line = check([str(tmp_path / "stock")], capsys)
    assert status == 1 and line == f"{tmp_path / 'stock'}: LORA, 4 modules, ranks 4 to 8"
    odd = "model.layers.0.self_attn.q_proj"
    assert verdicts == {
        "PEFT": "loads",
        "vLLM from 0.32 on": "loads",
        "vLLM up to 0.31": f"wrong by factor 0.50 in {odd}",
        "SGLang 0.5.23": f"refused: its buffers have rank 8, which {odd} have not",
        "llama.cpp, by its converter": "loads",
        "Ollama, by its own import": f"wrong in 2 modules ({odd}, {odd.replace('0', '1')}) of a Llama: its import "
        "permutes A in place of B; it takes them right as GGUF",
        "TGI and LoRAX, on one GPU": f"wrong by factor 0.50 in {odd}",
    }


def test_the_exit_status_is_of_the_servers_asked_for(tmp_path: Path, capsys: Any) -> None:
    folder = write_adapter(tmp_path / "a", PAIRS, r=4, lora_alpha=4, alpha_pattern={"v_proj": 8})
    assert check([str(folder), "--for", "vllm"], capsys)[:2] == (0, {"vLLM from 0.32 on": "loads"})
    assert check([str(folder), "--for", "vllm,sglang"], capsys)[0] == 1


def test_the_bases_config_tells_the_number_of_layers(tmp_path: Path, capsys: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"num_hidden_layers": 3, "architectures": ["LlamaForCausalLM"]}')
    settings = {"r": 8, "lora_alpha": 8}
    pairs = dict.fromkeys(PAIRS, (8, 16, 16))
    unknown = write_adapter(tmp_path / "unknown", pairs, **settings, base_model_name_or_path="/not/on/this/machine/x")
    named = write_adapter(tmp_path / "named", pairs, **settings, base_model_name_or_path=str(base))
    assert check([str(unknown), "--for", "tgi"], capsys)[0] == 0
    for arguments in ([str(named)], [str(unknown), "--base", str(base)]):
        status, verdicts, line = check([*arguments, "--for", "tgi"], capsys)
        assert status == 1 and line.endswith("rank 8, base of 3 layers")
        assert "drops 4 modules" in verdicts["TGI and LoRAX, on one GPU"]
        assert "not in all of 3 layers" in verdicts["TGI and LoRAX, on one GPU"]


def test_it_needs_no_torch_and_reads_no_weight(tmp_path: Path) -> None:
    """An adapter of Llama 3 8B: 400 MB as a hole in the file, and torch made unimportable."""
    targets = dict.fromkeys(grown(keep=45), (14336, 4096))
    folder = write_adapter(tmp_path / "large", sizes(dict.fromkeys(targets, 48), targets), r=48, lora_alpha=48)
    code = "import sys; sys.modules.update(torch=None, transformers=None, peft=None); "
    code += f"from sparse_llm_ft.cli.main import main; main(['check-adapter', {str(folder)!r}, '--for', 'vllm'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[1] == "vLLM from 0.32 on  loads with --max-lora-rank 64", result.stderr


def header(folder: Path, text: bytes, length: int | None = None) -> None:
    size = len(text) if length is None else length
    (folder / "adapter_model.safetensors").write_bytes(size.to_bytes(8, "little") + text)


def config(folder: Path, **keys: Any) -> None:
    tree = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**tree, **keys}))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


NO_RANK = json.dumps(
    {f"base_model.model.m.lora_{part}.weight": {"shape": shape} for part, shape in (("A", [0, 4]), ("B", [4, 0]))}
).encode()

WRONG = {
    "no folder": (lambda f: f.rename(f.parent / "moved"), "a: not a folder; expected one with adapter_config.json and"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: cannot be read (No such file"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: "),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json: no object; expected"),
    "type": (lambda f: config(f, peft_type=None), "adapter_config.json: no peft_type; expected the config of a PEFT"),
    "rank": (lambda f: config(f, r=0), "r is 0; expected a whole number from 1 to 65536"),
    "alpha": (lambda f: config(f, lora_alpha="8"), "lora_alpha is '8'; expected a finite number"),
    "pattern": (lambda f: config(f, rank_pattern=[1]), "rank_pattern is [1]; expected an object of names and numbers"),
    "entry": (lambda f: config(f, alpha_pattern={"q": True}), "alpha_pattern.q is True; expected a finite number"),
    "regex": (lambda f: config(f, rank_pattern={"(": 4}), "rank_pattern has the name '(', no regular expression"),
    "infinite": (lambda f: config(f, lora_alpha=float("inf")), "lora_alpha is inf; expected a finite number"),
    "nan": (lambda f: config(f, alpha_pattern={"q": float("nan")}), "alpha_pattern.q is nan; expected a finite number"),
    "overflow": (lambda f: config(f, lora_alpha=10**400), "expected a finite number"),
    "flag": (lambda f: config(f, rank_pattern={"(?i)q": 4}), "rank_pattern has the name '(?i)q', no regular"),
    "no rank": (lambda f: header(f, NO_RANK), "m.lora_A.weight has shape [0, 4]; expected a rank of at least 1"),
    "parameters": (lambda f: config(f, target_parameters=["experts.w"]), "target_parameters is ['experts.w']; expec"),
    "pickle": (pickled, "adapter_model.bin: a pickle, which may run code; expected adapter_model.safetensors"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors; expected"),
    "short": (lambda f: header(f, b"{}", 1000), "its header claims 1,000 bytes; expected a safetensors file"),
    "huge": (lambda f: header(f, b"{}", 2**63), "its header claims 9,223,372,036,854,775,808 bytes"),
    "bytes": (lambda f: header(f, b"\xff\xff"), "its header cannot be read"),
    "array": (lambda f: header(f, b"[]"), "its header is no object; expected a safetensors file"),
    "shape": (lambda f: header(f, b'{"x": {"shape": [-1]}}'), "x has no shape; expected a safetensors file"),
    "entry of header": (lambda f: header(f, b'{"x": 5}'), "x has no shape; expected a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_no_adapter_is_one_line(fault: str, tmp_path: Path, capsys: Any) -> None:
    folder = write_adapter(tmp_path / "a", PAIRS, r=4, lora_alpha=4)
    change, message = WRONG[fault]
    change(folder)
    with pytest.raises(SystemExit) as stop:
        main(["check-adapter", str(folder)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_tensors_that_are_no_pair_are_others(tmp_path: Path) -> None:
    """An A without its B, an A and B that do not fit, and a name without PEFT's prefix."""
    prefix = "base_model.model.x"
    others = {f"{prefix}.lora_A.weight": [4, 8], f"{prefix}y.lora_A.weight": [4, 8], f"{prefix}y.lora_B.weight": [8, 3],
              "z.lora_A.weight": [4, 8], "z.lora_B.weight": [8, 4]}  # fmt: skip
    facts = read_facts(write_adapter(tmp_path / "a", {"m": (4, 8, 6)}, others, r=4, lora_alpha=4))
    assert facts.pairs == {"m": PairShape(4, 8, 6)} and set(facts.others) == set(others)


def test_a_lora_of_embeddings_alone_has_verdicts(tmp_path: Path, capsys: Any) -> None:
    """As PEFT writes it: no module has a pair of matrices."""
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    folder = write_adapter(tmp_path / "a", {}, {f"{name}A": [4, 32], f"{name}B": [16, 4]}, r=4, lora_alpha=4)
    status, verdicts, _ = check([str(folder), "--for", "peft,vllm,ollama"], capsys)
    assert status == 1 and verdicts["PEFT"] == verdicts["vLLM from 0.32 on"] == "loads"
    assert verdicts["Ollama, by its own import"].startswith("refused: it does not know base_model")


@pytest.mark.parametrize("base", ["a" * 5000, "/x/" + "a" * 300, "a\0b"])
def test_a_base_that_is_no_path_is_not_known(base: str, tmp_path: Path) -> None:
    facts = read_facts(write_adapter(tmp_path / "a", PAIRS, r=4, lora_alpha=4, base_model_name_or_path=base))
    assert facts.layers is None and facts.architecture is None


def test_names_of_a_file_are_printed_on_their_line(tmp_path: Path, capsys: Any) -> None:
    folder = write_adapter(tmp_path / "a\r", {}, {"x\n\x1b[2J": [4]}, r=4, lora_alpha=4)
    with pytest.raises(SystemExit):
        main(["check-adapter", str(folder)])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 8 and r"a\r: LORA" in printed and r"x\n\x1b[2J" in printed
    assert all(line.isprintable() for line in printed.splitlines())


def test_a_base_without_config_is_an_error(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", PAIRS, r=4, lora_alpha=4)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_facts(folder, tmp_path)
