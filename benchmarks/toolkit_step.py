"""A training step of this toolkit, through its own engine and loop. `gpu/speed.py` and `compare.py` share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft_steps import System
from watching import BACKWARD, DATA, FORWARD, UPDATE, Meter

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.data.samples import Pack, Sample
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.settings import EngineSettings
from sparse_llm_ft.objectives.base import Forward
from sparse_llm_ft.objectives.language_modeling import CompletionObjective
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.training.callbacks import build_callback
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.prefix_cache import open_prefix
from sparse_llm_ft.training.schedule import Schedule


@dataclass(frozen=True, eq=False)
class WatchedObjective(CompletionObjective):
    """The run's objective, which tells the meter when the data and the forward pass begin and end."""

    meter: Meter = field(default_factory=Meter)

    def batch(self, samples: Sequence[Sample] | Sequence[Pack]) -> Batch:
        """See `CompletionObjective.batch`."""
        with self.meter.part(DATA):
            return super().batch(samples)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """See `CompletionObjective.loss`."""
        with self.meter.part(FORWARD):
            return super().loss(forward, batch)


class WatchedEngine(Engine):
    """The run's engine, which tells the meter when backward passes and updates begin and end."""

    meter = Meter()

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine.backward`."""
        with self.meter.part(BACKWARD):
            super().backward(loss)

    def step(self, learning_rate: float) -> None:
        """See `Engine.step`."""
        with self.meter.part(UPDATE):
            super().step(learning_rate)

    def gradient_tensors(self) -> list[torch.Tensor]:
        """The gradients at the end of a backward pass, wherever DeepSpeed has put them, each once."""
        found = [p.grad for p in self.parameters.values()]
        found += [master.grad for _, master in self._shards.masters]
        for group in getattr(self._wrapped, "averaged_gradients", {}).values():
            found += group or []
        once = {tensor.data_ptr(): tensor for tensor in found if tensor is not None}
        return list(once.values())


def loop_step(
    model: PeftModel,
    phase: Phase,
    samples: Sequence[Sample],
    settings: EngineSettings,
    training: TrainingConfig,
    world: World,
    meter: Meter,
) -> System:
    """Collective. A step of `watched_loop`, as many as one likes."""
    loop = watched_loop(model, phase, samples, settings, training, world, meter)
    steps = loop.steps(at_once=lambda _: False)  # as between two saves
    engine = loop.engine
    assert isinstance(engine, WatchedEngine)
    return System(lambda: next(steps).loss, model, engine.gradient_tensors, engine.optimizer_bytes)


def watched_loop(
    model: PeftModel,
    phase: Phase,
    samples: Sequence[Sample],
    settings: EngineSettings,
    training: TrainingConfig,
    world: World,
    meter: Meter,
) -> Loop:
    """Collective. The run's loop on `phase`, around a new engine.

    Args:
        phase: with its batch sizes.
        samples: an epoch.
        training: whose `max_steps` is large.
    """
    engine = WatchedEngine(model, settings, phase.plan)
    engine.meter = meter
    progress = Progress()
    loop = Loop(
        engine,
        phase,
        build_callback(phase, TrainState({}, {}, {}, progress, {}), engine),
        samples,
        WatchedObjective(pad_token_id=0, keeps_logits=True, meter=meter),
        Schedule(training, len(samples)),
        progress,
        world,
        seed=0,
        max_skipped_updates=0,
    )
    loop.prefix = open_prefix(loop, training, print)
    return loop
