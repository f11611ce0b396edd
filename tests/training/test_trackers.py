"""Experiment trackers: what is sent, once, under one id, and what happens when a tracker fails or does not answer."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import PartialState

from helpers.fake_wandb import Run, install, written
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.context.preflight import preflight
from sparse_llm_ft.distributed import exit_status
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.errors import ConfigError, PreemptionRequested, TrainingError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.training import phase_training, run, trackers
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.phase_training import PhaseTraining
from sparse_llm_ft.training.trackers import STATE_FILE, Trackers


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where wandb's runs go."""
    folder = tmp_path / "wandb"
    folder.mkdir()
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that it is as before afterwards
    install(str(folder))
    yield folder
    PartialState._reset_state()


class Recorded(Console):
    """Remembers its lines."""

    def __init__(self) -> None:
        super().__init__(0)
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        """Remember a line."""
        self.lines.append(text)


def started(
    tmp_path: Path, names: list[str], ids: dict[str, str] | None = None, rank: int = 0
) -> tuple[Trackers, list[str]]:
    """Trackers of a run in `tmp_path`/run, and what the console shows."""
    folder, console = tmp_path / "run", Recorded()
    folder.mkdir(exist_ok=True)
    tree = run_settings(tmp_path, tmp_path, folder) | {"trackers": names, "tracker_project": "project"}
    (tmp_path / "config.json").write_text("{}")
    found = Trackers(parse_config(tree), console, rank)
    found.begin(ids or {})
    return found, console.lines


def delayed(function: Callable[..., None], event: threading.Event) -> Callable[..., None]:
    """The function, which waits for the event first."""

    def waits(*arguments: Any, **options: Any) -> None:
        assert event.wait(60)
        function(*arguments, **options)

    return waits


def steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines if "step" in line]


def test_numbers_are_sent_under_one_id(tmp_path: Path, fake: Path) -> None:
    ours, shown = started(tmp_path, ["wandb"])
    ours.log(1, {"loss": 2.0, "phase": "select", "omega": {"a": 0.5, "b": 1.0}, "grad_norm": None})
    ours.close()
    ((own, lines),) = written(fake).items()
    assert ours.ids == {"wandb": own} and not shown
    assert lines[0]["project"] == "project" and lines[0]["options"] == {"name": "run", "id": own, "resume": "allow"}
    assert lines[1]["config"]["training.learning_rate"] == run_settings(tmp_path, tmp_path, tmp_path)["training"].get(
        "learning_rate", 1e-4
    )
    assert lines[2] == {"step": 1, "values": {"loss": 2.0, "omega/a": 0.5, "omega/b": 1.0}}
    assert lines[3] == {"end": True}


def test_a_run_that_starts_again_sends_no_step_twice(tmp_path: Path, fake: Path) -> None:
    for first, last in ((1, 3), (2, 5)):  # it was killed after step 3, and its checkpoint is of step 1
        ours, _ = started(tmp_path, ["wandb"])
        for step in range(first, last + 1):
            ours.log(step, {"loss": float(step)})
        ours.close()
    ((_, lines),) = written(fake).items()
    assert steps(lines) == [1, 2, 3, 4, 5]
    assert sum("config" in line for line in lines) == 1


def test_the_checkpoint_s_id_is_used_where_the_folder_has_none(tmp_path: Path, fake: Path) -> None:
    ours, _ = started(tmp_path, ["wandb"], {"wandb": "abc"})
    ours.log(4, {"loss": 1.0})
    ours.close()
    assert steps(written(fake)["abc"]) == [4]


@pytest.mark.parametrize("text", ["", "[1]", '{"wandb": {"id": "../x", "step": 3}}', '{"wandb": {"id": 3}}'])
def test_a_file_that_cannot_be_used_begins_a_new_run(text: str, tmp_path: Path, fake: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STATE_FILE).write_text(text)
    ours, _ = started(tmp_path, ["wandb"])
    ours.log(1, {"loss": 1.0})
    ours.close()
    ((own, lines),) = written(fake).items()
    assert steps(lines) == [1] and len(own) == 32


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_dropped_with_a_line(
    where: str, tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("unreachable")

    if where == "start":
        monkeypatch.setattr(sys.modules["wandb"], "init", fails)
    else:
        monkeypatch.setattr(Run, where, fails)
    ours, shown = started(tmp_path, ["wandb"])
    for step in (1, 2):
        ours.log(step, {"loss": 1.0})
    ours.close()
    assert shown == ["trackers: wandb fails and is dropped (ConnectionError: unreachable)"]


def test_a_tracker_that_does_not_answer_delays_the_end_by_a_limit(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(Run, "log", lambda *_, **__: free.wait(60))
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.2)
    ours, shown = started(tmp_path, ["wandb"])
    ours.log(1, {"loss": 1.0})
    ours.close()
    assert shown == ["trackers: wandb did not take everything within 0 s; the run ends"]
    # A run that was asked to leave has less time: launchers kill it soon.
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 60.0)
    ours, _ = started(tmp_path, ["wandb"])
    ours.log(2, {"loss": 1.0})
    monkeypatch.setattr(phase_training, "run_on_rank_zero", lambda world, action: action())
    training = PhaseTraining.__new__(PhaseTraining)
    training.parts = SimpleNamespace(trackers=ours)
    training.loop = SimpleNamespace(prefix=None, progress=SimpleNamespace(step=1), raise_failure=lambda: None)
    training.console = training.writer = SimpleNamespace(end=lambda: None, close=lambda: None)
    training.world = ONE_PROCESS
    began = time.monotonic()
    with pytest.raises(PreemptionRequested), ours.sent_on_error():  # which does not wait again
        training._stop("SIGTERM")
    assert time.monotonic() - began < exit_status._GRACE_SECONDS
    free.set()


def test_what_led_to_an_error_is_sent(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    monkeypatch.setattr(Run, "write", delayed(Run.write, begun))
    ours, shown = started(tmp_path, ["wandb"])

    def fails(_: object) -> None:
        for step in (1, 2, 3):
            ours.log(step, {"loss": float(step)})
        begun.set()
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(run.Run, "_train", fails)
    training = run.Run.__new__(run.Run)
    training.trackers, training.run_state = ours, SimpleNamespace(recorded=nullcontext)
    with pytest.raises(TrainingError):
        training.train()
    ((_, lines),) = written(fake).items()
    assert steps(lines) == [1, 2, 3] and lines[-1] == {"end": True} and not shown


def test_other_ranks_send_nothing(tmp_path: Path, fake: Path) -> None:
    ours, _ = started(tmp_path, ["wandb"], rank=1)
    ours.log(1, {"loss": 1.0})
    ours.close()
    assert not written(fake) and ours.ids == {}


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["wandb", "wandb"], "trackers: wandb twice; expected each once"),
        (["swanlab"], "trackers: swanlab is not installed; expected pip install swanlab, or trackers without it"),
    ],
)
def test_what_is_refused(
    names: list[str], line: str, model_folder: Path, data_folder: Path, tmp_path: Path, fake: Path
) -> None:
    tree = run_settings(model_folder, data_folder, tmp_path / "run") | {"trackers": names}
    with pytest.raises(ConfigError) as refused:
        preflight(parse_config(tree), ONE_PROCESS)
    assert str(refused.value) == line


def test_a_run_that_is_killed_goes_on_in_the_same_tracker_run(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wandb"
    folder.mkdir()
    tree = run_settings(model_folder, data_folder, tmp_path / "run")
    tree["training"] |= {"max_steps": 6, "save_every": 2}
    tree |= {"trackers": ["wandb"]}

    def world(kill_at: int | None) -> dict[str, Any]:
        return {"trees": tree, "world_size": 2, "before": ["helpers.fake_wandb", "in_ranks", str(folder), kill_at]}

    for name, kill_at in (("killed", 4), ("resumed", None)):
        statuses = run_worlds({name: world(kill_at)}, tmp_path / "logs", timeout=200)
        assert (statuses[name] == [0, 0]) == (kill_at is None), last_lines(tmp_path / "logs" / name)
    ((own, lines),) = written(folder).items()
    # Behind the last step, the metrics before and after.
    assert steps(lines) == [1, 2, 3, 4, 5, 6, 7]
    assert any(name.startswith("after/") for name in lines[-2]["values"]) and lines[-1] == {"end": True}
    states = sorted((tmp_path / "run" / "checkpoints").glob("step-*/*.json"))
    assert any(own in file.read_text() for file in states)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    ids = []
    for last in (2, 4):
        ours, shown = started(tmp_path, ["wandb"])
        for step in range(1, last + 1):
            ours.log(step, {"loss": 1.0 / step})
        ours.close()
        assert not shown
        ids.append(ours.ids["wandb"])
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2
    PartialState._reset_state()


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    for first, last in ((1, 3), (2, 5)):
        ours, shown = started(tmp_path, ["mlflow"])
        for step in range(first, last + 1):
            ours.log(step, {"loss": 1.0 / step})
        ours.close()
        assert not shown
    history = mlflow.MlflowClient().get_metric_history(ours.ids["mlflow"], "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / step) for step in range(1, 6)]
    PartialState._reset_state()


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first, last in ((1, 3), (2, 5)):
        ours, shown = started(tmp_path, ["trackio"])
        for step in range(first, last + 1):
            ours.log(step, {"loss": 1.0 / step})
        ours.close()
        assert not shown
    logged = SQLiteStorage.get_logs("project", ours.ids["trackio"])
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5]
    PartialState._reset_state()


def test_the_state_file_is_written_before_a_step_is_sent(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    log = Run.log

    def look(self: Run, values: dict[str, Any], step: int | None = None) -> None:
        seen.append(json.loads((tmp_path / "run" / STATE_FILE).read_text())["wandb"]["step"])
        log(self, values, step)

    monkeypatch.setattr(Run, "log", look)
    ours, _ = started(tmp_path, ["wandb"])
    ours.log(1, {"loss": 1.0})
    ours.log(2, {"loss": 1.0})
    ours.close()
    assert seen == [1, 2]


def test_a_step_whose_line_is_lost_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes from there would never write the line."""
    monkeypatch.setattr(phase_training, "run_on_rank_zero", lambda world, action: action())
    training, written = PhaseTraining.__new__(PhaseTraining), []

    def fails(line: dict[str, object]) -> None:
        written.append(line)
        raise OSError(28, "No space left on device")

    training.loop = Loop.__new__(Loop)
    training.loop.failure = None
    training.writer = SimpleNamespace(write=fails)
    training.world, training.parts = ONE_PROCESS, SimpleNamespace(save=lambda *_: pytest.fail("saved"))
    training._write({"step": 1})
    training._write({"step": 2})
    assert written == [{"step": 1}], "a second line would be joined to half of the first"
    with pytest.raises(OSError, match="No space left"):
        training._save()
