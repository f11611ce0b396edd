"""`training.keep_best` and `early_stopping`: which step is best, that it is exported, and when training stops."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.context.preflight import preflight
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.training.best import BestWatch

STEPS = 12


@pytest.mark.parametrize(
    ("metric", "values", "best", "stops_after"),
    [
        ("loss", [3.0, 2.0, 2.0, 2.5], 2, 4),  # an equal value is no better one
        ("accuracy", [3.0, 2.0, 4.0, 2.0, 3.0], 3, 5),
        ("loss", [math.nan, math.inf], None, 2),
        ("loss", [3.0, math.nan, 1.0], 3, None),
    ],
)
def test_the_best_of_several(metric: str, values: list[float], best: int | None, stops_after: int | None) -> None:
    watch = BestWatch(metric, True, 2)
    stopped = None
    for step, value in enumerate(values, 1):
        assert watch.note(step, value) == (watch.kept_step == step)
        if watch.stops and stopped is None:
            stopped = step
    assert watch.kept_step == best and stopped == stops_after


@pytest.fixture(scope="module")
def runs(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, by the names of their worlds."""
    folder = tmp_path_factory.mktemp("best-runs")
    # Other answers are right in validation, so that its loss rises before training ends.
    shutil.copytree(data_folder, folder / "data")
    for split, answer in (("train", "anna buys"), ("validation", "tom meets")):
        file = folder / "data" / f"{split}.jsonl"
        rows = [json.loads(line) | {"answer": answer} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def world(name: str, run: str | None = None, size: int = 1, **training: Any) -> dict[str, Any]:
        tree = run_settings(model_folder, folder / "data", folder / (run or name))
        tree["adapter"]["lora_dropout"] = 0.0  # ranks draw their own
        own = {"max_steps": STEPS, "learning_rate": 0.01, "schedule": "constant", "eval_every": 2, "save_every": 3}
        tree["training"] |= own | {"keep_checkpoints": 2} | training
        tree["evaluation"] |= {"samples": 4, "max_new_tokens": 4}
        return {"trees": tree, "world_size": size}

    kill = {"before": ["helpers.watching", "watch", str(folder / "watched"), 11]}
    (folder / "watched").mkdir()
    worlds = {
        "best": world("best", keep_best="loss"),
        "killed": world("killed", keep_best="loss") | kill,
        "resumed": world("resumed", "killed", size=2, keep_best="loss"),
        "metric": world("metric", keep_best="rougeL"),
        "stopped": world("stopped", early_stopping={"patience": 1}),
    }
    worlds["killed"]["world_size"] = 2
    run(worlds, folder)
    best = summary(folder, "best")["exported_step"]
    run({"short": world("short", max_steps=best)}, folder)
    return folder


def run(worlds: dict[str, Any], folder: Path) -> None:
    statuses = run_worlds(worlds, folder / "logs", timeout=400)
    for name, status in statuses.items():
        assert (set(status) == {0}) == (name != "killed"), f"{name}: {last_lines(folder / 'logs' / name)}"


def summary(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "summary.json").read_text())  # type: ignore[no-any-return]


def validations(runs: Path, name: str, key: str = "validation_loss") -> dict[int, float]:
    """Step -> value."""
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def adapter(runs: Path, name: str) -> bytes:
    return (runs / name / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_best_step_is_exported_and_measured(runs: Path) -> None:
    found, losses = summary(runs, "best"), validations(runs, "best")
    best = min(losses, key=lambda step: losses[step])
    assert found["exported_step"] == best < STEPS
    assert found["best"] == {"step": best, "value": losses[best], "waited": (STEPS - best) // 2}
    # As a run that ends there.
    assert adapter(runs, "best") == adapter(runs, "short")
    assert found["metrics"]["after"] == summary(runs, "short")["metrics"]["after"]
    assert summary(runs, "short")["best"] is None


def test_its_checkpoint_stays_and_is_what_later_commands_read(runs: Path) -> None:
    steps = sorted(int(entry.name[5:]) for entry in (runs / "best" / "checkpoints").glob("step-*"))
    best = summary(runs, "best")["exported_step"]
    assert best in steps and steps[-1] == STEPS and len(steps) <= 3
    assert read_run(str(runs / "best")).state.progress.step == best


def test_a_killed_run_finds_the_same_one(runs: Path) -> None:
    assert summary(runs, "killed")["exported_step"] == summary(runs, "best")["exported_step"]
    losses = validations(runs, "best")
    for step, loss in validations(runs, "killed").items():
        assert abs(loss - losses[step]) < 1e-4 * loss  # on two processes


def test_a_metric_of_the_task(runs: Path) -> None:
    scores = validations(runs, "metric", "validation_rougeL")
    best = max(scores, key=lambda step: (scores[step], -step))
    assert len(scores) == STEPS // 2 and summary(runs, "metric")["exported_step"] == best
    assert (runs / "metric" / "predictions-validation.jsonl").is_file()


def test_training_stops_early_and_for_good(runs: Path, model_folder: Path, data_folder: Path) -> None:
    losses = validations(runs, "stopped")
    steps = sorted(losses)
    rising = next(
        step for step in steps[1:] if losses[step] >= min(losses[before] for before in steps if before < step)
    )
    assert steps[-1] == rising < STEPS
    assert summary(runs, "stopped")["exported_step"] == rising  # `keep_best` is not set
    # Killed behind its last checkpoint, and run again.
    shutil.copytree(runs / "stopped", runs / "again")
    for part in ("summary.json", "adapter"):
        path = runs / "again" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tree = json.loads(json.dumps(_settings(runs / "again")))
    run({"again": {"trees": tree, "world_size": 1}}, runs)
    assert validations(runs, "again") == losses and adapter(runs, "again") == adapter(runs, "stopped")


def _settings(folder: Path) -> dict[str, Any]:
    import yaml

    tree = yaml.safe_load((folder / "config.yaml").read_text())
    return tree | {"output_dir": str(folder)}


@pytest.mark.parametrize(
    ("training", "samples", "line"),
    [
        (
            {"keep_best": "rouge"},
            4,
            "training.keep_best: 'rouge'; expected one of loss, rouge1, rouge2, rougeL, rougeLsum",
        ),
        (
            {"keep_best": "loss", "eval_every": None},
            4,
            "training.keep_best: loss, but nothing is validated; expected training.eval_every beside it",
        ),
        (
            {"early_stopping": {"patience": 2, "metric": "rougeL"}},
            0,
            "training.early_stopping.metric: rougeL, and evaluation.samples is 0; expected loss, or samples to take it "
            "on",
        ),
        (
            {"keep_best": "loss", "early_stopping": {"patience": 2, "metric": "rougeL"}},
            4,
            "training.early_stopping.metric: rougeL, and training.keep_best is loss; expected the same",
        ),
    ],
)
def test_what_is_refused(
    training: dict[str, Any], samples: int, line: str, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    tree = run_settings(model_folder, data_folder, tmp_path / "run")
    tree["training"] |= {"eval_every": 2} | training
    tree["evaluation"] |= {"samples": samples}
    with pytest.raises(ConfigError) as refused:
        preflight(parse_config(tree), ONE_PROCESS)
    assert str(refused.value) == line
