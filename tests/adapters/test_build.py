"""PEFT's own tuners from a plan: what they train, what is exported, and masks on AdaLoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers.tiny_models import IDS, MODELS
from sparse_llm_ft.adapters import (
    TUNERS,
    add_adapters,
    change_plan,
    count_parameters,
    find_targets,
    save_peft_adapter,
    trained_parameters,
)
from sparse_llm_ft.adapters.masking import optimizer_masks
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.model.buffers import remember_fixed
from sparse_llm_ft.optim import SparseAdamW
from sparse_llm_ft.optim.rank_allocation import orthogonality
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, IndexMask, uniform_plan

SCHEDULE = {"target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "orth_reg_weight": 0.5}


def plan_for(model: nn.Module, tuner: str, trained: tuple[str, ...] = ()) -> AdapterPlan:
    plan = uniform_plan(find_targets(model, "all-linear"), 4, 8.0, 0.0, trained)
    return replace(plan, tuner=tuner, options=SCHEDULE if tuner == "adalora" else {})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_plan_counts_what_its_tuner_trains_and_the_export_loads_in_peft(kind: str, tuner: str, tmp_path) -> None:
    tiny = MODELS[kind]
    base = tiny.build()
    heads = ("classifier",) if kind == "bert" else ()
    plan = plan_for(base, tuner, heads)
    model = add_adapters(base, plan)
    torch.testing.assert_close(logits(model), logits(tiny.build()), rtol=1e-4, atol=1e-5)  # fresh: nothing changes
    trained = trained_parameters(model)
    whole = sum(p.numel() for name, p in trained.items() if name.startswith("classifier."))
    assert sum(p.numel() for p in trained.values()) == count_parameters(plan, find_targets(base, "all-linear")) + whole
    assert bool(whole) == bool(heads)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(1.25)
    save_peft_adapter(tmp_path, plan, {name: p.detach() for name, p in trained.items()}, "base", None, task_type(base))
    stock = PeftModel.from_pretrained(tiny.build(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuner", TUNERS)
def test_trained_parameters_may_be_cast_to_the_bases_precision(tuner: str) -> None:
    """As DeepSpeed casts them: parameters, and no buffers."""
    base = MODELS["llama"].build().to(torch.bfloat16)
    model = add_adapters(base, plan_for(base, tuner))
    before = logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    torch.testing.assert_close(logits(model), before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_half_precision_base_trains_what_a_float32_one_does(tuner: str) -> None:
    """On such a base PEFT lets gradients flow to AdaLoRA's constant divisor."""
    bases = (MODELS["llama"].build(), MODELS["llama"].build().to(torch.bfloat16))
    names = [list(trained_parameters(add_adapters(base, plan_for(base, tuner)))) for base in bases]
    assert names[0] == names[1]
    assert not any("ranknum" in name for name in names[0])


def test_masked_rows_and_columns_of_adalora_stay_zero_under_training() -> None:
    base = MODELS["llama"].build()
    plan = plan_for(base, "adalora")
    name = next(iter(plan.modules))
    d_out, d_in = find_targets(base, "all-linear")[name]
    rows, cols = IndexMask(d_out, (0, d_out - 1)), IndexMask(d_in, (1, 2, 5))
    modules = plan.modules | {name: replace(plan.active[name], rows=rows, cols=cols)}
    plan = replace(plan, modules=modules, masking="optimizer")
    model = add_adapters(base, plan).train()
    trained = trained_parameters(model)
    kept = {trained[n]: mask.indices(0, trained[n].numel()) for n, mask in optimizer_masks(plan).items()}
    optimizer = SparseAdamW(trained.values(), lr=0.05, weight_decay=0.1, kept=kept)
    for _ in range(4):
        loss = model(input_ids=IDS).logits.square().mean() + orthogonality(trained)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    a, b = trained[f"{name}.lora_A"].detach(), trained[f"{name}.lora_B"].detach()
    assert set(a.abs().sum(0).nonzero().flatten().tolist()) == set(cols.indices)
    assert set(b.abs().sum(1).nonzero().flatten().tolist()) == set(rows.indices)
    other = list(plan.modules)[1]
    assert trained[f"{other}.lora_A"].abs().sum(0).min() > 0


def test_the_orthogonality_penalty_is_that_of_peft() -> None:
    base = MODELS["llama"].build()
    model = add_adapters(base, plan_for(base, "adalora")).train()
    plain = model(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        alone = base(input_ids=IDS, labels=IDS).loss
    ours = SCHEDULE["orth_reg_weight"] * orthogonality(trained_parameters(model))
    torch.testing.assert_close(plain.loss - alone, ours, rtol=1e-4, atol=1e-5)


def test_a_change_of_tuner_leaves_the_base_alone() -> None:
    tiny = MODELS["bert"]
    base = tiny.build()
    head = AdapterPlan(dict.fromkeys(tiny.targets), trained=("classifier",))
    model = add_adapters(base, head)
    for tuner in ("adalora", "sparse_lora", "lora"):
        plan = plan_for(base, tuner, ("classifier",))
        model = change_plan(model, head, plan)
        names = trained_parameters(model)
        assert {name.split(".")[0] for name in names} == {"bert", "classifier"}
        torch.testing.assert_close(logits(model), logits(tiny.build()), rtol=1e-4, atol=1e-5)
        head = plan


def test_everything_trains_every_parameter() -> None:
    base = MODELS["llama"].build()
    names = {name for name, _ in base.named_parameters()}
    model = add_adapters(base, AdapterPlan(dict.fromkeys(MODELS["llama"].targets), trained=(FULL_MODEL,)))
    assert set(trained_parameters(model)) == names


@pytest.mark.parametrize("tuner", ["sparse_lora", "lora"])
def test_what_a_models_class_fixes_stays_fixed_in_a_module_that_is_trained_whole(tuner: str) -> None:
    """Such as sinusoidal positions; also after a change of plan."""
    base = MODELS["llama"].build()
    base.model.norm.weight.requires_grad_(False)
    remember_fixed(base)
    plan = plan_for(base, tuner, ("model.norm", "model.embed_tokens"))
    model = add_adapters(base, plan)
    for _ in range(2):
        whole = {name for name in trained_parameters(model) if "lora_" not in name}
        assert whole == {"model.embed_tokens.weight"}
        model = change_plan(model, plan, plan)
