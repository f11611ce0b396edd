"""Named places of a run to die at, and a record of which samples each step consumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Die = Callable[[], None]
"""Counts arrivals, and does not return from the chosen one."""


@dataclass(frozen=True)
class Place:
    """Where a process can be killed.

    Attributes:
        most: how often a short run passes it, about; the arrival to die at is drawn up to here.
        arm: patches the code of the place to call its argument on arrival.
        rank_zero: whether only rank 0 passes it.
        change: whether only runs of several phases pass it.
    """

    most: int
    arm: Callable[[Die], None]
    rank_zero: bool = False
    change: bool = False


def _before(owner: Any, name: str, die: Die, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Let `owner.name` call `die` first, where its arguments are the wanted ones."""
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            die()
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def _step(die: Die) -> None:
    from sparse_llm_ft.training.loop import Loop

    _before(Loop, "_step", die)


def _accumulation(die: Die) -> None:
    """Between backward and update of a micro-step."""
    from sparse_llm_ft.engine.engine import Engine

    _before(Engine, "step", die)


def _save(die: Die) -> None:
    """Before one of a checkpoint's five syncs: two files, the manifest, the folder; renamed, the folder above."""
    from sparse_llm_ft.io import atomic

    _before(
        atomic,
        "_sync",
        die,
        lambda path: path.name == "checkpoints" or any(part.startswith(".tmp-step-") for part in path.parts),
    )


def _torn_tensors(die: Die) -> None:
    """With half of a checkpoint's tensors on disk."""
    from sparse_llm_ft.checkpoint import state

    save_file = state.save_file

    def torn(tensors: dict, path: Path) -> None:
        save_file(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        die()
        path.write_bytes(whole)

    state.save_file = torn


def _drop(die: Die) -> None:
    """With an old checkpoint half removed."""
    from sparse_llm_ft.checkpoint import store as checkpoints

    remove = checkpoints.remove_folder

    def half(path: Path) -> None:
        next(path.glob("*.safetensors")).unlink()
        die()
        remove(path)

    checkpoints.remove_folder = half


def _metrics(die: Die) -> None:
    """Within a line of metrics.jsonl."""
    from sparse_llm_ft.run_folder import METRICS_FILE, RunFolder

    log = RunFolder.log

    def torn(self: RunFolder, record: dict) -> None:
        path = self.path / METRICS_FILE
        before, line = path.read_text(), json.dumps(record)
        path.write_text(before + line[: len(line) // 2])
        die()
        path.write_text(before)
        log(self, record)

    RunFolder.log = torn


def _begin(die: Die) -> None:
    """Before config.yaml, metrics.jsonl, or the files of plans and phases."""
    from sparse_llm_ft import run_folder

    _before(run_folder, "write_file", die)


def _change(die: Die) -> None:
    """The old engine is gone, the new one not yet there."""
    from sparse_llm_ft.training import run

    _before(run, "grown_batch", die)


def _changed(die: Die) -> None:
    """The model has the new plan, on disk are the new phase's files, and there is no engine yet."""
    from sparse_llm_ft.engine.engine import Engine

    built = 0

    def again(*_: Any) -> bool:
        nonlocal built
        built += 1
        return built > 1

    _before(Engine, "__init__", die, again)


def _load(die: Die) -> None:
    """An engine without the state it is to go on from."""
    from sparse_llm_ft.engine.engine import Engine

    _before(Engine, "load", die)


def _scores(die: Die) -> None:
    from sparse_llm_ft.training.scorer import Scorer

    _before(Scorer, "__call__", die)


def _evaluation(die: Die) -> None:
    """Between two batches of a mean loss: before training, along the way, after it."""
    from sparse_llm_ft.evaluation import loop as loss

    batches = loss._collated

    def counted(*args: Any) -> Iterator[Any]:
        for batch in batches(*args):
            die()
            yield batch

    loss._collated = counted


def _generation(die: Die) -> None:
    from sparse_llm_ft.evaluation import evaluator

    _before(evaluator, "generate", die)


def _predictions(die: Die) -> None:
    from sparse_llm_ft.evaluation import evaluator

    _before(evaluator, "write_file", die)


def _export(die: Die) -> None:
    """Before one of the adapter's syncs: two files, the manifest, the folder."""
    from sparse_llm_ft.io import atomic

    _before(atomic, "_sync", die, lambda path: ".tmp-adapter" in path.parts)


def _summary(die: Die) -> None:
    """The adapter is there, summary.json is not."""
    from sparse_llm_ft.run_folder import SUMMARY_FILE, RunFolder

    _before(RunFolder, "write_json", die, lambda self, name, data: name == SUMMARY_FILE)


def _report(die: Die) -> None:
    from sparse_llm_ft.training import report_writer

    _before(report_writer, "write_report", die)


PLACES = {
    "step": Place(8, _step),
    "accumulation": Place(12, _accumulation),
    "save": Place(15, _save, rank_zero=True),
    "torn tensors": Place(3, _torn_tensors, rank_zero=True),
    "drop": Place(2, _drop, rank_zero=True),
    "metrics": Place(8, _metrics, rank_zero=True),
    "begin": Place(4, _begin, rank_zero=True),
    "load": Place(2, _load),
    "change": Place(1, _change, change=True),
    "changed": Place(1, _changed, change=True),
    "scores": Place(2, _scores, change=True),
    "evaluation": Place(8, _evaluation),
    "generation": Place(2, _generation),
    "predictions": Place(2, _predictions, rank_zero=True),
    "export": Place(4, _export, rank_zero=True),
    "summary": Place(1, _summary, rank_zero=True),
    "report": Place(1, _report, rank_zero=True),
}


def die_at(place: str, arrival: int) -> None:
    """SIGKILL for this process when it arrives at the place for the so manieth time."""
    arrivals = 0

    def die() -> None:
        nonlocal arrivals
        arrivals += 1
        if arrivals == arrival:
            os.kill(os.getpid(), signal.SIGKILL)

    PLACES[place].arm(die)


def record_samples(file: Path) -> None:
    """Append one line per optimizer step that this process has done: the sample indices it was given."""
    from sparse_llm_ft.checkpoint.state import Progress
    from sparse_llm_ft.data.sampler import ShuffledSampler
    from sparse_llm_ft.training.loop import Loop

    micro_batches, step = ShuffledSampler.micro_batches, Loop._step
    given: dict[int, list[list[list[int]]]] = {}  # by the position: they are drawn some steps ahead

    def recorded(self: ShuffledSampler, position: int, *args: Any) -> list[list[list[int]]]:
        given[position] = micro_batches(self, position, *args)
        return given[position]

    def told(self: Loop, progress: Progress, thread: Any) -> Any:
        result = step(self, progress, thread)
        line = {"step": progress.step + 1, "shares": given[progress.position][self.world.rank]}
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return result

    ShuffledSampler.micro_batches, Loop._step = recorded, told
