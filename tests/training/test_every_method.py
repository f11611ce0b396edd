"""Every method and composition as a complete run, on a tiny Llama and a tiny encoder: what it leaves is what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.all_methods import METHODS, with_cache
from helpers.contexts import open_context
from helpers.dying import DIED
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.checkpoint.store import newest_valid
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.reading import read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.memory import state_bytes, step_bytes
from sparse_llm_ft.objectives.build import build_objective
from sparse_llm_ft.plan import AdapterPlan
from sparse_llm_ft.training.run import Run

ENCODER = ("lora", "full", "vera", "partial", "partial_adalora", "lora_drop", "weight_lora", "weight_then_partial")


@pytest.fixture(scope="module")
def trees(
    model_folder: Path,
    data_folder: Path,
    encoder_folder: Path,
    labelled_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("every-method")
    trees = {}
    for name, method in METHODS.items():
        method = with_cache(method, folder / "cache")
        tree = run_settings(model_folder, data_folder, folder / name)
        tree["adapter"]["lora_dropout"] = 0.0
        trees[name] = tree | {"method": method}
        if name in ENCODER:
            tree = run_settings(encoder_folder, labelled_folder, folder / f"encoder-{name}")
            tree["task"] = {
                "name": "custom",
                "path": str(labelled_folder),
                "labels": ["no", "yes"],
                "texts": ["sentence"],
                "max_length": 32,
            }
            tree["evaluation"] |= {"split": "validation", "samples": 12}
            trees[f"encoder-{name}"] = tree | {"method": method}
    for name in DRAWN:
        trees[name]["report"] = True
    return trees


# Steps after which a run is killed: in the pilot, and between two checkpoints of the rest.
KILLED = [
    ("lora_drop", 1),
    ("weight_then_partial", 6),
    ("adalora", 5),
    ("sparse_adapter", 5),
    ("encoder-partial", 5),
]
KILLED_LONG = [("lora_drop", 4), ("rslora", 5)]
"""Kills that `make test-long` adds: after the pilot and before the first own checkpoint, and of a tuner of PEFT's."""
DRAWN = ("vera", "partial", "lora_drop", "weight_then_partial", "encoder-full")
"""Runs with a report: each kind of picture, and the plans with least to show."""
NAMES = [*METHODS, *(f"encoder-{name}" for name in ENCODER)]
LONG = {
    *("lora_plus", "partial_imp", "partial_compact", "partial_dora", "pyramidal"),
    *(
        "sparse_rows_columns",
        "partial_then_weight_plus",
        "encoder-vera",
        "encoder-partial_adalora",
        "encoder-lora_drop",
    ),
    *("encoder-weight_then_partial", "encoder-weight_lora", "weight_lora_plus"),
    "rslora",
    "tied_then_partial",
}
"""Those that only `make test-long` runs: each is a variant, or on the encoder, of one that `make test` runs here or, as
weight_lora_plus, elsewhere."""
ANY = [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in NAMES]


@pytest.fixture(scope="module")
def results(
    trees: dict[str, dict], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, str]:
    """All runs: "passed", or the log's end. Some are killed and resumed; one is repeated, its derivation cached."""
    folder = tmp_path_factory.mktemp("results")
    here: list[Any] = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params.get("name") for item in here if hasattr(item, "callspec")}
    wanted = {name: tree for name, tree in trees.items() if name in asked or name not in LONG}
    worlds: dict[str, dict[str, Any]] = {name: {"trees": tree} for name, tree in wanted.items()}
    # What is made again is without pictures, which take longer than the steps.
    again = {"output_dir": f"{trees['partial']['output_dir']}-again", "report": False}
    worlds["partial-again"] = {"trees": trees["partial"] | again}
    killed = []
    parameters = [item.callspec.params for item in here if hasattr(item, "callspec")]
    also = [kill for kill in KILLED_LONG if {"name": kill[0], "steps": kill[1]} in parameters]
    for name, steps in [*KILLED, *also]:
        resumed = f"{name}-killed-{steps}"
        tree = trees[name] | {"output_dir": f"{trees[name]['output_dir']}-killed-{steps}", "report": False}
        tree["training"] = tree["training"] | {"save_every": 3}
        killed.append(f"{resumed}-first")
        worlds[killed[-1]] = {"trees": tree, "before": ["helpers.dying", "die_after", steps]}
        worlds[resumed] = {"trees": tree}
    statuses = run_worlds({name: world | {"world_size": 1} for name, world in worlds.items()}, folder)
    expected = {name: [DIED] if name in killed else [0] for name in worlds}
    ended = {n: "passed" if s == expected[n] else f"{s}\n{last_lines(folder / n)}" for n, s in statuses.items()}
    assert all(ended[name] == "passed" for name in killed), ended
    return ended | {"output": last_lines(folder / "partial-again", 100_000)}


@pytest.mark.parametrize("name", ANY)
def test_its_checkpoints_pass_the_checks_that_a_foreign_one_must(name: str, trees: dict, results: dict) -> None:
    assert results[name] == "passed", results[name]
    prepared = open_context(parse_config(trees[name]), World(0, 1, 0, 1))
    _, complaints = newest_valid(prepared.folder.checkpoints, prepared.expected)
    assert not complaints


@pytest.mark.parametrize("name", ANY)
def test_a_run_leaves_what_it_measured(name: str, trees: dict[str, dict], results: dict[str, str]) -> None:
    """The adapter as stock PEFT loads it, or the model, has the loss of ``metrics.after``."""
    assert results[name] == "passed", results[name]
    tree, run = trees[name], Path(trees[name]["output_dir"])
    summary = json.loads((run / "summary.json").read_text())
    encoder = name.startswith("encoder-")
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    options = {"num_labels": 2} if encoder else {}
    if name.endswith("full"):
        model = kind.from_pretrained(run / "model")
    else:
        model = PeftModel.from_pretrained(kind.from_pretrained(tree["model"]["name"], **options), run / "adapter")
    loss = _loss(model.eval(), tree, resolve_task(parse_config(tree).task))
    assert loss == pytest.approx(summary["metrics"]["after"]["loss"], abs=2e-4)
    assert (run / "report" / "index.html").is_file() == (name in DRAWN)
    newest, _ = newest_valid(run / "checkpoints")
    assert newest.state.progress.counted_steps == 8


@pytest.mark.parametrize(
    ("name", "steps"), [*KILLED, *(pytest.param(*kill, marks=pytest.mark.long) for kill in KILLED_LONG)]
)
def test_a_killed_run_ends_as_the_other(name: str, steps: int, trees: dict[str, dict], results: dict[str, str]) -> None:
    """Bit for bit: pilot, scores, masks, shared pairs and AdaLoRA's sensitivities survive."""
    assert results[f"{name}-killed-{steps}"] == "passed", results[f"{name}-killed-{steps}"]
    whole, resumed = (
        load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
        for folder in (
            trees[name]["output_dir"],
            f"{trees[name]['output_dir']}-killed-{steps}",
        )
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def _loss(model: torch.nn.Module, tree: dict, task: Task) -> float:
    """Mean loss over the measured samples, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(tree["model"]["name"])
    objective = build_objective(model, tokenizer, task)
    config = parse_config(tree)
    split = config.evaluation.split
    examples = read_split(resolve_task(config.task), split)[: config.evaluation.samples]
    total, units = 0.0, 0
    with torch.no_grad():
        for example in examples:
            sample = _encode(example, tokenizer, config.task.max_length, bool(task.labels))
            total += float(objective.loss(model, objective.batch([sample])))
            units += objective.units(sample)
    return total / units


def _encode(example: Any, tokenizer: Any, length: int, labelled: bool) -> Any:
    from sparse_llm_ft.data.tokenization import CausalLMPreprocessor, ClassificationPreprocessor

    return (ClassificationPreprocessor if labelled else CausalLMPreprocessor)(tokenizer, length)(example)


def plans(trees: dict[str, dict], name: str) -> list[AdapterPlan]:
    files = sorted((Path(trees[name]["output_dir"]) / "phases").iterdir())
    return [AdapterPlan.from_dict(json.loads(file.read_text())["plan"]) for file in files]


def test_the_plans_are_what_the_methods_say(trees: dict[str, dict], results: dict[str, str]) -> None:
    assert len(plans(trees, "weight_lora_one")[-1].active) == 1
    assert len(plans(trees, "weight_lora_all")[-1].active) == 14
    assert {name.split(".")[2] for name in plans(trees, "weight_lora_cost")[-1].active} == {"1"}
    pilot, shared = plans(trees, "lora_drop")
    assert len(pilot.active) == len(shared.active) == 14 and shared.groups
    assert not plans(trees, "lora_drop_removed")[-1].groups
    select, derive, train = plans(trees, "weight_then_partial")
    assert len(select.active) == 14 and len(derive.active) == len(train.active) == 4
    assert any(a.rows or a.cols for a in train.active.values())
    composed = plans(trees, "drop_then_partial")[-1]
    assert composed.groups and any(a.cols for a in composed.active.values())
    assert plans(trees, "encoder-partial")[0].trained and not plans(trees, "encoder-partial")[0].active


def test_the_freed_memory_becomes_a_larger_micro_batch(trees: dict[str, dict], results: dict[str, str]) -> None:
    """Survivors in the upper layer: the micro-batch grows, and the planned peak of a step does not rise."""
    tree = trees["weight_lora_cost"]
    summary = json.loads((Path(tree["output_dir"]) / "summary.json").read_text())
    sizes = [phase["micro_batch_size"] for phase in summary["phases"]]
    assert sizes == [2, 4]
    run = Run.prepare(open_context(parse_config(tree | {"output_dir": f"{tree['output_dir']}-planned"})))
    needed = [
        step_bytes(run.config.model, plan, run.data.longest, samples=size).peak + state_bytes(plan, run.targets, 2, 1)
        for plan, size in zip(plans(trees, "weight_lora_cost"), sizes, strict=True)
    ]
    assert needed[1] <= needed[0]
    assert "the lowest survivor is in model.layers.1: a step costs 0.59" in summary["phases"][0]["measured"]


def test_parameters_count_what_is_trained(trees: dict[str, dict], results: dict[str, str]) -> None:
    """A mask makes the trained tensors smaller; a shared pair is counted and stored once."""
    for name in ("lora_drop", "partial", "drop_then_partial", "encoder-partial", "tied_lora"):
        run = Path(trees[name]["output_dir"])
        newest, _ = newest_valid(run / "checkpoints")
        count = sum(tensor.numel() for tensor in newest.state.tensors.values())
        assert json.loads((run / "summary.json").read_text())["phases"][-1]["trainable_parameters"] == count


def test_masked_entries_are_zero_in_the_checkpoint_and_not_counted(trees: dict[str, dict], results: dict) -> None:
    """Half of all entries under Sparse Adapter's rule, to one; under random masking about three tenths."""
    for name, share in (("sparse_adapter", 0.5), ("random_masking", 0.3)):
        run = Path(trees[name]["output_dir"])
        newest, _ = newest_valid(run / "checkpoints")
        tensors = newest.state.tensors
        counted = json.loads((run / "summary.json").read_text())["phases"][-1]["trainable_parameters"]
        total, nonzero = sum(t.numel() for t in tensors.values()), sum(int((t != 0).sum()) for t in tensors.values())
        assert counted / total == pytest.approx(share, abs=0.03) and nonzero == counted
        for key, moments in newest.state.moments.items():
            assert torch.equal(moments["exp_avg_sq"] != 0, tensors[key] != 0)
    measured = json.loads((Path(trees["sparse_adapter"]["output_dir"]) / "summary.json").read_text())["phases"][0]
    assert measured["measured"].startswith("gradient times value of ") and measured["name"] == "warmup"


def test_a_second_run_finds_the_derivation(trees: dict[str, dict], results: dict[str, str]) -> None:
    first = Path(trees["partial"]["output_dir"])
    second = first.with_name(first.name + "-again")
    assert (first / "plan.json").read_text() == (second / "plan.json").read_text()
    assert f"ratios of 14 modules are in {first.parent / 'cache'}" in results["output"]
    assert (
        "D_t has only 6 samples to score: accuracies on them have standard errors of up to 20 points"
        in results["output"]
    )


def test_omega_is_logged_while_it_is_trained(trees: dict[str, dict], results: dict[str, str]) -> None:
    run = Path(trees["weight_lora"]["output_dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    selecting = [line for line in lines if line["phase"] == "select"]
    assert [len(line["omega"]) for line in selecting] == [14] * 4
    assert sum(value > 0 for value in selecting[-1]["omega"].values()) == 4 and "swaps" in selecting[-1]
    assert not any("omega" in line for line in lines if line["phase"] == "train")


def test_a_fitted_head_is_said_in_the_summary(trees: dict[str, dict], results: dict[str, str]) -> None:
    summaries = {
        name: json.loads((Path(trees[name]["output_dir"]) / "summary.json").read_text())
        for name in ("partial", "encoder-partial")
    }
    assert summaries["partial"]["phases"][0]["measured"].endswith("no head fitted")
    assert summaries["encoder-partial"]["phases"][0]["measured"].endswith("the head fitted on the other half of D_t")


def test_adalora_prunes_to_its_target(trees: dict[str, dict], results: dict[str, str]) -> None:
    run = Path(trees["adalora"]["output_dir"])
    newest, _ = newest_valid(run / "checkpoints")
    values = [t for name, t in newest.state.tensors.items() if name.endswith("lora_E")]
    assert sum(int((t != 0).sum()) for t in values) == 14 * 2
