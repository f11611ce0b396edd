"""Two-rank cases of a rank that runs out of memory while the other does not. See cases.py."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from helpers.case_tools import WORLD, base_model, case, engine_settings, make_loop, plan_for, start_values
from helpers.starving import starving
from sparse_llm_ft.adapters import add_adapters
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.memory_guard import MemoryGuard
from sparse_llm_ft.training.loop import Loop


def begin(stage: int, dtype: str, guarded: bool, ahead: bool = False) -> tuple[Engine, Loop]:
    base = base_model(getattr(torch, dtype))
    plan = plan_for(base, lora_dropout=0.2)
    model = add_adapters(base, plan)
    start = start_values(model)
    engine = Engine(model, engine_settings(stage, 2, dtype), plan)
    engine.load(start)
    loop = make_loop(engine, plan, 2, Progress())
    loop.guard, loop.runs_ahead = MemoryGuard(engine) if guarded else None, ahead
    return engine, loop


@case
def guarded_passes_train_bit_for_bit_as_others_at_stages_0_to_2() -> None:
    for stage, dtype in ((0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32")):
        found = []
        for guarded in (False, True):
            engine, loop = begin(stage, dtype, guarded)
            losses = [step.loss for _, step in zip(range(4), loop.steps(), strict=False)]
            found.append((losses, engine.values()))
            engine.close()
        (plain_losses, plain), (losses, values) = found
        assert losses == plain_losses, (stage, dtype, losses, plain_losses)
        assert all(torch.equal(value, plain[name]) for name, value in values.items()), (stage, dtype)


@case
def a_step_that_one_rank_cannot_make_changes_nothing_on_any_rank() -> None:
    """Not even where the next step has begun before anyone knows: its update is not made either."""
    cases = (
        (0, "float32", "forward"),
        (0, "bfloat16", "backward"),
        (1, "float32", "backward"),
        (2, "float32", "backward"),
    )
    for stage, dtype, where in cases:
        engine, loop = begin(stage, dtype, guarded=True)
        for _ in zip(range(2), loop.steps(), strict=False):
            pass
        expected, moments, steps = engine.values(), engine.moments(), engine.optimizer_steps()
        engine.close()
        for ahead in (False, True):  # which matters on a GPU alone, if not set
            engine, loop = begin(stage, dtype, guarded=True, ahead=ahead)
            with starving(where, (3,)) if WORLD.rank == 1 else nullcontext():
                made = [step.loss for step in loop.steps(lambda _: False)]
            assert len(made) == loop.progress.step == 2 and loop.out_of_memory, (stage, where, ahead, made)
            assert loop.progress.samples == 16 and loop.progress.phase_updates == 2
            assert engine.optimizer_steps() == steps, (stage, where, ahead)
            found = engine.values(), engine.moments()
            assert all(torch.equal(value, expected[name]) for name, value in found[0].items()), (stage, where, ahead)
            assert all(torch.equal(found[1][n][k], moments[n][k]) for n in moments for k in moments[n])
            engine.close()
