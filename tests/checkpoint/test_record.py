"""A run's record from phase to phase, and the summary that is written from it."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from sparse_llm_ft.checkpoint.record import BestStep, PhaseRecord, RunRecord, first_problem
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.training.records import summarize

PILOT = Phase("pilot", AdapterPlan({"a": ModuleAdapter(2, 4.0), "b": None})).with_batch(2, 8)
TRAIN = Phase("train", AdapterPlan({"a": None, "b": ModuleAdapter(4, 8.0)})).with_batch(4, 8)


def record_of(phase: Phase, steps: int, before: PhaseRecord | None = None) -> PhaseRecord:
    record = PhaseRecord.of(phase, before, parameters=30, optimizer_bytes=240, weight_bytes=(900, 60))
    for _ in range(steps):
        record.add(samples=8, tokens=100, seconds=0.5)
    return record


def test_a_phase_that_continues_counts_on() -> None:
    continued = record_of(PILOT, 2, before=record_of(PILOT, 3))
    assert (continued.steps, continued.samples, continued.tokens, continued.seconds) == (5, 40, 500, 2.5)
    assert continued.tokens_per_second == 200.0 and record_of(PILOT, 0).tokens_per_second == 0.0


def test_a_phase_that_ran_out_of_memory_counts_it_and_counts_on() -> None:
    before = RunRecord(run="r", samples="s", micro_batch_size=2).with_current(record_of(PILOT, 3))
    shrunk = before.shrunk(1).shrunk(1)
    assert shrunk.current is not None and (shrunk.current.micro_batch_size, shrunk.current.out_of_memory) == (1, 2)
    assert before.current is not None and before.current.out_of_memory == 0
    continued = record_of(PILOT, 1, before=shrunk.current)
    assert (continued.steps, continued.out_of_memory) == (4, 2)


def test_a_smaller_micro_batch_changes_nothing_else() -> None:
    """The best validation so far is still the best one, and early stopping has waited as long."""
    best = BestStep(step=4, value=1.5, waited=2)
    record = RunRecord(run="r", samples="s", micro_batch_size=2)
    before = record.with_current(record_of(PILOT, 3), {"wandb": "own"}, best)
    shrunk = before.shrunk(1)
    assert shrunk == before.model_copy(update={"current": shrunk.current}) and shrunk.best == best


def test_a_checkpoints_record_does_not_count_on() -> None:
    current = record_of(PILOT, 1)
    saved = RunRecord(run="r", samples="s", micro_batch_size=2).with_current(current)
    current.add(8, 100, 0.5)
    assert saved.current is not None and saved.current.steps == 1
    ended = saved.next_phase("measured")
    assert ended.current is None and [phase.measured for phase in ended.phases] == ["measured"]
    assert saved.phases == [] and saved.current.measured is None


def test_the_summary_has_all_phases_and_what_was_measured_between_them(settings: dict) -> None:
    record = RunRecord(run="r", samples="s", micro_batch_size=2, before={"loss": 3.0})
    record = record.with_current(record_of(PILOT, 1)).next_phase(None).with_current(record_of(TRAIN, 2))
    read = RunRecord.model_validate(json.loads(json.dumps(record.model_dump())))
    assert read == record
    summary = summarize(parse_config(settings), World(0, 1, 0, 1), read, {"loss": 2.0}, {"train": 40})
    pilot, train = summary["phases"]
    assert list(train.items()) == [
        ("name", "train"),
        ("adapters", 1),
        ("trainable_parameters", 30),
        ("optimizer_bytes_per_rank", 240),
        ("base_bytes_per_rank", 900),
        ("adapter_bytes_per_rank", 60),
        ("micro_batch_size", 4),
        ("global_batch_size", 8),
        ("steps", 2),
        ("samples", 16),
        ("tokens", 200),
        ("seconds", 1.0),
        ("out_of_memory", 0),
        ("tokens_per_second", 200.0),
        ("mfu", None),
    ]
    assert list(pilot) == [*train, "measured"] and pilot["measured"] is None
    assert summary["metrics"] == {"before": {"loss": 3.0}, "after": {"loss": 2.0}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": 3}, "'run' is 3"),
        ({"micro_batch_size": True}, "'micro_batch_size' is True"),
        ({"phases": [{"name": "x\n"}]}, "'phases.0.adapters' is missing"),
        ({"before": {"a\nb": None}}, "'before.a\\nb' is None"),
        ({"current": record_of(TRAIN, 1).model_dump() | {"seconds": float("nan")}}, "'current.seconds' is nan"),
    ],
)
def test_what_is_no_record_is_said_in_one_line(changes: dict, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        RunRecord.model_validate({"run": "", "samples": "", "micro_batch_size": 2} | changes)
    assert first_problem(error.value) == said


def test_the_share_of_the_peak_is_a_mean_over_the_phases_seconds() -> None:
    record = record_of(PILOT, 0)
    assert record.mfu is None
    record.add(8, 100, 1.0, 3e12, 10e12)
    record.add(8, 100, 3.0, 3e12, 30e12)
    continued = PhaseRecord.of(PILOT, PhaseRecord.model_validate(record.model_dump()), 30, 240)
    assert continued.mfu == record.mfu == 6e12 / 40e12
