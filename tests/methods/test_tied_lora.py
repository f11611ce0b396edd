"""Tied-LoRA: W x + (alpha / r) Λ_v B Λ_u A x, one A and B per module type, u and v per layer, all trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers.method_settings import TARGETS, start
from helpers.tiny_models import IDS, MODELS
from sparse_llm_ft.adapters import (
    SparseLoraConfig,
    SparseLoraLayer,
    add_adapters,
    count_parameters,
    count_stored_parameters,
    find_targets,
    residual_norms,
    save_peft_adapter,
    trained_parameters,
)
from sparse_llm_ft.adapters.masking import optimizer_masks, to_compact, to_full
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, group_name, module_kind, uniform_plan

LLAMA = MODELS["llama"]


def tied(targets: dict[str, tuple[int, int]], r: int) -> AdapterPlan:
    chain, _ = start("tied_lora")
    return chain.first(uniform_plan(targets, r, 2.0 * r), targets).plan


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@torch.no_grad()
def with_values(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(model).values():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(("rows", "cols"), [(None, None), (IndexMask(10, (0, 3, 9)), IndexMask(6, (1, 2, 5)))])
def test_the_output_and_its_gradients_are_those_of_the_equation(rows, cols) -> None:
    torch.manual_seed(0)
    adapter = ModuleAdapter(2, 5.0, rows=rows, cols=cols, train_vectors=True)
    layer = SparseLoraLayer(nn.Linear(6, 10), "default", adapter, 0.0)
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    parameters += [layer.lora_u["default"], layer.lora_v["default"]]
    assert torch.equal(parameters[2], torch.ones(2)) and torch.equal(parameters[3], torch.ones(3 if rows else 10))
    assert not layer.get_delta_weight("default").any()
    for parameter in parameters:
        nn.init.normal_(parameter)
    x, target = torch.randn(4, 6), torch.randn(4, 10)
    a, b, u, v = (p.detach().clone().requires_grad_() for p in parameters)
    kept_rows, kept_cols = list(rows.indices) if rows else slice(None), list(cols.indices) if cols else slice(None)
    change = x[:, kept_cols] @ a.T @ torch.diag(u) @ b.T @ torch.diag(v)
    expected = layer.base_layer(x).detach()
    expected = expected.index_put((torch.arange(4)[:, None], torch.arange(10)[kept_rows]), 2.5 * change, True)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    (output * target).sum().backward()
    (expected * target).sum().backward()
    for parameter, reference in zip(parameters, (a, b, u, v), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)
    torch.testing.assert_close(
        nn.functional.linear(x, layer.get_delta_weight("default")), expected - layer.base_layer(x)
    )


def test_every_layer_has_its_own_vectors_and_each_type_and_shape_one_pair() -> None:
    plan = tied(TARGETS, 2)
    assert len(plan.groups) == 3 and all(len(names) == 4 for names in plan.groups.values())
    assert all(adapter.train_vectors for adapter in plan.active.values())


def test_roberta_base_has_as_many_values_as_the_papers_rank_gives() -> None:
    """LoRA-drop, A.1: rank 56 on query and value is 0.15M rounded; two pairs of 768 × 768, and 24 pairs of vectors."""
    targets = {f"encoder.layer.{i}.attention.self.{kind}": (768, 768) for i in range(12) for kind in ("query", "value")}
    plan = tied(targets, 56)
    assert count_parameters(plan, targets) == 172_032 + 19_776


def test_the_adapter_is_loaded_as_it_was_and_by_peft_alone_as_a_plain_lora(tmp_path: Path) -> None:
    base = LLAMA.build()
    plan, targets = tied(find_targets(base, "all-linear"), 2), find_targets(base, "all-linear")
    model = with_values(get_peft_model(base, SparseLoraConfig(plan=plan)))
    trained = {name: p.detach() for name, p in trained_parameters(model).items()}
    assert sum(t.numel() for t in trained.values()) == count_parameters(plan, targets)
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "own", is_trainable=True).eval()
    assert torch.equal(logits(again), logits(model))
    assert list(trained_parameters(again)) == list(trained)
    save_peft_adapter(tmp_path / "stock", plan, trained, "base", None)
    stock = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "stock").eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    norms = residual_norms(plan, trained)
    for name, module in model.named_modules():
        if isinstance(module, SparseLoraLayer):
            expected = float(module.get_delta_weight("default").detach().norm())
            assert norms[name.removeprefix("base_model.model.")] == pytest.approx(expected, rel=1e-5)


def test_masks_cut_v_in_the_layers_and_in_the_optimizer() -> None:
    base = LLAMA.build()
    targets = find_targets(base, "all-linear")
    modules = {
        name: replace(a, rows=IndexMask(targets[name][0], (0, 2)), cols=IndexMask(targets[name][1], (1, 3, 4)))
        for name, a in tied(targets, 2).active.items()
    }
    compact = AdapterPlan(modules)
    full = replace(compact, masking="optimizer")
    model = with_values(add_adapters(base, full))
    with torch.no_grad():  # what the optimizer would leave at 0
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(to_full(full, to_compact(full, {name: parameter}))[name])
    values = {name: p.detach() for name, p in trained_parameters(model).items()}
    small = to_compact(full, values)
    assert sum(t.numel() for t in values.values()) == count_stored_parameters(full, targets)
    assert sum(t.numel() for t in small.values()) == count_parameters(full, targets)
    assert optimizer_masks(full).keys() == {name for name in values if not name.endswith("lora_u")}
    other = add_adapters(LLAMA.build(), compact).eval()
    with torch.no_grad():
        for name, parameter in trained_parameters(other).items():
            parameter.copy_(small[name])
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_a_plan_keeps_its_vectors_when_it_is_written_and_others_do_not_mention_them() -> None:
    plan = tied(TARGETS, 2)
    assert AdapterPlan.from_dict(plan.to_dict()) == plan
    group = group_name(module_kind("layers.0.attn.q"), (8, 8))
    plain = AdapterPlan({"layers.0.attn.q": ModuleAdapter(2, 4.0, group=group)})
    assert "train_vectors" not in plain.to_dict()["modules"]["layers.0.attn.q"]  # type: ignore[index]
    assert AdapterPlan.from_dict(plain.to_dict()) == plain
