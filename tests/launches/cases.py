"""Cases that need two ranks; all run inside one launch, since starting one costs more than all of them.

    deepspeed --num_gpus 2 tests/launches/cases.py [long] MODEL_FOLDER RESULTS_JSON

Rank 0 writes case name -> "passed" or a traceback. A rank that fails ends the launch, so that no other one waits.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

sys.path.append(str(Path(__file__).parent.parent))

from helpers import (  # noqa: F401  (register their cases)
    evaluation_cases,
    flat_gradient_cases,
    mask_cases,
    memory_cases,
    method_cases,
    prefix_cases,
    rebuild_cases,
    sharded_step_cases,
    sharding_cases,
    table_cases,
)
from helpers.case_tools import (
    CASES,
    LONG_CASES,
    MODEL,
    OBJECTIVE,
    PAIRED,
    PLAIN,
    PRODUCT,
    RESULTS,
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
from sparse_llm_ft.adapters import SparseLoraConfig, SparseLoraLayer, count_parameters, find_targets, is_omega
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import ModelConfig, parse_config
from sparse_llm_ft.data.sampler import ShuffledSampler
from sparse_llm_ft.distributed.world import prepare_cpu
from sparse_llm_ft.engine.engine import Engine, init_distributed
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.plan import AdapterPlan
from sparse_llm_ft.training.callbacks import build_callback
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.schedule import Schedule


@functools.cache
def run_losses(
    stage: int, micro: int, steps: int = 20, lora_dropout: float = 0.0, round_robin: bool = False
) -> list[float]:
    model = base_model()
    plan = plan_for(model, lora_dropout=lora_dropout)
    peft_model = get_peft_model(model, SparseLoraConfig(plan=plan))
    start = start_values(peft_model)
    zero = {"zero_optimization": {"round_robin_gradients": True}} if round_robin else {}
    engine = Engine(peft_model, replace(engine_settings(stage, micro), extra=zero))
    engine.load(start)
    loop = make_loop(engine, plan, micro, Progress())
    losses = [step.loss for _, step in zip(range(steps), loop.steps(), strict=False)]
    engine.close()
    return losses


def reference_losses(steps: int = 20) -> list[float]:
    """Stock PEFT LoRA, torch's AdamW, the whole global batch in one process, no DeepSpeed."""
    model = base_model()
    names = list(find_targets(model, "all-linear"))
    start = start_values(get_peft_model(base_model(), SparseLoraConfig(plan=plan_for(model))))
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0))
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(start[short])
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.1)
    schedule, stream, losses = Schedule(TRAINING, len(SAMPLES)), ShuffledSampler(len(SAMPLES), 3), []
    for step in range(steps):
        chosen = [SAMPLES[stream.index(i)] for i in range(8 * step, 8 * step + 8)]
        loss = PLAIN.loss(lora, PLAIN.batch(chosen)) / sum(s.supervised for s in chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, TRAINING.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(Progress(step, 8 * step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def assert_close(ours: list[float], expected: list[float], tolerance: float) -> None:
    worst = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
    assert worst < tolerance, f"largest difference {worst}: {ours} against {expected}"


@case
def lora_equals_a_plain_torch_loop_at_every_stage() -> None:
    expected = reference_losses()
    assert expected[-1] < expected[0] - 0.1, "the reference learns nothing: the comparison would show nothing"
    for stage in (0, 1, 2, 3):
        assert_close(run_losses(stage, micro=2), expected, 1e-5)


@case
def micro_batch_and_accumulation_do_not_change_the_losses() -> None:
    expected = run_losses(2, micro=1)
    assert_close(run_losses(2, micro=2), expected, 1e-5)
    assert_close(run_losses(2, micro=4), expected, 1e-5)


@case
def gradients_that_ranks_take_in_turns_do_not_change_the_losses() -> None:
    """DeepSpeed 0.19.8 then notes places in the partition (`_hp_mapping`) that are not the parameters' own."""
    for stage in (1, 2):
        assert_close(run_losses(stage, micro=2, round_robin=True), run_losses(stage, micro=2), 1e-5)


@case
def dropout_is_repeatable_and_differs_between_ranks() -> None:
    first = run_losses(2, micro=2, steps=4, lora_dropout=0.5)
    assert first == run_losses(2, micro=2, steps=4, lora_dropout=0.5)
    assert first != run_losses(2, micro=2, steps=4)
    loop = object.__new__(Loop)
    loop.seed, loop.world = 3, WORLD
    loop._seed_generators(Progress())
    drawn = [torch.zeros(3) for _ in range(2)]
    dist.all_gather(drawn, torch.rand(3))
    assert not torch.equal(*drawn)


@case
def a_state_read_and_loaded_continues_bit_for_bit_at_every_stage() -> None:
    for (stage, dtype), algorithm in zip(PAIRED, ("sgd", "sgd", "adamw", "adamw"), strict=True):
        check_continuation(stage, dtype, algorithm)


@long_case
def a_state_continues_bit_for_bit_at_every_stage_in_every_dtype_with_every_algorithm() -> None:
    for stage, dtype in PRODUCT:
        for algorithm in ("sgd", "adamw"):
            check_continuation(stage, dtype, algorithm)


def check_continuation(stage: int, dtype: str, algorithm: str) -> None:
    model = get_peft_model(base_model(getattr(torch, dtype)), SparseLoraConfig(plan=plan_for(base_model(), True)))
    plan = model.peft_config["default"].plan
    start = start_values(model)
    engine = Engine(model, engine_settings(stage, 2, dtype, algorithm))
    engine.load(start)
    assert all(torch.equal(value, start[name]) for name, value in engine.values().items()), "what is read was loaded"
    assert engine.optimizer_steps() == {"adapter": 0, "omega": 0}
    take_steps(engine, plan, Progress(), 3)
    values, moments, steps = engine.values(), engine.moments(), engine.optimizer_steps()
    assert steps == {"adapter": 3, "omega": 3}
    assert ("model.layers.0.self_attn.q_proj.lora_omega" in moments) == (algorithm == "adamw")
    take_steps(engine, plan, Progress(3, 24), 2)
    expected = engine.values()
    engine.close()
    engine = Engine(model, engine_settings(stage, 2, dtype, algorithm))
    engine.load(values, moments, steps)
    assert all(torch.equal(value, values[name]) for name, value in engine.values().items())
    reread = engine.moments()
    assert all(torch.equal(reread[n][k], moments[n][k]) for n in moments for k in moments[n])
    take_steps(engine, plan, Progress(3, 24), 2)
    assert all(torch.equal(value, expected[name]) for name, value in engine.values().items()), (stage, dtype, algorithm)
    engine.close()


def take_steps(engine: Engine, plan: AdapterPlan, progress: Progress, count: int) -> None:
    for _ in zip(range(count), make_loop(engine, plan, 2, progress).steps(), strict=False):
        pass


@case
def an_overwritten_omega_reaches_master_and_model() -> None:
    """What a cut does: after it, the forward pass is that of the model without the adapter, at every stage."""
    check_omega(PAIRED)


@long_case
def an_overwritten_omega_reaches_master_and_model_at_every_stage_in_every_dtype() -> None:
    check_omega(PRODUCT)


def check_omega(where: Sequence[tuple[int, str]]) -> None:
    for stage, dtype in where:
        base = base_model(getattr(torch, dtype))
        expected = mean_loss(base, SAMPLES[:4], OBJECTIVE, 2, WORLD.rank, WORLD.size)
        model = get_peft_model(base, SparseLoraConfig(plan=plan_for(base, True)))
        start = start_values(model)
        engine = Engine(model, engine_settings(stage, 2, dtype))
        engine.load(start)
        omegas = [name for name in engine.parameters if is_omega(name)]
        assert abs(mean_loss(engine.module, SAMPLES[:4], OBJECTIVE, 2, WORLD.rank, WORLD.size) - expected) > 1e-3
        engine.load({name: torch.zeros(1) for name in omegas})
        assert not any(float(value) for value in engine.values(omegas).values())
        cut = mean_loss(engine.module, SAMPLES[:4], OBJECTIVE, 2, WORLD.rank, WORLD.size)
        assert abs(cut - expected) < (1e-6 if dtype == "float32" else 2e-2), (stage, dtype, cut, expected)
        engine.close()


@case
def optimizer_bytes_are_those_of_the_shard() -> None:
    """Twelve bytes for each trained value (master and two moments), divided among two ranks from stage 1 on."""
    model = base_model(torch.bfloat16)
    plan = plan_for(model)
    count = count_parameters(plan, find_targets(model, "all-linear"))
    for stage, ranks in ((0, 1), (1, 2), (2, 2), (3, 2)):
        peft_model = get_peft_model(base_model(torch.bfloat16), SparseLoraConfig(plan=plan))
        engine = Engine(peft_model, engine_settings(stage, 2, "bfloat16"))
        excess = engine.optimizer_bytes() - 12 * count / ranks
        parts = len(engine.parameters) if stage == 0 else 1  # of each, a step count of 4 bytes
        assert 0 <= excess - 4 * parts < 12 * 64, (stage, excess)  # padding of the flat partition
        engine.close()


@case
def disconnecting_keeps_survivors_and_leaves_no_trace() -> None:
    config = parse_config(
        {
            "model": {"name": MODEL},
            "task": {"name": "custom"},
            "output_dir": "x",
            "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            "method": {"name": "weight_lora", "keep": 3, "steps": 6},
        }
    )
    for stage in (2, 3):
        check_disconnect(config, stage)


def check_disconnect(config, stage: int) -> None:
    base = base_model()
    targets = find_targets(base, "all-linear")
    method = build_methods(config, total_steps=20)
    phase = method.first(plan_for(base), targets).with_batch(2, 8)
    torch.manual_seed(0)
    model = get_peft_model(base, SparseLoraConfig(plan=phase.plan))
    engine = Engine(model, replace(engine_settings(stage, 2), omega_lr=phase.omega_lr))
    callback = build_callback(phase, TrainState({}, {}, {}, Progress(), {}), engine)
    loop = make_loop(engine, phase.plan, 2, Progress(), callback)
    active = [step.active_adapters for _, step in zip(range(6), loop.steps(), strict=False)]
    assert active[0] == len(targets) and active[-1] == 3, active
    state = TrainState(
        engine.values(), engine.moments(), engine.optimizer_steps(), loop.progress, phase.to_dict(), callback.to_dict()
    )
    following = method.next(phase, state, None, targets)
    assert following is not None
    after, kept = following
    before_loss = mean_loss(engine.module, SAMPLES[:4], OBJECTIVE, 2, WORLD.rank, WORLD.size)
    gone = [weakref.ref(p) for name, p in engine.parameters.items() if name.rpartition(".")[0] not in after.plan.active]
    old_engine, old_optimizer = weakref.ref(engine._engine), weakref.ref(engine._optimizer)
    assert len(gone) == 3 * (len(targets) - 3)
    engine.close()
    del loop
    model.base_model.set_plan(after.plan)
    gc.collect()
    assert old_engine() is None and old_optimizer() is None, "the old engine is still alive"
    assert not [ref for ref in gone if ref() is not None], "a removed parameter is still alive"
    wrapped = [name for name, module in model.base_model.model.named_modules() if isinstance(module, SparseLoraLayer)]
    assert sorted(wrapped) == sorted(after.plan.active)
    engine = Engine(model, engine_settings(stage, 2))
    engine.load(kept.tensors, kept.moments, kept.optimizer_steps)
    assert set(engine.parameters) == set(kept.tensors) and len(kept.tensors) == 6
    assert all(torch.equal(value, state.tensors[name]) for name, value in engine.values().items())
    moments = engine.moments()
    assert all(torch.equal(moments[n][k], state.moments[n][k]) for n in moments for k in ("exp_avg", "exp_avg_sq"))
    assert engine.optimizer_steps() == {"adapter": 6}
    held = sum(p.numel() for group in engine._optimizer.param_groups for p in group["params"])
    expected = count_parameters(after.plan, targets)
    assert stage == 3 or expected / WORLD.size <= held < expected / WORLD.size + 64, (held, expected)
    after_loss = mean_loss(engine.module, SAMPLES[:4], OBJECTIVE, 2, WORLD.rank, WORLD.size)
    assert abs(after_loss - before_loss) < 1e-5, (before_loss, after_loss)
    engine.close()


@case
def a_four_bit_base_trains_through_a_phase_change_untouched() -> None:
    """The packed weights are the same bytes after training and rebuilding, at stages 2 and 3."""
    for stage in (2, 3):
        base = load_model(ModelConfig(name=MODEL, dtype="bfloat16", quantization="nf4"))
        packed = [m.weight for m in base.modules() if type(m).__name__ == "Linear4bit"]
        before = [weight.data.clone() for weight in packed]
        plan = plan_for(base)
        model = get_peft_model(base, SparseLoraConfig(plan=plan))
        start = start_values(model)
        first = next(name for name in plan.modules if "q_proj" in name)
        smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
        for current in (plan, smaller):
            model.base_model.set_plan(current)
            engine = Engine(model, engine_settings(stage, 2, "bfloat16"))
            engine.load({name: start[name] for name in engine.parameters})
            take_steps(engine, current, Progress(), 3)
            values = engine.values()
            assert all(torch.isfinite(v).all() and not torch.equal(v, start[n]) for n, v in values.items())
            engine.close()
        with deepspeed.zero.GatheredParameters(packed):
            assert all(
                torch.equal(weight.data.flatten(), old.flatten()) for weight, old in zip(packed, before, strict=True)
            )


@case
def a_phase_scales_the_schedules_rate() -> None:
    model = base_model()
    plan = plan_for(model)
    engine = Engine(get_peft_model(model, SparseLoraConfig(plan=plan)), engine_settings(2, 2))
    rates = []
    for factor in (1.0, 0.25):
        loop = make_loop(engine, plan, 2, Progress())
        loop.phase = loop.phase.with_batch(2, 8, factor)
        rates.append(next(iter(loop.steps())).learning_rate)
        assert {group["lr"] for group in engine._optimizer.param_groups} == {rates[-1]}
    assert rates[1] == 0.25 * rates[0] > 0
    engine.close()


def main() -> None:
    prepare_cpu(WORLD)
    init_distributed()
    results = {}
    for name, function in (LONG_CASES if "long" in sys.argv else CASES).items():
        started = time.monotonic()
        gc.collect()
        gc.freeze()  # an engine that closes collects: what libraries have made is not looked through each time
        try:
            function()
            results[name] = "passed"
            sys.stderr.write(f"{name}: {time.monotonic() - started:.1f} s\n")
        except BaseException:
            results[name] = traceback.format_exc()
        if WORLD.rank == 0 or results[name] != "passed":
            Path(f"{RESULTS}.{WORLD.rank}").write_text(json.dumps(results))
        if results[name] != "passed":
            sys.stderr.write(results[name])
            sys.stderr.flush()
            os._exit(1)
        dist.barrier()


if __name__ == "__main__":
    main()
