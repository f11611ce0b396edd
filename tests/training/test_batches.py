"""The thread that makes batches ahead: order, errors, how far it reads, and its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import TrainingError, UserError
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.training.batches import ShareMaker
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.schedule import Schedule

pytestmark = pytest.mark.usefixtures("process_group")
TRAINING = TrainingConfig(max_steps=6, global_batch_size=4, micro_batch_size=2)


class Engine:
    """Trains nothing; remembers what it was given."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(1, 1)
        self.parameters = dict(self.module.named_parameters())
        self.norm, self.seen = torch.tensor(1.0), list[float]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.flatten().tolist()
        return self.module(x)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> None:
        pass


@dataclass
class Numbers:
    """Samples are numbers; remembers which threads have collated."""

    threads: set[str]

    def batch(self, samples: list[float]) -> dict[str, torch.Tensor]:
        self.threads.add(threading.current_thread().name.split("_")[0])
        return {"x": torch.tensor(samples)[:, None]}

    def loss(self, forward: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return forward(**batch).sum()

    def units(self, sample: float) -> int:
        return 1

    def tokens(self, sample: float) -> int:
        return int(sample) + 1


@dataclass
class Rows:
    """A stream of 0, 1, 2, ...; `read` is how many rows were read, `opened` how often from the first one."""

    bad: int | None = None
    unreadable: int | None = None
    read: int = 0
    opened: int = 0

    def __call__(self, skipped: Any) -> Iterator[Any]:
        self.opened += 1
        for row in range(1000):
            self.read += 1
            if row == self.unreadable:
                raise TrainingError(f"row {row} cannot be read")
            yield row

    def encode(self, row: Any) -> float:
        if row == self.bad:
            raise UserError(f"row {row} cannot be used")
        return float(row)


def stream_loop(rows: Rows, steps: int | None = None, progress: Progress | None = None) -> Loop:
    engine: Any = Engine()
    encode: Any = rows.encode
    samples = StreamingDataset(rows, encode, buffer_size=1, seed=0, length=8)
    phase = Phase("train", AdapterPlan({"a": ModuleAdapter(2, 4.0)}), steps=steps).with_batch(2, 4)
    schedule, world = Schedule(TRAINING, 0), World(0, 1, 0, 1)
    return Loop(engine, phase, None, samples, Numbers(set()), schedule, progress or Progress(), world, 0, 0)


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def in_order(loop: Loop) -> list[float]:
    return [float(i) for i in range(4 * loop.progress.step)]


def test_a_thread_makes_the_batches_in_order_and_ends_with_the_loop() -> None:
    loop = stream_loop(Rows())
    steps = loop.steps()
    next(steps)
    assert alive()
    found = [1, *(1 for _ in steps)]
    assert len(found) == 6 and not alive()
    objective: Any = loop.objective
    engine: Any = loop.engine
    assert objective.threads == {"batches"} and engine.seen == in_order(loop)


def test_a_loop_that_is_left_early_ends_the_thread() -> None:
    steps = stream_loop(Rows()).steps()
    next(steps)
    steps.close()
    assert not alive()


def test_a_stream_is_read_to_the_phases_end_and_no_further() -> None:
    """The next phase continues there; a stream that is ahead of it would be read again from its first row."""
    rows = Rows()
    loop = stream_loop(rows, steps=2)
    assert len(list(loop.steps())) == 2
    assert rows.opened == 1 and rows.read <= 8 + 2  # the shuffle buffer holds one row, and asks for one more
    following = replace(loop.phase, steps=None)
    again = Loop(
        loop.engine, following, None, loop.samples, loop.objective, loop.schedule, loop.progress, loop.world, 0, 0
    )
    assert len(list(again.steps())) == 4
    engine: Any = again.engine
    assert rows.opened == 1 and engine.seen == in_order(again)


def test_a_bad_row_ends_the_run_after_the_steps_before_it() -> None:
    loop = stream_loop(Rows(bad=9))
    done = []
    with pytest.raises(UserError, match="row 9 cannot be used"):
        for step in loop.steps():
            done.append(step.tokens)
    assert done == [1 + 2 + 3 + 4, 5 + 6 + 7 + 8] and loop.progress.step == 2 and not alive()


@pytest.mark.parametrize("rows", [Rows(bad=9), Rows(unreadable=11)], ids=["a sample", "the reader"])
def test_a_bad_row_is_said_without_reading_the_stream_again(rows: Rows) -> None:
    """That may take hours, while the other ranks wait."""
    loop = stream_loop(rows)
    with pytest.raises((UserError, TrainingError), match="cannot be"):
        list(loop.steps())
    assert loop.progress.step == 2 and rows.opened == 1


def test_a_bad_row_beyond_the_end_is_never_met() -> None:
    assert len(list(stream_loop(Rows(bad=24)).steps())) == 6


def test_an_error_of_the_thread_is_the_main_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = stream_loop(Rows())
    objective: Any = loop.objective

    def fail(samples: list[float]) -> dict[str, torch.Tensor]:
        raise ZeroDivisionError("in the collator")

    monkeypatch.setattr(objective, "batch", fail)
    with pytest.raises(ZeroDivisionError, match="in the collator"):
        next(loop.steps())
    assert not alive()


def test_what_is_pinned_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA pins no expanded tensor, whose entries share memory."""

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_contiguous()
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    nothing: Any = None
    for device, dense in (("cuda", True), ("cpu", False)):
        maker = ShareMaker(nothing, nothing, None, nothing, nothing, nothing, torch.device(device))
        batch = maker._pinned({"position_ids": torch.arange(3).expand(2, 3)})
        assert batch["position_ids"].tolist() == [[0, 1, 2]] * 2
        assert batch["position_ids"].is_contiguous() == dense
