"""Learning rates against transformers' schedules, and the length of a run."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.training.schedule import Schedule


def rates(schedule: Schedule, steps: int, global_batch_size: int) -> list[float]:
    return [schedule.learning_rate(Progress(step, step * global_batch_size)) for step in range(steps)]


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_after_the_warm_up_the_rates_are_those_of_transformers(kind: str, reference) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    scheduler = reference(optimizer, num_warmup_steps=4, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    settings = TrainingConfig(learning_rate=0.3, warmup_steps=4, max_steps=20, schedule=kind)
    ours = rates(Schedule(settings, 100), 20, 16)
    assert ours[4:] == pytest.approx(expected[4:])
    # The rise has the full rate in its last step and, unlike transformers', is not 0 in its first.
    assert ours[:4] == pytest.approx([0.075, 0.15, 0.225, 0.3])


def test_constant_stays() -> None:
    settings = TrainingConfig(learning_rate=0.3, warmup_steps=1, max_steps=5, schedule="constant")
    assert rates(Schedule(settings, 10), 5, 16) == [0.3] * 5


def test_epochs_count_samples_so_a_grown_batch_shortens_the_run_without_bending_the_curve() -> None:
    settings = TrainingConfig(learning_rate=1.0, epochs=2, global_batch_size=10)
    schedule = Schedule(settings, train_samples=48)
    assert schedule.total_steps == 10  # 96 samples
    assert not schedule.finished(Progress(9, 90)) and schedule.finished(Progress(10, 100))
    assert schedule.finished(Progress(4, 96))
    assert schedule.learning_rate(Progress(2, 50)) == schedule.learning_rate(Progress(5, 50))


@pytest.mark.parametrize(("epochs", "samples", "steps"), [(0.07, 100, 7), (1.1, 10, 11), (0.071, 100, 8), (2.0, 5, 10)])
def test_a_part_of_an_epoch_has_no_step_more_for_a_rounding_error(epochs: float, samples: int, steps: int) -> None:
    assert Schedule(TrainingConfig(epochs=epochs, global_batch_size=1), samples).total_steps == steps


def test_between_steps_the_warm_up_never_exceeds_the_full_rate() -> None:
    """A grown global batch ends at positions between those of the initial one."""
    schedule = Schedule(TrainingConfig(learning_rate=1.0, warmup_steps=4, global_batch_size=8), train_samples=800)
    assert schedule.learning_rate(Progress(3, 28)) == 1.0
    assert schedule.last_step(Progress(3, 32), 64) == 3 + 12


def test_max_steps_counts_steps() -> None:
    schedule = Schedule(TrainingConfig(max_steps=7, global_batch_size=10), train_samples=48)
    assert schedule.total_steps == 7
    assert not schedule.finished(Progress(6, 6000)) and schedule.finished(Progress(7, 70))
