"""Two-rank cases of gradients in one tensor per group: they and the updates are those of DeepSpeed's own path."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.case_tools import OBJECTIVE, SAMPLES, WORLD, base_model, case, engine_settings, plan_for, start_values
from sparse_llm_ft.adapters import add_adapters
from sparse_llm_ft.engine.engine import Engine

OWN = {"zero_optimization": {"reduce_bucket_size": 10**8}}
"""Leaves gradients to DeepSpeed, and says what it does anyway."""


class Collectives(TorchDispatchMode):
    """Counts calls by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


@case
def flat_gradients_are_deepspeeds_own_and_are_averaged_once_a_step() -> None:
    """Two steps of four micro-steps, of which each rank has other samples. One adapter gets no gradient, as a module
    that is not used: it has zeros, and only its weight decays.
    """
    for stage, dtype in ((1, "float32"), (2, "float32"), (2, "bfloat16")):
        (ours, calls), (theirs, _) = (two_steps(stage, dtype, extra) for extra in ({}, OWN))
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        for expected, found in zip(theirs, ours, strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=f"{stage} {name}")
        unused = [name for name in ours[0] if ".0.self_attn.q_proj.lora_B" in name]
        assert unused and not ours[0][unused[0]].any() and any(ours[0][name].any() for name in ours[0])
        # For each step and group (adapters, omegas) one; the norm, and the updated weights.
        counts = {name: count for name, count in calls.items() if name.startswith(("reduce_scatter", "allreduce"))}
        assert sum(counts.values()) == 2 * (2 + 1) and counts["allreduce"] == 2, calls


def two_steps(stage: int, dtype: str, extra: dict[str, object]) -> tuple[list[dict[str, torch.Tensor]], Counter[str]]:
    """The gradients of the second step, and the values after it; the collectives of both steps."""
    base = base_model(getattr(torch, dtype))
    model = add_adapters(base, plan_for(base, train_omega=True))
    start = start_values(model)
    base.model.layers[0].self_attn.q_proj._disable_adapters = True
    settings = replace(engine_settings(stage, 1, dtype), extra=extra)
    engine = Engine(model, settings)
    engine.load(start)
    assert (engine._flat is None) == bool(extra)
    seen, gradients = Collectives(), {}
    for step in range(2):
        for micro in range(settings.accumulation_steps):
            at = (settings.accumulation_steps * step + micro) * WORLD.size + WORLD.rank
            with seen:
                engine.backward(OBJECTIVE.loss(engine.forward, OBJECTIVE.batch(SAMPLES[at : at + 1])))
            if step == 1 and micro == settings.accumulation_steps - 1:
                gradients = engine.gradients()
            with seen:
                engine.step(1e-2)
    values = engine.values()
    for name, parameter in engine.parameters.items():  # the model has what the optimizer made
        assert torch.equal(parameter.detach(), values[name].to(parameter.dtype)), (stage, name)
    changed = [name for name in values if not torch.equal(values[name], start[name].to(parameter.dtype).float())]
    assert len(changed) == len(values) - 1, "all but the omega of the unused adapter, which does not decay"
    engine.close()
    return [gradients, values], seen.calls


@case
def flat_gradients_exist_from_a_steps_first_backward_pass_to_its_update() -> None:
    base = base_model()
    model = add_adapters(base, plan_for(base))
    engine = Engine(model, engine_settings(2, 2))
    engine.load(start_values(model))
    batch = OBJECTIVE.batch(SAMPLES[:2])
    trained = sum(parameter.numel() for parameter in engine.parameters.values())
    for _ in range(2):
        assert all(parameter.grad is None for parameter in engine.parameters.values())
        loss = OBJECTIVE.loss(engine.forward, batch)
        assert all(parameter.grad is None for parameter in engine.parameters.values())
        engine.backward(loss)
        storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage() for p in engine.parameters.values()}
        (whole,) = storages.values()
        assert 0 <= whole.nbytes() - 4 * trained < 64
        alive = StorageWeakRef(whole)
        del storages, whole
        engine.step(1e-2)
        engine.backward(OBJECTIVE.loss(engine.forward, batch))
        assert alive.expired() and all(parameter.grad is None for parameter in engine.parameters.values())
        (own,) = engine._flat_gradients()
        assert 0 <= own.untyped_storage().nbytes() - 4 * trained / WORLD.size < 64
        alive = StorageWeakRef(own.untyped_storage())
        del own
        engine.step(1e-2)
        assert alive.expired()
    engine.close()
