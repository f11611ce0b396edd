"""Two-rank cases of masks that live in the sharded optimizer. See cases.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from helpers.case_tools import (
    OBJECTIVE,
    PAIRED,
    PRODUCT,
    SAMPLES,
    TRAINING,
    WORLD,
    base_model,
    case,
    engine_settings,
    long_case,
    make_loop,
    plan_for,
    start_values,
)
from helpers.method_cases import scorer, sparse_plan
from sparse_llm_ft.adapters import (
    add_adapters,
    count_parameters,
    count_stored_parameters,
    find_targets,
    trained_parameters,
)
from sparse_llm_ft.adapters.convert import full_pair
from sparse_llm_ft.adapters.masking import optimizer_masks, to_compact
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.methods.adalora import AdaLoraSchedule, adalora_plan
from sparse_llm_ft.methods.masking import random_entries
from sparse_llm_ft.methods.method import MethodInputs
from sparse_llm_ft.optim import EntryMask
from sparse_llm_ft.plan import AdapterPlan, IndexMask

# At case_tools' rate Adam makes of rounding, in entries whose gradient is almost 0, a difference of 3e-5 in 30 steps.
LONG = TRAINING.model_copy(update={"learning_rate": 0.003, "max_steps": 30})
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def masked(plan: AdapterPlan, shapes: dict[str, tuple[int, int]]) -> AdapterPlan:
    """Every second column and two of three rows of every adapter."""
    modules = {
        name: replace(
            a,
            rows=IndexMask(d_out, tuple(i for i in range(d_out) if i % 3)),
            cols=IndexMask(d_in, (*range(1, d_in, 2),)),
        )
        for name, a in plan.active.items()
        for d_out, d_in in [shapes[name]]
    }
    return replace(plan, modules=modules, masking="optimizer")


def train(plan: AdapterPlan, stage: int, start: TrainState, extra: dict | None = None) -> tuple:
    """Losses and gradient norms of 30 steps, and the trained state."""
    settings = replace(engine_settings(stage, 2), extra=extra or {})
    engine = Engine(add_adapters(base_model(), plan), settings, plan)
    engine.load_state_dict(start.engine_state)
    taken = list(make_loop(engine, plan, 2, Progress(), training=LONG).steps())
    assert len(taken) == LONG.max_steps
    state = engine.state_dict()
    engine.close()
    return [step.loss for step in taken], [step.grad_norm for step in taken], state["tensors"], state["moments"]


def start_of(plan: AdapterPlan) -> TrainState:
    values = start_values(add_adapters(base_model(), replace(plan, masking="compact")))
    return TrainState(values, {}, {}, Progress(), {})


@case
def both_homes_of_masks_agree() -> None:
    """Losses and delta W of 30 steps, shared adapters among them, clipping and weight decay on (1e-5, float32)."""
    check_homes(((2, {}), (3, OFFLOADED)), ("optimizer",))


@long_case
def both_homes_of_masks_agree_at_every_stage_with_and_without_offload() -> None:
    where = ((0, {}), (1, {}), (2, {}), (3, {}), (1, OFFLOADED), (2, OFFLOADED), (3, OFFLOADED))
    check_homes(where, ("compact", "optimizer"))


def check_homes(where: tuple, homes: tuple[str, ...]) -> None:
    """Against masks in the layers at stage 0."""
    compact = sparse_plan(base_model())
    start = start_of(compact)
    losses, norms, values, moments = train(compact, 0, start)
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.3, (
        f"nothing is learned: the comparison would show nothing ({losses})"
    )
    assert max(norms) > TRAINING.max_grad_norm, "nothing is clipped: norms over other entries would go unnoticed"
    deltas = {name: torch.matmul(*reversed(full_pair(name, compact, values))) for name in compact.active}
    for stage, extra in where:
        for plan in (replace(compact, masking=home) for home in homes):
            other, other_norms, trained, other_moments = train(plan, stage, start, extra)
            at = (stage, plan.masking, extra)
            assert max(abs(a - b) for a, b in zip(losses, other, strict=True)) < 1e-5, at
            assert max(abs(a - b) for a, b in zip(norms[:5], other_norms[:5], strict=True)) < 1e-5, at
            for name, delta in deltas.items():
                found = torch.matmul(*reversed(full_pair(name, plan, trained)))
                assert (found - delta).abs().max() < 1e-5, (at, name)
            assert {n: {k: t.shape for k, t in m.items()} for n, m in other_moments.items()} == {
                n: {k: t.shape for k, t in m.items()} for n, m in moments.items()
            }


@case
def masked_entries_never_change_and_have_no_moments() -> None:
    """Bytes from the live tensors: 8 for a kept entry of the shard, 4 for its index, 4 for each entry of the master."""
    check_masked_entries(((0, "float32"), *PAIRED))  # the one without a master beside the other four


@long_case
def masked_entries_never_change_at_every_stage_in_every_dtype() -> None:
    check_masked_entries(PRODUCT)


def check_masked_entries(where: Sequence[tuple[int, str]]) -> None:
    base = base_model()
    targets = find_targets(base, "all-linear")
    plan = masked(plan_for(base), targets)
    trained, stored = count_parameters(plan, targets), count_stored_parameters(plan, targets)
    assert trained < 0.6 * stored
    for stage, dtype in where:
        ranks = WORLD.size if stage else 1
        model = add_adapters(base_model(getattr(torch, dtype)), plan)
        engine = Engine(model, engine_settings(stage, 2, dtype), plan)
        before = engine.values()
        for _ in zip(range(3), make_loop(engine, plan, 2, Progress()).steps(), strict=False):
            pass
        after, moments = engine.values(), engine.moments()
        check_untouched(plan, before, after, moments)
        masters = 0 if stage == 0 and dtype == "float32" else 4 * stored
        expected = (masters + (8 + 4) * trained) / ranks
        # A rank's share of kept entries is not exactly a half: a mask keeps more of one parameter than of another.
        assert abs(engine.optimizer_bytes() - expected) < 0.05 * expected, (stage, dtype, expected)
        kept = sum(map(len, engine._optimizer.kept.values()))
        total = torch.tensor([kept])
        torch.distributed.all_reduce(total)
        assert int(total) == trained * (WORLD.size if ranks == 1 else 1)
        for state in engine._optimizer.state.values():
            assert {key for key, t in state.items() if t.numel() > 1} <= {"exp_avg", "exp_avg_sq"}
        engine.close()


def check_untouched(plan: AdapterPlan, before: dict, after: dict, moments: dict) -> None:
    """Outside the kept rows and columns: the initial values, bit for bit (weight decay is on), and no moments."""
    for name, value in after.items():
        mask = optimizer_masks(plan)[name]
        kept = torch.zeros(value.numel(), dtype=torch.bool)
        kept[mask.indices(0, value.numel())] = True
        kept = kept.view(value.shape)
        assert torch.equal(value[~kept], before[name][~kept]) and not value[~kept].any(), name
        assert not moments[name]["exp_avg"][~kept].any() and not moments[name]["exp_avg_sq"][~kept].any()
        assert moments[name]["exp_avg_sq"][kept].any(), name
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(changed) == len(after)


@long_case
def element_wise_masks_work_on_every_tuner_of_peft() -> None:
    """LoRA, DoRA and AdaLoRA under entry masks: as torch's AdamW on everything, with masked entries put back."""
    base = base_model()
    plain = plan_for(base)
    ada = adalora_plan(plain, AdaLoraSchedule(target_r=2), MethodInputs(4, 8.0, 0, 20))
    for plan in (replace(plain, tuner="lora"), replace(plain, tuner="dora"), ada):
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(1)
        reference = add_adapters(base_model(), plan)
        shapes = {name: p.shape for name, p in trained_parameters(reference).items()}
        masks = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}
        start = {
            n: p.detach() + 0.1 * torch.rand(p.shape, generator=generator)
            for n, p in trained_parameters(reference).items()
        }
        expected = dense_reference(plan, start, masks)
        for stage in (0, 2) if plan.tuner != "lora" else (0, 1, 2, 3):
            entries = {name: EntryMask(mask) for name, mask in masks.items()}
            engine = Engine(add_adapters(base_model(), plan), engine_settings(stage, 2), masks=entries)
            engine.load(start)
            for _ in zip(range(5), make_loop(engine, replace(plan, options={}), 2, Progress()).steps(), strict=False):
                pass
            for name, value in engine.values().items():
                assert torch.equal(value[~masks[name]], start[name][~masks[name]]), (stage, plan.tuner, name)
                message = f"stage {stage}, {plan.tuner}, {name}"
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=message)
                assert torch.equal(value, start[name]) == (not masks[name].any()), message
            engine.close()


def dense_reference(plan: AdapterPlan, start: dict, masks: dict) -> dict[str, torch.Tensor]:
    """AdapterOptimizer without masks, at stage 0: gradients of masked entries are zeroed before the norm is taken, and
    their values put back after each step.
    """
    engine = Engine(add_adapters(base_model(), plan), engine_settings(0, 2))
    engine.load(start)
    hooks = [p.register_hook(lambda g, m=masks[name]: g * m) for name, p in engine.parameters.items()]
    loop = make_loop(engine, replace(plan, options={}), 2, Progress())
    for _ in zip(range(5), loop.steps(), strict=False):
        for name, parameter in engine.parameters.items():
            parameter.data[~masks[name]] = start[name][~masks[name]]
    for hook in hooks:
        hook.remove()
    values = engine.values()
    engine.close()
    return values


@case
def a_masked_state_is_the_kept_rows_and_columns_alone() -> None:
    """What is written down at stage 2 goes on at stage 3 and in compact layers with the same losses."""
    base = base_model()
    plan = masked(plan_for(base), find_targets(base, "all-linear"))
    start = start_of(plan)
    engine = Engine(add_adapters(base_model(), plan), engine_settings(2, 2), plan)
    engine.load_state_dict(start.engine_state)
    for _ in zip(range(4), make_loop(engine, plan, 2, Progress()).steps(), strict=False):
        pass
    trained = engine.state_dict()
    tensors, moments = trained["tensors"], trained["moments"]
    assert sum(t.numel() for t in tensors.values()) == count_parameters(plan, find_targets(base, "all-linear"))
    assert all(t.shape == tensors[n].shape for n, entry in moments.items() for t in entry.values())
    assert to_compact(plan, engine.values()).keys() == tensors.keys()
    state = TrainState(**trained, progress=Progress(4, 32), phase={})
    losses = []
    for engine_plan, stage in ((plan, 2), (plan, 3), (replace(plan, masking="compact"), 1)):
        engine.close()
        engine = Engine(add_adapters(base_model(), engine_plan), engine_settings(stage, 2), engine_plan)
        engine.load_state_dict(state.engine_state)
        loop = make_loop(engine, engine_plan, 2, Progress(4, 32))
        losses.append([step.loss for _, step in zip(range(4), loop.steps(), strict=False)])
    engine.close()
    for other in losses[1:]:
        assert max(abs(a - b) for a, b in zip(losses[0], other, strict=True)) < 1e-4, losses


@case
def an_update_with_gradients_that_are_not_finite_is_not_made() -> None:
    """At every stage: values, moments and step counts stay, and training goes on."""
    check_not_finite(PAIRED)


@long_case
def an_update_that_is_not_finite_is_not_made_at_every_stage_in_every_dtype() -> None:
    check_not_finite(PRODUCT)


def check_not_finite(where: Sequence[tuple[int, str]]) -> None:
    for stage, dtype in where:
        base = base_model(getattr(torch, dtype))
        plan = plan_for(base)
        engine = Engine(add_adapters(base, plan), engine_settings(stage, 4, dtype))
        loop = make_loop(engine, plan, 4, Progress())
        next(loop.steps())
        before, moments, counts = engine.values(), engine.moments(), engine.optimizer_steps()
        batch = loop.objective.batch(loop.samples[:4])
        loss = loop.objective.loss(engine.forward, batch)
        engine.backward(loss * (float("nan") if WORLD.rank == 1 else 1.0))  # one rank's loss alone
        engine.step(0.1)
        assert not torch.isfinite(engine.norm), (stage, dtype)
        assert all(torch.equal(value, before[name]) for name, value in engine.values().items()), (stage, dtype)
        assert all(torch.equal(t, moments[n][k]) for n, m in engine.moments().items() for k, t in m.items())
        assert engine.optimizer_steps() == counts
        next(loop.steps())
        assert engine.optimizer_steps() == {"adapter": 2}, (stage, dtype)
        assert not all(torch.equal(value, before[name]) for name, value in engine.values().items())
        engine.close()


@case
def scores_of_entries_are_those_of_autograd_on_all_samples() -> None:
    """At stages 0 to 3 on two ranks, the last global batch incomplete; nothing is updated, and the engine trains on."""
    base = base_model()
    plan = plan_for(base)
    model = add_adapters(base, plan)
    start = start_values(model)
    parameters = trained_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    OBJECTIVE.loss(model.eval(), OBJECTIVE.batch(SAMPLES)).backward()
    expected = {name: (parameter.grad * parameter).abs().detach() for name, parameter in parameters.items()}
    for stage in (0, 1, 2, 3):
        engine = Engine(add_adapters(base_model(), plan), engine_settings(stage, 2), plan)
        engine.load(start)
        found = scorer(WORLD).entries(engine, SAMPLES)
        assert found.samples == len(SAMPLES) and found.values.keys() == expected.keys()
        for name, values in found.values.items():
            scale = float(expected[name].max())
            torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-5 * scale, msg=f"{stage}, {name}")
        assert all(torch.equal(value, start[name]) for name, value in engine.values().items())
        assert not any(m.any() for entry in engine.moments().values() for m in entry.values())
        assert set(engine.optimizer_steps().values()) == {0}
        assert next(make_loop(engine, plan, 2, Progress()).steps()).skipped is False
        engine.close()


@case
def single_entries_that_a_plan_masks_never_change_and_have_no_moments() -> None:
    """What is written down at stage 2 goes on at stage 3 with the same losses."""
    base = base_model()
    targets = find_targets(base, "all-linear")
    plan = random_entries(plan_for(base), targets, 0.4, 0)
    losses, state = [], None
    for stage in (2, 0, 3):
        engine = Engine(add_adapters(base_model(), plan), engine_settings(stage, 2), plan)
        if state is None:
            before = engine.values()
            for _ in zip(range(4), make_loop(engine, plan, 2, Progress()).steps(), strict=False):
                pass
            check_untouched(plan, before, engine.values(), engine.moments())
            kept = sum(map(len, engine._optimizer.kept.values()))
            total = torch.tensor([kept])
            torch.distributed.all_reduce(total)
            assert int(total) == count_parameters(plan, targets) < 0.5 * count_stored_parameters(plan, targets)
            state = TrainState(**engine.state_dict(), progress=Progress(4, 32), phase={})
        engine.load_state_dict(state.engine_state)
        loop = make_loop(engine, plan, 2, Progress(4, 32))
        losses.append([step.loss for _, step in zip(range(4), loop.steps(), strict=False)])
        engine.close()
    for other in losses[1:]:
        assert max(abs(a - b) for a, b in zip(losses[0], other, strict=True)) < 1e-4, losses
