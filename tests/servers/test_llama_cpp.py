"""Our GGUF and our rules against llama.cpp itself: its converter, and its library on CPU. Run by `make test-servers`.

The folder SERVERS (by default .venv/servers) holds llama-cpp-python: unpacked, for llama.cpp's converter, and built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from helpers.trained_runs import make_run
from sparse_llm_ft.adapters import find_targets, peft_adapter, write_peft_adapter
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.gguf_file import write_gguf
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.serving.facts import read_facts
from sparse_llm_ft.serving.servers import SERVERS, judge

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SERVERS", ROOT / ".venv" / "servers")).absolute()
LLAMA_CPP = FOLDER / "llama_cpp_python" / "vendor" / "llama.cpp"
QUICKSTART = ROOT / "configs" / "quickstart" / "model"
TOKENS = [1, 300, 45, 512, 77, 640, 9, 23]

LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama

base, adapter, tokens, output = sys.argv[1:]
# The cache of keys and values in float32 (type 0), and one thread: a test shares its machine.
options = {"n_ctx": 64, "n_threads": 1, "type_k": 0, "type_v": 0, "verbose": False}
model = Llama(base, lora_path=adapter or None, logits_all=True, **options)
tokens = json.loads(tokens)
model.eval(tokens)
np.save(output, model.scores[: len(tokens)])
"""


@pytest.fixture(scope="module")
def converter() -> Path:
    if not (LLAMA_CPP / "convert_lora_to_gguf.py").is_file():
        pytest.skip(f"llama.cpp's converter is not in {FOLDER}: `make test-servers` downloads it")
    return LLAMA_CPP


@pytest.fixture(scope="module")
def library(converter: Path) -> Path:
    if not (FOLDER / "site" / "llama_cpp").is_dir():
        pytest.skip(f"llama-cpp-python was not built in {FOLDER}: a C++ compiler and cmake are needed")
    return FOLDER / "site"


def run(*command: object, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


def compare(ours: Path, theirs: Path) -> None:
    """The same tensors, bit for bit, and the same values of all keys that llama.cpp reads of an adapter."""
    (fields, tensors), (their_fields, their_tensors) = contents(ours), contents(theirs)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert fields[key] == their_fields[key], key
    assert tensors.keys() == their_tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, their_tensors[name], err_msg=name)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(QUICKSTART), "dtype": "float32"},
        "task": {"name": "custom", "path": str(ROOT / "configs/quickstart/data"), "prompt": "{dialogue}",
                 "completion": "{summary}", "max_length": 192},
        "method": {"name": "lora"},
        "training": {"max_steps": 8},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def survivors() -> AdapterPlan:
    """As WeightLoRA+ leaves the quickstart's layers: every third module, with ranks of its own and a fixed omega."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART)
    names = list(find_targets(model, "all-linear"))[::3]
    adapters = {n: ModuleAdapter(20 + i % 3, 2.0 * (20 + i % 3), omega=0.2 + 0.1 * i) for i, n in enumerate(names)}
    assert {name.rpartition(".")[2] for name in adapters} >= {"q_proj", "k_proj", "v_proj", "down_proj"}
    return AdapterPlan(adapters)


def test_our_gguf_of_the_quickstarts_base_is_the_converters(converter: Path, settings: dict, tmp_path: Path) -> None:
    make_run(settings, survivors())
    trained = read_run(settings["output_dir"])
    export_run(trained, tmp_path / "peft", ExportOptions())
    export_run(trained, tmp_path / "gguf", ExportOptions(server="llama.cpp"))
    theirs = tmp_path / "theirs.gguf"
    run(converter / "convert_lora_to_gguf.py", tmp_path / "peft", "--base", QUICKSTART, "--outfile", theirs)
    compare(tmp_path / "gguf" / "adapter.gguf", theirs)


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config, Qwen3Config])
def test_our_gguf_of_other_families_is_the_converters(converter: Path, kind: type, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 64}  # fmt: skip
    model = AutoModelForCausalLM.from_config(kind(**sizes))
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    shapes = find_targets(model, "all-linear")
    plan = AdapterPlan({name: ModuleAdapter(5, 10.0) for name in shapes})
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        tensors |= {f"{name}.lora_A": torch.randn(5, d_in), f"{name}.lora_B": torch.randn(d_out, 5)}
    config, weights = peft_adapter(plan, tensors, str(tmp_path / "base"), None)
    write_peft_adapter(tmp_path / "peft", config, weights)
    write_gguf(tmp_path / "ours.gguf", model, config["lora_alpha"], weights)
    theirs = tmp_path / "theirs.gguf"
    run(converter / "convert_lora_to_gguf.py", tmp_path / "peft", "--base", tmp_path / "base", "--outfile", theirs)
    compare(tmp_path / "ours.gguf", theirs)


def test_the_rule_gives_the_factors_that_llama_cpp_gets_from_patterns(
    converter: Path, settings: dict, tmp_path: Path
) -> None:
    """Its scale of a tensor is the file's alpha / rank; ours and the rule's is PEFT's."""
    make_run(settings, survivors())
    export_run(read_run(settings["output_dir"]), tmp_path / "patterns", ExportOptions(patterns=True))
    theirs = tmp_path / "theirs.gguf"
    run(converter / "convert_lora_to_gguf.py", tmp_path / "patterns", "--base", QUICKSTART, "--outfile", theirs)
    fields, tensors = contents(theirs)
    facts = read_facts(tmp_path / "patterns")
    ranks = sorted({t.shape[0] for name, t in tensors.items() if name.endswith("lora_a")})
    factors = {fields["adapter.lora.alpha"] / rank / 2.0 for rank in ranks}
    least, most = min(f for f in factors if f != 1), max(f for f in factors if f != 1)
    text = str(judge(facts, SERVERS["llama.cpp"]))
    assert ranks == [20, 21, 22] and text.startswith(f"wrong by factors {least:.2f} to {most:.2f} in ")


@torch.no_grad()
def test_llama_cpp_computes_pefts_logits(library: Path, settings: dict, tmp_path: Path) -> None:
    make_run(settings, survivors())
    trained = read_run(settings["output_dir"])
    export_run(trained, tmp_path / "peft", ExportOptions())
    export_run(trained, tmp_path / "gguf", ExportOptions(server="ollama"))
    base = tmp_path / "base.gguf"
    run(LLAMA_CPP / "convert_hf_to_gguf.py", QUICKSTART, "--outfile", base, "--outtype", "f32")
    found = {}
    for name, adapter in {"base": "", "tuned": tmp_path / "gguf" / "adapter.gguf"}.items():
        output = tmp_path / f"{name}.npy"
        run("-c", LOGITS, base, adapter, json.dumps(TOKENS), output, PYTHONPATH=str(library))
        found[name] = torch.from_numpy(np.load(output))
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32).eval()
    untuned = model(input_ids=torch.tensor([TOKENS])).logits[0]
    tuned = PeftModel.from_pretrained(model, tmp_path / "peft").eval()(input_ids=torch.tensor([TOKENS])).logits[0]
    scale = tuned.abs().max()
    assert (tuned - untuned).abs().max() > 0.05 * scale, "the adapters change something"
    assert (found["base"] - untuned).abs().max() < 1e-3 * scale
    assert (found["tuned"] - tuned).abs().max() < 1e-3 * scale
