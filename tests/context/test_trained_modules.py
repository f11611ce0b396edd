"""New tokens are learned: rows of embeddings, or whole modules, beside adapters; at every stage and in the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.contexts import open_context
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.mode_runs import asked_for, marked
from helpers.tiny_files import NEW_TOKENS, grow_tokenizer, write_rows
from helpers.tiny_models import logits
from helpers.tiny_run import run_settings
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.model_card import model_card
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.export.trial import try_export
from sparse_llm_ft.export.whole_model import save_values
from sparse_llm_ft.inference.trained_run import load_trained, read_run
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.plan import AdapterPlan
from sparse_llm_ft.training.records import describe_phase

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def tied_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, whose head now has the embeddings' weight."""
    folder = tmp_path_factory.mktemp("base") / "tied"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_settings(settings: dict, **adapter: Any) -> dict:
    return merge(settings, {"adapter": adapter})


def test_the_plan_trains_rows_of_embeddings_and_of_an_untied_head(settings: dict, tied_folder: Path) -> None:
    tokens = with_settings(settings, trainable_tokens=["anna", 3])
    context = open_context(parse_config(tokens))
    anna = context.tokenizer.get_vocab()["anna"]
    assert context.plan.trained == (EMBEDDINGS, HEAD)
    assert {name: kept.indices for name, kept in context.plan.rows.items()} == dict.fromkeys(
        (EMBEDDINGS, HEAD), (3, anna)
    )
    assert AdapterPlan.from_dict(json.loads(json.dumps(context.plan.to_dict()))) == context.plan
    lines = describe_phase(context, context.first_phase())
    assert f"trained beside them: 2 rows of {EMBEDDINGS}, 2 rows of {HEAD}" in lines
    plain = open_context(parse_config(settings))
    count = [int(text[-1].split()[0].replace(",", "")) for text in (lines, describe_phase(plain, plain.first_phase()))]
    assert count[0] - count[1] == 4 * 16

    tokens["model"]["name"] = str(tied_folder)
    assert open_context(parse_config(tokens)).plan.trained == (EMBEDDINGS,)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"trainable_tokens": ["nobody"]}, "'nobody' is no token of the vocabulary"),
        ({"trainable_tokens": [9999]}, "9999 is number 9999, and the model has embeddings for"),
        ({"modules_to_save": ["embed"]}, "'embed' matches no module with weights; found: model.embed_tokens, lm_head"),
        (
            {"modules_to_save": ["embed_tokens"], "trainable_tokens": [3]},
            "model.embed_tokens is trained whole by adapter.modules_to_save",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(settings: dict, adapter: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_context(parse_config(with_settings(settings, **adapter)))


def test_settings_that_would_do_nothing_or_could_not_be_exported_are_refused(settings: dict, tied_folder: Path) -> None:
    full = with_settings(settings, trainable_tokens=[3]) | {"method": {"name": "full"}}
    with pytest.raises(ConfigError, match=r"adapter.trainable_tokens: has no effect where the whole model is trained"):
        open_context(parse_config(full))
    vera = with_settings(settings, trainable_tokens=[3]) | {"method": {"name": "vera"}}
    with pytest.raises(ConfigError, match=r"tuner vera has no such rows in PEFT"):
        open_context(parse_config(vera))
    tied = merge(with_settings(settings, modules_to_save=["lm_head"]), {"model": {"name": str(tied_folder)}})
    with pytest.raises(ConfigError, match=r"lm_head shares its weight with model.embed_tokens"):
        open_context(parse_config(tied))
    q_proj = with_settings(settings, modules_to_save=["q_proj"])
    assert not any("q_proj" in name for name in open_context(parse_config(q_proj)).targets)
    with pytest.raises(ConfigError, match=r"q_proj, which is in 4 bit under model.quantization nf4"):
        open_context(parse_config(merge(q_proj, {"model": {"quantization": "nf4"}})))


@pytest.fixture(scope="module")
def grown(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny Llama under a tokenizer with tokens that it has no rows for, and answers that hold them."""
    folder = tmp_path_factory.mktemp("grown")
    for path in data_folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(folder / path.name, [row | {"answer": f"<think> {row['answer']} </think>"} for row in rows])
    return grow_tokenizer(model_folder, folder / "model"), folder


CASES: dict[str, dict[str, Any]] = {
    "rows-0": {"adapter": {"trainable_tokens": ["anna", "red"]}, "deepspeed": {"zero_stage": 0}},
    "rows-2": {"adapter": {"trainable_tokens": ["anna", "red"]}, "deepspeed": {"zero_stage": 2}},
    "rows-3": {"adapter": {"trainable_tokens": ["anna", "red"]}, "deepspeed": {"zero_stage": 3}},
    "rows-dora": {"adapter": {"trainable_tokens": ["anna", "red"]}, "method": {"name": "dora"}},
    "rows-tied": {"adapter": {"trainable_tokens": ["anna", "red"]}, "model": {"name": "tied"}},
    "rows-phases": {
        "adapter": {"trainable_tokens": ["anna", "red"]},
        "method": {"name": "weight_lora", "keep": 3, "steps": 4},
        "training": {"weight_decay": 0.1},
    },
    "whole-3": {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}, "deepspeed": {"zero_stage": 3}},
    "whole-tied": {"adapter": {"modules_to_save": ["embed_tokens"]}, "model": {"name": "tied"}},
    "grown-2": {"adapter": {"trainable_tokens": NEW_TOKENS}, "model": {"name": "grown"}},
    "grown-3": {
        "adapter": {"trainable_tokens": NEW_TOKENS},
        "model": {"name": "grown"},
        "deepspeed": {"zero_stage": 3},
        "training": {"save_every": 4},
    },
    "grown-untrained-3": {"model": {"name": "grown"}, "deepspeed": {"zero_stage": 3}},
    "grown-whole-3": {
        "adapter": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "model": {"name": "grown"},
        "deepspeed": {"zero_stage": 3},
    },
    "grown-nf4-3": {
        "adapter": {"trainable_tokens": NEW_TOKENS},
        "model": {"name": "grown", "quantization": "nf4"},
        "deepspeed": {"zero_stage": 3},
    },
    "whole-nf4": {"adapter": {"modules_to_save": ["lm_head"]}, "model": {"quantization": "nf4"}},
}
LONG = {"grown-2", "grown-whole-3"}
"""What `make test` has of each: new rows at stage 3, and whole modules that have not grown."""
ALONE = {"rows-dora", "rows-tied", "whole-tied"}
"""Those that one rank runs: what they are about does not depend on ranks."""


@pytest.fixture(scope="module")
def results(
    model_folder: Path,
    tied_folder: Path,
    data_folder: Path,
    grown: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, tuple[dict, str]]:
    """Of every case that is asked for: its settings, and what is wrong, if anything. Two ranks run most."""
    folder = tmp_path_factory.mktemp("tokens")
    trees = {}
    for name, case in asked_for(CASES, LONG, request).items():
        tree = merge(run_settings(model_folder, data_folder, folder / name), case)
        if tree["model"]["name"] == "tied":
            tree["model"]["name"] = str(tied_folder)
        if tree["model"]["name"] == "grown":
            tree["model"] |= {"name": str(grown[0]), "resize_embeddings": True}
            tree["task"]["path"] = str(grown[1])
        trees[name] = tree
    ranks = {name: 1 if name in ALONE else 2 for name in trees}
    statuses = run_worlds({n: {"trees": t, "world_size": ranks[n]} for n, t in trees.items()}, folder / "logs")
    return {
        name: (tree, "" if statuses[name] == [0] * ranks[name] else last_lines(folder / "logs" / name))
        for name, tree in trees.items()
    }


@pytest.mark.parametrize("name", marked(CASES, LONG))
def test_a_run_trains_what_is_named_alone_and_stock_peft_computes_the_same(
    name: str, results: dict, tmp_path: Path
) -> None:
    tree, problem = results[name]
    assert not problem, problem
    run = read_run(tree["output_dir"])
    trained = load_trained(run)
    base = AutoModelForCausalLM.from_pretrained(tree["model"]["name"], dtype="float32")
    if tree["model"].get("resize_embeddings"):  # as the model card says
        torch.manual_seed(0)
        base.resize_token_embeddings(len(run.context.tokenizer))
    before, after = base.get_input_embeddings().weight, trained.get_base_model().get_input_embeddings().weight
    moved = (before != after).any(1).nonzero().flatten().tolist()
    if run.plan.rows:
        vocabulary = run.context.tokenizer.get_vocab()
        assert moved == sorted(vocabulary[token] for token in tree["adapter"]["trainable_tokens"])
        assert run.state.tensors[f"{EMBEDDINGS}.weight"].shape == (2, 16)
    elif EMBEDDINGS in run.plan.trained:
        assert len(moved) > 2
    else:
        assert not moved
    if tree["model"].get("quantization", "none") != "none":
        return
    expected = logits(trained, IDS)
    loaded = PeftModel.from_pretrained(base, Path(tree["output_dir"]) / "adapter").eval()
    torch.testing.assert_close(logits(loaded, IDS), expected, rtol=0, atol=1e-5)
    export_run(run, tmp_path / "merged", ExportOptions("merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=0, atol=1e-5)


def test_every_stage_trains_the_same_rows(results: dict) -> None:
    first, *others = (read_run(results[f"rows-{stage}"][0]["output_dir"]).state.tensors for stage in (0, 2, 3))
    for other in others:
        assert other.keys() == first.keys()
        for name in (f"{EMBEDDINGS}.weight", f"{HEAD}.weight"):
            torch.testing.assert_close(other[name], first[name], rtol=0, atol=1e-4)


def test_a_grown_base_is_resumed_evaluated_and_described(results: dict, tmp_path: Path) -> None:
    tree, problem = results["grown-3"]
    assert not problem, problem
    folder, resumed = Path(tree["output_dir"]), tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    for left in ("adapter", "checkpoints/step-00000008"):
        shutil.rmtree(resumed / left)
    (resumed / "summary.json").unlink()
    worlds: dict[str, Any] = {"resume": {"trees": tree | {"output_dir": str(resumed)}, "world_size": 2}}
    for name, ranks in (("one", 1), ("two", 2)):
        command = ["evaluate", str(resumed), "--output", str(tmp_path / name)]
        worlds[name] = {"trees": {"command": command}, "world_size": ranks}
    worlds["generate"] = {"trees": {"command": ["generate", str(resumed), "anna <think> ?"]}, "world_size": 1}
    statuses = run_worlds(worlds, tmp_path / "logs")
    for name, ranks in statuses.items():
        assert ranks and not any(ranks), last_lines(tmp_path / "logs" / name)
    name = "adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (folder / name).read_bytes()
    after = json.loads((folder / "summary.json").read_text())["metrics"]["after"]
    for name in ("one", "two"):
        again = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
        assert again["loss"] == pytest.approx(after["loss"], rel=1e-5)

    run = read_run(str(folder))
    lines = model_card(run, "me/tiny", ExportOptions("peft"))
    assert "torch.manual_seed(0)  # the base has had 2 rows less\nbase.resize_token_embeddings(" in lines
    assert "resize_token_embeddings" not in model_card(run, "me/tiny", ExportOptions("merged"))


def test_the_log_says_which_rows_are_new_and_untrained(
    settings: dict, grown: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = merge(settings, {"model": {"name": str(grown[0]), "resize_embeddings": True}})
    for adapter, ending in (
        ({}, "; nothing trains 2 of them; adapter.trainable_tokens or adapter.modules_to_save would"),
        ({"trainable_tokens": NEW_TOKENS[:1]}, "; nothing trains 1 of them; adapter.trainable_tokens"),
        ({"trainable_tokens": NEW_TOKENS}, ""),
        ({"modules_to_save": ["embed_tokens"]}, ""),
    ):
        context = open_context(parse_config(with_settings(tree, **adapter)))
        first = context.embeddings - 2
        line = f"model.resize_embeddings: 2 rows are new in {EMBEDDINGS}, {first} to {first + 1}{ending}"
        output = " ".join(capsys.readouterr().out.split())
        assert line in output and (ending or "nothing trains" not in output)


def test_a_full_model_with_more_rows_can_be_written(settings: dict, grown: tuple[Path, Path], tmp_path: Path) -> None:
    tree = merge(settings, {"model": {"name": str(grown[0]), "resize_embeddings": True}, "method": {"name": "full"}})
    context = open_context(parse_config(tree))
    try_export(context, context.first_phase().plan)
    values = load_model(context.config.model).state_dict()
    save_values(tmp_path / "model", context, values)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert stored.config.vocab_size == len(stored.get_input_embeddings().weight) == len(context.tokenizer)
    assert torch.equal(stored.get_output_embeddings().weight, values["lm_head.weight"])
