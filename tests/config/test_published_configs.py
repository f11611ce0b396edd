"""The files of configs/: every combination of model, task, method and ZeRO stage is a run, or refused for a reason."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import yaml

from helpers.families import CONFIGS, FAMILIES, KINDS, SMALL_MODELS, family, files, layered, parsed
from sparse_llm_ft.config import check_world, dump_config, load_config, parse_config
from sparse_llm_ft.config.registry import method_names
from sparse_llm_ft.errors import ConfigError

EVERY = [(kind, name) for kind in KINDS for name in files(kind)]
REST = {
    "models": {"model": {"name": "org/base"}},
    "tasks": {"task": {"name": "custom"}},
    "methods": {"method": "lora"},
    "deepspeed": {},
}
WHOLE_MATRICES = ("dora", "partial_dora", "adalora", "partial_adalora")


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_file_is_what_its_folder_says(kind: str, name: str) -> None:
    """Only its own sections, its own name inside, and complete with the least of the three other kinds."""
    tree = files(kind)[name]
    sections = {
        "models": {"model"},
        "tasks": {"task", "adapter", "training", "evaluation"},
        "methods": {"adapter", "method", "training"},
        "deepspeed": {"deepspeed"},
    }
    assert set(tree) <= sections[kind]
    parsed(*(REST[other] for other in KINDS if other != kind), tree)
    if kind == "tasks":
        assert tree["task"]["name"] == name
    if kind == "models":
        assert (tree["model"]["quantization"] == "nf4") == name.endswith("-nf4")
        assert tree["model"]["name"] == files("models")[family(name)]["model"]["name"]
    if kind == "deepspeed":
        assert name.startswith(f"zero{tree['deepspeed']['zero_stage']}")
        offloads = tree["deepspeed"]["zero_optimization"].get("offload_optimizer", {}).get("device")
        assert (offloads == "cpu") == name.endswith("-offload")


def test_every_method_model_and_stage_has_a_file() -> None:
    named = {method.name for tree in files("methods").values() for method in parsed(*_others("methods"), tree).method}
    assert named == set(method_names())
    assert set(files("models")) == {name + ending for name in FAMILIES for ending in ("", "-nf4")} | {*SMALL_MODELS}
    assert set(files("deepspeed")) == {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"}


def test_every_task_of_the_registry_has_a_file_and_fits_it() -> None:
    from sparse_llm_ft.data.task_config import resolve_task
    from sparse_llm_ft.data.tasks import TASKS

    assert set(files("tasks")) == set(TASKS) - {"custom"}
    for name, tree in files("tasks").items():
        task = resolve_task(parsed(*_others("tasks"), tree).task)
        assert task.name == name and task.metrics


def test_the_command_line_gives_what_merging_gives() -> None:
    names = {"models": "llama-3-8b", "tasks": "dialogsum", "methods": "weight_lora_plus", "deepspeed": "zero2"}
    paths = [str(CONFIGS / kind / f"{name}.yaml") for kind, name in names.items()]
    config = load_config(paths, ["output_dir=runs/x", "model.name=org/other", "method.keep=50"])
    assert config == parsed(
        *(files(kind)[name] for kind, name in names.items()), {"model": {"name": "org/other"}, "method": {"keep": 50}}
    )
    assert (config.adapter.r, config.method[0].name, config.deepspeed.zero_stage) == (16, "weight_lora_plus", 2)


def test_every_combination_is_a_run_or_refused_for_one_of_three_reasons() -> None:
    """DoRA and AdaLoRA need whole matrices, full fine-tuning weights that are numbers; nothing else is refused."""
    refused: Counter[str] = Counter()
    total = 0
    for names in itertools.product(*(files(kind) for kind in KINDS)):
        total += 1
        model, _, method, zero = names
        reason = _reason(model, method, zero)
        trees = [files(kind)[name] for kind, name in zip(KINDS, names, strict=True)]
        if reason is None:
            check_world(parse_config(layered(*trees)), 8)
        else:
            with pytest.raises(ConfigError, match=re.escape(reason)):
                parse_config(layered(*trees))
            refused[reason] += 1
    models, tasks, _, zeros = (len(files(kind)) for kind in KINDS)
    assert total == models * tasks * len(files("methods")) * zeros
    readme = (CONFIGS / "README.md").read_text()
    assert f"all {total:,} combinations" in readme and f"{refused.total():,} are refused" in readme
    assert refused == {
        "DoRA reads full weights": models * tasks * 2 * 2,
        "orthogonality penalty needs full matrices": models * tasks * 2 * 2,
        "full cannot train a base in nf4": len(FAMILIES) * tasks * zeros,
    }


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_task_runs_on_one_to_eight_processes(world_size: int) -> None:
    for tree in files("tasks").values():
        check_world(parsed(*_others("tasks"), tree), world_size)


@pytest.mark.parametrize("name", files("methods"))
def test_a_method_file_survives_being_written_and_read(name: str) -> None:
    config = parsed(*_others("methods"), files("methods")[name])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def _others(kind: str) -> list[dict]:
    return [REST[other] for other in KINDS if other != kind]


def _reason(model: str, method: str, zero: str) -> str | None:
    if method == "full" and model.endswith("-nf4"):
        return "full cannot train a base in nf4"
    if method in WHOLE_MATRICES and zero.startswith("zero3"):
        return "DoRA reads full weights" if "dora" in method else "orthogonality penalty needs full matrices"
    return None
