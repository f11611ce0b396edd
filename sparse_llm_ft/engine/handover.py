"""Between a state, which holds kept rows and columns only, and an engine, which knows its parameters as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sparse_llm_ft.adapters.masking import optimizer_masks, to_kept, to_whole
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.optim import Mask
from sparse_llm_ft.plan import AdapterPlan

Tensors = dict[str, torch.Tensor]
Moments = dict[str, Tensors]


def masks_of(plan: AdapterPlan) -> dict[str, Mask]:
    """The masks that an engine for this plan needs, by short parameter name."""
    return dict(optimizer_masks(plan))


def load_state(engine: Engine, plan: AdapterPlan, state: TrainState) -> None:
    """Set the engine to `state`, which is of `plan`."""
    moments = _each_moment(state.moments, lambda tensors: to_whole(plan, tensors))
    engine.load(to_whole(plan, state.tensors), moments, state.optimizer_steps)


def read_state(engine: Engine, plan: AdapterPlan) -> tuple[Tensors, Moments]:
    """Values and moments of the engine, which trains `plan`."""
    return to_kept(plan, engine.values()), _each_moment(engine.moments(), lambda tensors: to_kept(plan, tensors))


def _each_moment(moments: Mapping[str, Tensors], convert: Callable[[Tensors], Tensors]) -> Moments:
    return {
        name: {key: convert({name: tensor})[name] for key, tensor in entry.items()} for name, entry in moments.items()
    }
