"""Two-rank cases of steps on a base that sharded_loading.py made: they are as on a whole one, and gather no more."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.case_tools import (
    MODEL,
    OBJECTIVE,
    SAMPLES,
    WORLD,
    case,
    engine_settings,
    long_case,
    make_loop,
    plan_for,
    start_values,
)
from helpers.sharding_cases import KINDS, check_equal, in_files, settings_of
from sparse_llm_ft.adapters import add_adapters, change_plan, find_targets
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.sharded_loading import load_sharded_model
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.model.loading import DTYPES, load_model
from sparse_llm_ft.plan import AdapterPlan, uniform_plan


@case
def a_four_bit_base_is_nowhere_whole_between_forward_and_backward() -> None:
    """Of the layers gathered during a step, one at most is alive after the forward pass, and after backward. The layers
    without adapters count as well; bitsandbytes' own function keeps all that needs gradients.
    """
    config = ModelConfig(name=in_files("several"), dtype="bfloat16", quantization="nf4")
    for checkpointed in (False, True):
        base = load_sharded_model(
            config.model_copy(update={"gradient_checkpointing": checkpointed}), settings_of("bfloat16")
        )
        plan = plan_for(base)
        names = list(plan.modules)
        plan = AdapterPlan({name: a if name in names[::2] else None for name, a in plan.modules.items()})
        model = add_adapters(base, plan)
        released = {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        }
        engine = Engine(
            model,
            replace(
                engine_settings(3, 2, "bfloat16"),
                extra={"zero_optimization": released | {"stage3_prefetch_bucket_size": 0}},
            ),
        )
        gathered: list[tuple[StorageWeakRef, int]] = []

        def note(layer: nn.Module, args: object, gathered: list = gathered) -> None:
            weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
            storage = weight.data.untyped_storage()
            assert storage.nbytes() >= weight.ds_numel
            gathered.append((StorageWeakRef(storage), storage.nbytes()))

        base_layers = {id(m.get_base_layer()) for m in model.modules() if hasattr(m, "get_base_layer")}
        for module in model.modules():
            if hasattr(module, "get_base_layer") or (hasattr(module, "quant_state") and id(module) not in base_layers):
                module.register_forward_pre_hook(note)
        batch = OBJECTIVE.batch(SAMPLES[:2])
        for _ in range(3):  # DeepSpeed knows the order of modules from the third step on, and then acts otherwise
            gathered.clear()
            loss = OBJECTIVE.loss(engine.forward, batch)
            after_forward = sum(size for storage, size in gathered if not storage.expired())
            engine.backward(loss)
            after_backward = sum(size for storage, size in gathered if not storage.expired())
            engine.step(1e-3)
            largest = max(size for _, size in gathered)
            assert len(gathered) >= len(names)
            assert after_forward <= largest and after_backward <= largest, (after_forward, after_backward, largest)
        engine.close()
        model.unload()


@case
def a_step_keeps_the_same_activations_at_stages_2_and_3() -> None:
    """DeepSpeed's hooks put other tensors in place of activations; what those are computed from must stay known."""
    kept = []
    for stage in (2, 3):
        model = load_model(ModelConfig(name=MODEL, dtype="float32"))
        plan = plan_for(model)
        engine = Engine(add_adapters(model, plan), engine_settings(stage, 2, "float32"))
        found: dict[int, torch.Tensor] = {}

        def pack(value: torch.Tensor, found: dict = found, width: int = model.config.hidden_size) -> torch.Tensor:
            small = value.numel() <= width  # a norm's weight is copied at stage 3
            if not (isinstance(value, nn.Parameter) or small):
                found[value.untyped_storage().data_ptr()] = value
            return value

        engine.module.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            OBJECTIVE.loss(engine.forward, OBJECTIVE.batch(SAMPLES[:2]))
        kept.append(Counter(tuple(value.shape) for value in found.values()))
        engine.close()
    assert kept[0] == kept[1], kept


@case
def there_is_no_graph_below_the_lowest_adapter() -> None:
    """With and without checkpointing, at every stage: what enters that layer needs no gradient, and backward calls no
    layer below it.
    """
    for stage, checkpointed in itertools.product(range(4), (False, True)):
        base = load_model(ModelConfig(name=MODEL, dtype="float32", gradient_checkpointing=checkpointed))
        layers = base.model.layers
        plan = plan_for(base)
        last = f".{len(layers) - 1}."
        plan = AdapterPlan({name: a if last in name else None for name, a in plan.modules.items()})
        engine = Engine(add_adapters(base, plan), engine_settings(stage, 2, "float32"))
        engine.module.train()
        needed, calls = [], Counter()

        def enters(layer: nn.Module, args: tuple, output: object, needed: list = needed) -> None:
            value = output[0] if isinstance(output, tuple) else output
            needed.append(value.requires_grad)

        for number, layer in enumerate(layers):
            layer.register_forward_hook(enters)
            layer.register_forward_pre_hook(lambda *_, number=number, calls=calls: calls.update([number]))
        loss = OBJECTIVE.loss(engine.forward, OBJECTIVE.batch(SAMPLES[:2]))
        assert needed == [False] * (len(layers) - 1) + [True], (stage, checkpointed, needed)
        calls.clear()
        engine.backward(loss)
        assert set(calls) <= {len(layers) - 1}, (stage, checkpointed, calls)
        engine.close()
        engine.module.unload()


@case
def a_sharded_base_trains_as_a_whole_one() -> None:
    """Equal losses before, during and after a change of plan with a new engine; the base's bytes stay."""
    check_training(*KINDS[0])


@long_case
def a_sharded_base_trains_as_a_whole_one_in_float32() -> None:
    check_training(*KINDS[2])


def check_training(dtype: str, quantization: str) -> None:
    config = ModelConfig(name=in_files("several"), dtype=dtype, quantization=quantization)
    whole_base = losses_of(load_model(config), dtype)
    sharded = load_sharded_model(config, settings_of(dtype))
    assert losses_of(sharded, dtype) == whole_base, (dtype, quantization)
    assert whole_base[1] != whole_base[-2], "nothing was learned: the comparison shows nothing"
    check_equal(load_model(config), sharded)


def losses_of(base: nn.Module, dtype: str) -> list[float]:
    plan = plan_for(base)
    first = next(name for name in plan.modules if "q_proj" in name)
    smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
    torch.manual_seed(0)
    model = add_adapters(base, plan)
    start, losses = start_values(model), []
    for current in (plan, smaller):
        model = change_plan(model, plan, current)
        # Threshold 0: nothing is left whole after its first use, so every layer is gathered in every pass.
        gathers = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        engine = Engine(model, replace(engine_settings(3, 2, dtype), extra=gathers))
        assert {p.dtype for p in engine.parameters.values()} == {DTYPES[dtype]}
        losses.append(mean_loss(engine.module, SAMPLES[:5], OBJECTIVE, 2, WORLD.rank, WORLD.size))
        engine.load({name: start[name] for name in engine.parameters})
        steps = make_loop(engine, current, 2, Progress()).steps()
        losses += [step.loss for _, step in zip(range(4), steps, strict=False)]
        losses.append(mean_loss(engine.module, SAMPLES[:5], OBJECTIVE, 2, WORLD.rank, WORLD.size))
        engine.close()
    model.unload()
    return losses


@long_case
def pefts_own_tuners_start_on_a_sharded_base() -> None:
    for tuner, quantization in (("lora", "nf4"), ("vera", "nf4"), ("vera", "none")):
        config = ModelConfig(name=MODEL, dtype="bfloat16", quantization=quantization)
        found = []
        for base in (load_model(config), load_sharded_model(config, settings_of("bfloat16"))):
            plan = replace(uniform_plan(find_targets(base, "all-linear"), 4, 8, 0.0), tuner=tuner)
            torch.manual_seed(0)
            model = add_adapters(base, plan)
            engine = Engine(model, engine_settings(3, 2, "bfloat16"))
            found.append(engine.values())
            engine.close()
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items()), (tuner, quantization)
