"""Updates that are not finite, and signals, seen from the loop: with an engine that only counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.distributed import signals
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import PreemptionRequested, TrainingError, UserError
from sparse_llm_ft.optim import StoIHT
from sparse_llm_ft.phase import CutRule, Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.training.batches import Share, ShareMaker
from sparse_llm_ft.training.callbacks import OmegaPruning
from sparse_llm_ft.training.loop import Loop, Step
from sparse_llm_ft.training.schedule import Schedule

pytestmark = pytest.mark.usefixtures("process_group")
TRAINING = TrainingConfig(max_steps=8, global_batch_size=4, micro_batch_size=2)
PHASE = Phase("select", AdapterPlan({"a": ModuleAdapter(2, 4.0)}), steps=4).with_batch(2, 4)


class CountingEngine:
    """Keeps DeepSpeed's contract: a step is an update if it ends an accumulation and its gradients are finite."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(1, 1)
        self.parameters = dict(self.module.named_parameters())
        self.updates, self.norm, self._micro = 0, torch.tensor(1.0), 0

    def forward(self, **batch: Any) -> torch.Tensor:
        return self.module(batch["x"])

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> None:
        self._micro += 1
        if self._micro % 2 == 0:
            self.norm = self.module.weight.grad.norm()
            self.module.zero_grad()
            self.updates += bool(self.norm.isfinite())

    def begin_read(self, names: list[str]) -> Callable[[], dict[str, torch.Tensor]]:
        found = {name: torch.tensor(float(self.updates)) for name in names}
        return lambda: found


class Numbers:
    """Samples are numbers; `bad` holds the micro-batches, counted from 0, whose loss is infinite."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.calls = bad, 0

    def batch(self, samples: list[float]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(samples)[:, None]}

    def loss(self, forward: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return forward(**batch).sum() + (torch.inf if self.calls - 1 in self.bad else 0.0)  # its gradients are finite

    def units(self, sample: float) -> int:
        return 1

    tokens = units


class Recording:
    """Changes parameters after the updates in `changes`. What it reads is the number of updates."""

    reads: ClassVar[list[str]] = ["updates"]
    needs_gradients = False

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.changes: set[int] = set()
        self.made: list[int] = []  # updates that the engine had made meanwhile

    def may_change(self, step: int) -> bool:
        return step in self.changes

    def after_step(self, engine: Any, step: int, values: Any, gradients: Any) -> dict[str, Any]:
        self.steps.append(step)
        self.made.append(engine.updates)
        return {"seen": step, "read": int(values["updates"])}

    def active_adapters(self, engine: Any) -> int:
        return 1


def make_loop(bad: set[int], most: int) -> Loop:
    engine: Any = CountingEngine()
    callback: Any = Recording()
    samples = [float(i) for i in range(1, 33)]
    schedule = Schedule(TRAINING, len(samples))
    return Loop(engine, PHASE, callback, samples, Numbers(bad), schedule, Progress(), World(0, 1, 0, 1), 0, most)


def test_a_skipped_update_moves_on_in_the_data_and_nothing_else() -> None:
    loop = make_loop(bad={2, 5}, most=2)  # the first micro-batch of step 2, the second of step 3
    steps = list(loop.steps())
    assert [step.skipped for step in steps] == [False, True, True, False, False, False]
    assert (loop.progress.step, loop.progress.phase_step, loop.progress.phase_updates) == (6, 6, 4)
    assert loop.progress.samples == 24
    engine, callback = loop.engine, loop.callback
    assert engine.updates == 4 and callback.steps == [1, 2, 3, 4]  # the last of the phase is not missed
    assert "seen" not in steps[1].callback


class OmegaEngine:
    device = torch.device("cpu")

    def __init__(self, omega: dict[str, float]) -> None:
        self.omega = omega

    def values(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([self.omega[name]]) for name in names}

    def load(self, values: dict[str, torch.Tensor]) -> None:
        self.omega |= {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize(("updates", "left"), [(4, 1), (5, 3)])
def test_the_last_cut_is_made_though_the_run_ends_before_it_is_due(updates: int, left: int) -> None:
    """Skipped updates do not count, and may leave too few steps for T; after T updates it has been made."""
    engine: Any = OmegaEngine({"a.lora_omega": 1.25, "b.lora_omega": 0.75, "c.lora_omega": 1.5})
    pruning = OmegaPruning(StoIHT(CutRule(keep=1, steps=5, every=10)), list(engine.omega))
    pruning.after_step(engine, 4, engine.values(pruning.reads), {})
    assert pruning.active_adapters(engine) == 3
    pruning.at_end(engine, updates)
    assert pruning.active_adapters(engine) == left == sum(value > 0 for value in engine.omega.values())
    assert engine.omega["c.lora_omega"] == 1.5


def test_buffers_of_the_base_stay_whatever_a_forward_pass_does_to_them() -> None:
    """Running means: adapters and checkpoints do not hold them, so nobody could load what was measured."""
    loop = make_loop(set(), most=0)
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(0.5)
    loop.engine.module = torch.nn.Sequential(norm, loop.engine.module)
    loop.engine.module.weight = loop.engine.module[1].weight  # whose gradient the engine reads
    loop.__post_init__()
    for _ in loop.steps():
        assert float(norm.running_mean) == 0.5 and int(norm.num_batches_tracked) == 0
    norm(torch.tensor([[1.0], [3.0]]))
    assert float(norm.running_mean) != 0.5


def test_a_good_update_between_begins_the_count_anew() -> None:
    bad = {0, 1, 4, 5}
    assert [step.skipped for step in make_loop(bad, most=1).steps()] == [True, False, True, False, False, False]
    with pytest.raises(TrainingError, match="step 1 has loss inf and gradient norm nan; lower"):
        list(make_loop(bad, most=0).steps())


def test_too_many_in_a_row_end_the_run() -> None:
    loop = make_loop(bad=set(range(4, 99)), most=3)
    with pytest.raises(TrainingError, match=r"step 6 has loss inf .* after 3 skipped updates in a row; lower training"):
        list(loop.steps())
    assert loop.engine.updates == 2 and loop.progress.step == 5


def test_the_signal_of_any_rank_is_known_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(set(), most=0)
    steps = loop.steps()
    next(steps)
    assert loop.preempted_by is None
    monkeypatch.setattr(signals, "_caught", {signals.SIGNALS[1]})
    next(steps)
    assert loop.preempted_by == "SIGUSR1"
    with pytest.raises(PreemptionRequested, match="SIGUSR1: nothing new to save"):
        signals.exit_if_preempted()


def numbers_of(step: Step) -> tuple[object, ...]:
    return str(step.loss), str(step.grad_norm), step.learning_rate, step.tokens, step.skipped


def run_ahead(bad: set[int], most: int = 2) -> Loop:
    """What a loop does on a GPU: it reads a step's values when the next one has been made."""
    loop = make_loop(bad, most)
    loop.callback, loop.runs_ahead = None, True
    return loop


@pytest.mark.parametrize("bad", [set(), {2, 5}, {7}], ids=["all good", "two skipped", "the last one skipped"])
def test_a_loop_that_runs_ahead_makes_the_same_steps(bad: set[int]) -> None:
    at_once, ahead = make_loop(bad, most=2), run_ahead(bad)
    expected = [(numbers_of(step), replace(at_once.progress)) for step in at_once.steps()]
    seen: list[int] = []
    found = []
    for step in ahead.steps(lambda progress: progress.step == 3):
        found.append((numbers_of(step), replace(ahead.progress)))
        seen.append(ahead.engine._micro // 2)  # the steps that the engine has made
    assert found == expected
    assert ahead.over() and ahead.engine.updates == 4
    # One step ahead, but not where the caller needs the engine, nor at the phase's end.
    assert seen[:3] == [2, 3, 3] and seen[-1] == len(expected)


@pytest.mark.parametrize(
    ("bad", "changes", "made"),
    [
        (set(), set(), [2, 3, 4, 4]),
        (set(), {2}, [2, 2, 4, 4]),
        ({2, 5}, set(), [1, 2, 4, 4]),
        ({2, 5}, {3}, [1, 2, 3, 4]),
    ],
)
def test_a_loop_runs_ahead_of_a_callback_that_changes_nothing_yet(
    bad: set[int], changes: set[int], made: list[int]
) -> None:
    """It gets what its own update has left, where the engine has made the next one. Skipped updates do not count."""
    at_once, ahead = make_loop(bad, most=2), make_loop(bad, most=2)
    ahead.runs_ahead, ahead.callback.changes = True, changes
    expected = [(numbers_of(step), step.callback) for step in at_once.steps()]
    assert [(numbers_of(step), step.callback) for step in ahead.steps(lambda _: False)] == expected
    assert [step for step in expected if step[1]][1][1] == {"seen": 2, "read": 2}
    assert ahead.callback.made == made


def test_a_loop_that_runs_ahead_stops_where_its_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = run_ahead(set())
    steps = loop.steps(lambda _: False)
    next(steps)
    monkeypatch.setattr(signals, "_caught", {signals.SIGNALS[0]})
    while not loop.preempted_by:
        next(steps)
    assert loop.preempted_by == "SIGTERM" and loop.progress.step == loop.engine.updates


def test_too_many_skipped_updates_end_a_loop_that_runs_ahead() -> None:
    loop = run_ahead(set(range(2, 99)), most=1)
    with pytest.raises(TrainingError, match=r"step 3 has loss inf .* after 1 skipped updates in a row"):
        list(loop.steps(lambda _: False))
    assert loop.progress.step == 2 and loop.engine.updates == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_row_that_cannot_be_used_loses_no_step_before_it(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = run_ahead(set()) if ahead else make_loop(set(), most=0)
    make = ShareMaker.__call__

    def fourth_fails(maker: ShareMaker, progress: Progress) -> Share:
        return Share(error=UserError("row 7 is empty")) if progress.step == 3 else make(maker, progress)

    monkeypatch.setattr(ShareMaker, "__call__", fourth_fails)
    found = []
    with pytest.raises(UserError, match="row 7 is empty"):
        for step in loop.steps(lambda _: False):
            found.append(numbers_of(step))
    assert len(found) == loop.progress.step == loop.engine.updates == 3


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_take_all_the_time_between_them(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first one and those after a save, for which the loop makes two steps before it gives one."""
    loop = run_ahead(set()) if ahead else make_loop(set(), most=0)
    clock = [0.0]
    make, finish = loop._step, loop._finish

    def advanced(seconds: float, action: Any) -> Any:
        def act(*args: Any) -> Any:
            clock[0] += seconds
            return action(*args)

        return act

    monkeypatch.setattr(loop, "_step", advanced(1.0, make))
    monkeypatch.setattr(loop, "_finish", advanced(0.25, finish))
    monkeypatch.setattr("sparse_llm_ft.training.loop.time.perf_counter", lambda: clock[0])
    taken = []
    for step in loop.steps(lambda progress: progress.step == 2):
        taken.append(step.seconds)
        clock[0] += 100.0  # the caller's
    assert sum(taken) == 1.25 * len(taken) and len(taken) == 4


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_behind_a_step_stops_the_loop_with_the_next_one(ahead: bool) -> None:
    loop = run_ahead(set()) if ahead else make_loop(set(), most=0)
    steps = loop.steps(lambda _: False)
    next(steps)
    loop.failure = OSError(28, "No space left on device", "metrics.jsonl")
    with pytest.raises(UserError, match="No space left on device"):
        list(steps)
    assert loop.progress.step <= 2
