"""Masked and shared adapters against dense ones: equation 6 of Partial-LoRA, and one parameter per group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from helpers.tiny_models import IDS, MODELS
from sparse_llm_ft.adapters import (
    SparseLoraConfig,
    SparseLoraLayer,
    check_plan,
    count_parameters,
    find_targets,
    residual_norms,
    save_peft_adapter,
    trained_parameters,
)
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, PlanError, group_name, module_kind, uniform_plan

LLAMA = MODELS["llama"]
ROWS, COLS = IndexMask(10, (0, 3, 9)), IndexMask(6, (1, 2, 5))


def masked_layer(rows: IndexMask | None = ROWS, cols: IndexMask | None = COLS) -> SparseLoraLayer:
    torch.manual_seed(0)
    layer = SparseLoraLayer(nn.Linear(6, 10), "default", ModuleAdapter(r=2, lora_alpha=5.0, rows=rows, cols=cols), 0.0)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


@pytest.mark.parametrize(
    ("rows", "cols"), [(ROWS, COLS), (ROWS, None), (None, COLS), (IndexMask(10, (4,)), IndexMask(6, (0,)))]
)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_the_output_is_that_of_masked_dense_matrices(rows, cols, shape) -> None:
    """W x + (alpha / r) (u_row · B)(u_col · A) x, with the gradient of every kept entry."""
    layer, x = masked_layer(rows, cols), torch.randn(shape)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    row_places = list(rows.indices) if rows else list(range(10))
    col_places = list(cols.indices) if cols else list(range(6))
    dense_a, dense_b = torch.zeros(2, 6), torch.zeros(10, 2)
    dense_a[:, col_places], dense_b[row_places] = a.detach(), b.detach()
    dense_a.requires_grad_(), dense_b.requires_grad_()
    expected = layer.base_layer(x) + 2.5 * (x @ dense_a.T @ dense_b.T)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    target = torch.randn_like(output)
    (output * target).sum().backward()
    (expected * target).sum().backward()
    torch.testing.assert_close(a.grad, dense_a.grad[:, col_places])
    torch.testing.assert_close(b.grad, dense_b.grad[row_places])
    torch.testing.assert_close(layer.get_delta_weight("default"), 2.5 * (dense_b @ dense_a).detach())


def test_merging_and_unmerging_a_masked_adapter() -> None:
    layer, x = masked_layer(), torch.randn(3, 6)
    expected, weight = layer(x), layer.base_layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    untouched = [i for i in range(10) if i not in ROWS.indices]
    assert torch.equal(layer.base_layer.weight[untouched], weight[untouched])
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, weight)


def test_a_mask_changes_no_entry_that_it_keeps() -> None:
    """Drawn at full width and cut: both homes of masks can start from the same values."""
    start = {}
    for cols in (None, COLS):
        torch.manual_seed(5)
        start[cols] = SparseLoraLayer(nn.Linear(6, 10), "default", ModuleAdapter(2, 4.0, cols=cols), 0.0)
    dense, compact = (layer.lora_A["default"].weight for layer in start.values())
    assert torch.equal(dense[:, list(COLS.indices)], compact)


def shared_plan(model: nn.Module, kinds: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj")) -> AdapterPlan:
    """q_proj and up_proj of all layers share; the others have their own."""
    targets = find_targets(model, "all-linear")
    modules = dict(uniform_plan(targets, 3, 6.0).modules)
    for name, shape in targets.items():
        if module_kind(name) in kinds:
            modules[name] = replace(modules[name], group=group_name(module_kind(name), shape))
    return AdapterPlan(modules)


def with_values(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_shared_adapter_is_one_parameter_everywhere(tmp_path) -> None:
    base = LLAMA.build()
    plan, targets = shared_plan(base), find_targets(base, "all-linear")
    model = with_values(get_peft_model(base, SparseLoraConfig(plan=plan)))
    trained = trained_parameters(model)
    shared = [name for name in trained if name.startswith("shared.")]
    assert len(plan.groups) == 2 and len(shared) == 4
    assert sum(p.numel() for p in trained.values()) == count_parameters(plan, targets)
    assert {id(p) for p in trained.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    saved = get_peft_model_state_dict(model)
    assert sum(tensor.numel() for tensor in saved.values()) == count_parameters(plan, targets)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in on_disk.values()) == count_parameters(plan, targets)


def test_a_shared_adapter_learns_from_all_its_modules_and_is_loaded_shared(tmp_path) -> None:
    base = LLAMA.build()
    plan = shared_plan(base)
    model = with_values(get_peft_model(base, SparseLoraConfig(plan=plan)))
    own = AdapterPlan({name: replace(a, group=None) for name, a in plan.active.items()})
    apart = get_peft_model(LLAMA.build(), SparseLoraConfig(plan=own)).eval()
    values = {name: p.detach() for name, p in trained_parameters(model).items()}
    separate = trained_parameters(apart)
    with torch.no_grad():
        for name, owner in plan.owners.items():
            for part in ("lora_A", "lora_B"):
                separate[f"{name}.{part}"].copy_(values[f"{owner}.{part}"])
    assert torch.equal(logits(model), logits(apart))
    for trained in (model, apart):
        trained(input_ids=IDS).logits.square().mean().backward()
    group, members = next(iter(plan.groups.items()))
    for part in ("lora_A", "lora_B"):
        together = sum(separate[f"{name}.{part}"].grad for name in members)
        torch.testing.assert_close(trained_parameters(model)[f"shared.{group}.{part}"].grad, together)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again), logits(model))
    assert list(trained_parameters(again)) == list(trained_parameters(model))


def test_export_expands_groups_and_masks_to_a_stock_lora(tmp_path) -> None:
    base = LLAMA.build()
    plan, targets = shared_plan(base), find_targets(base, "all-linear")
    modules = {}
    for name, adapter in plan.active.items():
        rows, cols = targets[name]
        modules[name] = replace(
            adapter, rows=IndexMask(rows, (0, rows - 1)), cols=IndexMask(cols, tuple(range(0, cols, 3)))
        )
    plan = AdapterPlan(modules)
    model = with_values(get_peft_model(base, SparseLoraConfig(plan=plan)))
    tensors = {name: p.detach() for name, p in trained_parameters(model).items()}
    save_peft_adapter(tmp_path, plan, tensors, "base", None)
    stock = PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    norms = residual_norms(plan, tensors)
    for name, module in model.named_modules():
        if isinstance(module, SparseLoraLayer):
            expected = float(module.get_delta_weight("default").detach().norm())
            assert norms[name.removeprefix("base_model.model.")] == pytest.approx(expected, rel=1e-5)


def test_set_plan_makes_and_breaks_groups() -> None:
    base = LLAMA.build()
    plan = shared_plan(base)
    own = AdapterPlan({name: replace(a, group=None) for name, a in plan.active.items()})
    model = get_peft_model(base, SparseLoraConfig(plan=own))
    for following in (plan, own, plan):
        model.base_model.set_plan(following)
        names = {f"{owner}.{part}" for owner in following.matrix_owners() for part in ("lora_A", "lora_B")}
        assert set(trained_parameters(model)) == names


@pytest.mark.parametrize("change", [{"r": 2}, {"lora_alpha": 9.0}, {"cols": IndexMask(32, (1, 5, 9))}])
def test_set_plan_builds_the_pair_of_a_changed_group_anew(change: dict) -> None:
    base = LLAMA.build()
    plan = shared_plan(base)
    model = with_values(get_peft_model(base, SparseLoraConfig(plan=plan)))
    changed = next(iter(plan.groups))
    before = {owner: base.get_submodule(name).pair("default") for owner, name in plan.matrix_owners().items()}
    modules = {name: replace(a, **change) if a.group == changed else a for name, a in plan.active.items()}
    after = AdapterPlan(modules)
    model.base_model.set_plan(after)
    for name, adapter in after.active.items():
        layer, owner = base.get_submodule(name), after.owners[name]
        down, up = layer.pair("default")
        rows, columns = adapter.shape((layer.out_features, layer.in_features))
        assert layer.adapters["default"] == adapter
        assert (tuple(down.weight.shape), tuple(up.weight.shape)) == ((adapter.r, columns), (rows, adapter.r))
        assert (down is before[owner][0]) == (adapter.group != changed)
        assert bool(up.weight.any()) == (adapter.group != changed)
    assert len(trained_parameters(model)) == 2 * len(after.matrix_owners())


def test_set_plan_keeps_a_shared_pair_under_another_omega() -> None:
    base = LLAMA.build()
    plan = shared_plan(base)
    model = with_values(get_peft_model(base, SparseLoraConfig(plan=plan)))
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    shared = next(name for name, a in plan.active.items() if a.group)
    model.base_model.set_plan(AdapterPlan({**plan.active, shared: replace(plan.active[shared], omega=0.5)}))
    after = trained_parameters(model)
    assert after.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in after.items())


def test_disabling_and_inference_cover_shared_pairs(tmp_path) -> None:
    model = with_values(get_peft_model(LLAMA.build(), SparseLoraConfig(plan=shared_plan(LLAMA.build()))))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(LLAMA.build().eval()))
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_group_of_unlike_shapes_and_a_mask_of_another_size_are_refused() -> None:
    base = LLAMA.build()
    targets = find_targets(base, "all-linear")
    q, down = (next(n for n in targets if n.endswith(end)) for end in ("q_proj", "down_proj"))
    alike = ModuleAdapter(r=2, lora_alpha=4.0, group="g")
    with pytest.raises(PlanError, match="group 'g': its modules have different shapes"):
        check_plan(base, AdapterPlan({q: alike, down: alike}))
    with pytest.raises(PlanError, match="a mask of size 3 where its matrix has"):
        check_plan(base, AdapterPlan({q: ModuleAdapter(2, 4.0, rows=IndexMask(3, (0,)))}))
    with pytest.raises(PlanError, match="fully trains module 'score'"):
        check_plan(base, AdapterPlan({}, trained=("score",)))


def test_a_plan_may_train_a_head_alone() -> None:
    tiny = MODELS["bert"]
    base = tiny.build()
    model = get_peft_model(
        base, SparseLoraConfig(plan=AdapterPlan(dict.fromkeys(tiny.targets), trained=("classifier",)))
    )
    assert set(trained_parameters(model)) == {"classifier.weight", "classifier.bias"}
    model.base_model.set_plan(uniform_plan(find_targets(base, "all-linear"), 2, 4.0, 0.0, ("classifier",)))
    trained = trained_parameters(model)
    assert "classifier.weight" in trained and len(trained) == 2 + 2 * len(tiny.targets)


def test_a_head_trained_whole_is_saved_with_the_adapter(tmp_path) -> None:
    tiny = MODELS["bert"]
    plan = uniform_plan(find_targets(tiny.build(), "all-linear"), 2, 4.0, 0.0, ("classifier",))
    model = with_values(get_peft_model(tiny.build(), SparseLoraConfig(plan=plan)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
