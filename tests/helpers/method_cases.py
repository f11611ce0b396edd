"""Two-rank cases of the methods: shared and masked adapters, scores, derivations, AdaLoRA. See cases.py."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import AutoTokenizer

from helpers.case_tools import (
    MODEL,
    OBJECTIVE,
    PAIRED,
    SAMPLES,
    WORLD,
    base_model,
    case,
    engine_settings,
    long_case,
    make_loop,
    plan_for,
    start_values,
)
from sparse_llm_ft.adapters import add_adapters, count_parameters, find_targets, trained_parameters
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import ModelConfig, parse_config
from sparse_llm_ft.config.derivation import DerivationSettings
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.phase import CutRule, Phase, ScoringSpec
from sparse_llm_ft.plan import AdapterPlan, IndexMask, group_name, module_kind
from sparse_llm_ft.scoring import Derivation
from sparse_llm_ft.training.callbacks import build_callback
from sparse_llm_ft.training.scorer import Scorer


def sparse_plan(model: torch.nn.Module) -> AdapterPlan:
    """q_proj and up_proj of both layers share; v_proj has masks; up_proj and v_proj have vectors; the rest is plain."""
    targets, plan = find_targets(model, "all-linear"), plan_for(model)
    modules = dict(plan.modules)
    for name, (rows, columns) in targets.items():
        if name.endswith(("q_proj", "up_proj")):
            modules[name] = replace(modules[name], group=group_name(module_kind(name), (rows, columns)))
        if name.endswith("v_proj"):
            kept = {"rows": IndexMask(rows, (0, rows - 1)), "cols": IndexMask(columns, tuple(range(1, columns, 2)))}
            modules[name] = replace(modules[name], **kept)
        if name.endswith(("up_proj", "v_proj")):
            modules[name] = replace(modules[name], train_vectors=True)
    return replace(plan, modules=modules)


@case
def shared_and_masked_adapters_train_alike_at_every_stage() -> None:
    """The losses of 8 steps at stages 0 to 3; a shared pair is one parameter of the optimizer."""
    losses = {}
    for stage in (0, 1, 2, 3):
        base = base_model()
        plan = sparse_plan(base)
        model = add_adapters(base, plan)
        start = start_values(model)
        engine = Engine(model, engine_settings(stage, 2))
        assert sum(v.numel() for v in engine.values().values()) == count_parameters(
            plan, find_targets(base, "all-linear")
        )
        engine.load(start)
        loop = make_loop(engine, plan, 2, Progress())
        losses[stage] = [step.loss for _, step in zip(range(8), loop.steps(), strict=False)]
        engine.close()
    for stage, values in losses.items():
        difference = max(abs(a - b) for a, b in zip(values, losses[0], strict=True))
        assert difference < (1e-4 if stage == 3 else 1e-5), (stage, difference)
    assert losses[0][-1] < losses[0][0]


def scorer(world: World, cache: str = "") -> Scorer:
    config = parse_config(
        {
            "model": {"name": MODEL, "dtype": "float32"},
            "task": {"name": "custom"},
            "output_dir": "x",
            "method": "lora_drop",
            "evaluation": {"micro_batch_size": 3},
        }
    )
    return Scorer(config, world, OBJECTIVE, Console(rank=1))


ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


@case
def lora_outputs_do_not_depend_on_the_world() -> None:
    """At stages 2 and 3, against all samples on each rank, and against ||delta W x||² by hand."""
    base = base_model()
    plan = plan_for(base)
    model = add_adapters(base, plan)
    start = start_values(model)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(start[name])
    alone = scorer(ALONE)
    alone._sum = lambda tensor: tensor
    expected = alone.lora_output(model, list(plan.active), SAMPLES)
    name = next(iter(plan.active))
    seen = []
    layer = model.get_base_model().get_submodule(name)
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    delta, by_hand = layer.get_delta_weight("default").detach(), 0.0
    with torch.no_grad():
        for sample in SAMPLES:
            OBJECTIVE.loss(model.eval(), OBJECTIVE.batch([sample]))
            by_hand += float((seen.pop() @ delta.T).double().square().sum())
    hook.remove()
    assert abs(expected[name] - by_hand / len(SAMPLES)) < 1e-5 * expected[name], (expected[name], by_hand)
    for stage in (2, 3):
        again = add_adapters(base_model(), plan)
        engine = Engine(again, engine_settings(stage, 2))
        engine.load(start)
        found = scorer(WORLD).lora_output(engine.module, list(plan.active), SAMPLES)
        for module, value in expected.items():
            assert abs(found[module] - value) <= 1e-5 * value, (stage, module, found[module], value)
        engine.close()


@case
def a_derivation_is_the_same_at_stages_2_and_3_and_for_every_world() -> None:
    """Ratios bit by bit, importance to rounding; under ZeRO-3 weights are gathered and ranks stay in step."""
    check_derivation("svd", (2,), False, 2)
    check_derivation("snip", (3,), True, 5, "joint")


@long_case
def a_derivation_is_the_same_at_every_stage_with_every_importance() -> None:
    for importance in ("svd", "snip", "imp"):
        for four_bit in (False, True):
            check_derivation(importance, (0, 1, 2, 3), four_bit, 2)
    for stage, importance, four_bit in ((3, "snip", False), (3, "svd", True), (3, "snip", True)):
        check_derivation(importance, (stage,), four_bit, 5)
    check_derivation("svd", (2, 3), False, 5, "joint")


def check_derivation(
    importance: str, stages: tuple[int, ...], four_bit: bool, step: int, derivation: str = "single"
) -> None:
    """Of each `step`-th module: all of them are of both layers, and the second ones are each kind once."""
    few = SAMPLES[:6]
    floor = 1.0 if derivation == "single" else 0.9995  # between none and all on this model
    settings = {"derivation": derivation, "importance": importance, "accuracy_floor": floor}
    settings |= {"floor_metric": "loss", "micro_batch_size": 4}
    measure = ScoringSpec("derivation", compare=True, derivation=DerivationSettings.model_validate(settings))
    plan = plan_for(base_model())
    modules = list(plan.active)[::step]
    expected: Derivation | None = None
    for stage in stages:
        dtype = "bfloat16" if four_bit else "float32"
        model = ModelConfig(name=MODEL, dtype=dtype, quantization="nf4" if four_bit else "none")
        engine = Engine(add_adapters(load_model(model), plan), engine_settings(stage, 2, dtype))
        if expected is None:
            alone = scorer(ALONE)
            alone._sum = lambda tensor: tensor
            expected = alone._derive(engine, measure, modules, few)
        found = scorer(WORLD)._derive(engine, measure, modules, few)
        assert found.ratios == expected.ratios, (stage, importance)
        assert 0 < sum(map(sum, found.ratios.values())) < 2 * len(modules)
        for name, scores in expected.importance.items():
            torch.testing.assert_close(found.importance[name].rows, scores.rows, rtol=1e-4, atol=1e-6)
        assert found.overlaps.keys() == expected.overlaps.keys() == {"svd-snip", "svd-imp", "snip-imp"}
        for pair, shares in expected.overlaps.items():  # the other two importances are the same but for near ties
            for name, both in shares.items():
                assert found.overlaps[pair][name] == pytest.approx(both, abs=0.15), (stage, pair, name)
        # Nothing is left behind: the engine trains on.
        loop = make_loop(engine, plan, 2, Progress())
        next(loop.steps())
        engine.close()


@case
def gradients_before_a_step_are_the_global_ones() -> None:
    """What AdaLoRA's allocation reads: the same at every stage, and the gradient of the global batch's mean loss."""
    found = {}
    for stage in (0, 1, 2, 3):
        base = base_model()
        plan = plan_for(base)
        model = add_adapters(base, plan)
        start = start_values(model)
        engine = Engine(model, engine_settings(stage, 2))
        engine.load(start)
        loop = make_loop(engine, plan, 2, Progress())
        kept: dict[str, torch.Tensor] = {}

        class Reader:
            reads: ClassVar[list[str]] = []
            needs_gradients = True

            def may_change(self, step: int) -> bool:
                return True

            def after_step(self, engine: Engine, step: int, values: dict, gradients: dict) -> dict:
                kept.update(copy.deepcopy(gradients))  # noqa: B023
                return {}

            def active_adapters(self, engine: Engine) -> int:
                return 1

        loop.callback = Reader()
        next(loop.steps())
        found[stage] = kept
        engine.close()
    base = base_model()
    model = add_adapters(base, plan_for(base))
    parameters = trained_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    chosen = [SAMPLES[loop.sampler.index(i)] for i in range(8)]
    (OBJECTIVE.loss(model, OBJECTIVE.batch(chosen)) / sum(s.supervised for s in chosen)).backward()
    for stage, gradients in found.items():
        for name, parameter in parameters.items():
            message = f"stage {stage}, {name}"
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=message)


@case
def cutting_omega_ahead_of_the_device_changes_nothing() -> None:
    """Steps before the first cut, and between two cuts, begin before the host has read the omegas."""
    rule = CutRule(keep=3, steps=9, every=2, after=3)
    for stage, dtype in PAIRED:
        found: list[tuple[list[object], dict[str, torch.Tensor]]] = []
        for ahead in (False, True):
            base = base_model(getattr(torch, dtype))
            plan = plan_for(base, train_omega=True)
            model = add_adapters(base, plan)
            start = start_values(model)
            engine = Engine(model, engine_settings(stage, 2, dtype), plan)
            engine.load(start)
            state = TrainState({}, {}, {}, Progress(), {})
            callback = build_callback(Phase("select", plan, steps=9, cut=rule), state, engine)
            loop = make_loop(engine, plan, 2, Progress(), callback)
            loop.phase, loop.runs_ahead = replace(loop.phase, steps=9), ahead
            steps = [(step.loss, step.active_adapters, step.callback) for step in loop.steps(lambda _: False)]
            now = engine.begin_read(callback.reads)
            engine.load({name: torch.full((1,), 9.0) for name in callback.reads})
            values = now()
            assert set(map(float, engine.values(callback.reads).values())) == {9.0}
            found.append((steps, values))
            engine.close()
        (expected, values), (steps, others) = found
        assert steps == expected and len(steps) == 9, (stage, dtype)
        assert [active for _, active, _ in steps[:4]] == [len(plan.modules)] * 4 and steps[4][1] == 3, stage
        assert others == values and sum(float(value) > 0 for value in values.values()) == 3


@case
def lora_plus_groups_are_those_of_peft() -> None:
    from peft.optimizers import create_loraplus_optimizer

    base = base_model()
    model = add_adapters(base, replace(plan_for(base), tuner="lora"))
    reference = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    expected = {id(p): group["lr"] for group in reference.param_groups for p in group["params"]}
    settings = replace(engine_settings(0, 2), lora_b_lr_factor=16.0)
    engine = Engine(model, settings)
    loop = make_loop(engine, plan_for(base_model()), 2, Progress())
    loop.schedule = replace(loop.schedule, settings=loop.schedule.settings.model_copy(update={"warmup_steps": 0}))
    next(loop.steps())
    found = {id(p): group["lr"] for group in engine._optimizer.param_groups for p in group["params"]}
    assert found == expected
    engine.close()


@case
def what_is_trained_whole_has_a_rate_of_its_own() -> None:
    base = base_model()
    plan = replace(plan_for(base), trained=("model.norm",))
    for stage in (2, 3):
        model = add_adapters(base if stage == 2 else base_model(), plan)
        engine = Engine(model, replace(engine_settings(stage, 2), head_lr_factor=4.0), plan)
        rate = next(make_loop(engine, plan, 2, Progress()).steps()).learning_rate
        rates = {group["name"]: group["lr"] for group in engine._optimizer.param_groups}
        assert rates == {"adapter": rate, "whole": 4.0 * rate} and rate > 0
        engine.close()


@case
def every_rank_draws_the_same_masks() -> None:
    """Also from a derivation that only rank 0 has in its cache."""
    from sparse_llm_ft.distributed.collectives import broadcast_bytes

    tokens = AutoTokenizer.from_pretrained(MODEL)("anna buys")["input_ids"]
    sent = broadcast_bytes(bytes(tokens) if WORLD.rank == 0 else b"")
    assert list(sent) == tokens
    assert broadcast_bytes(b"") == b""
