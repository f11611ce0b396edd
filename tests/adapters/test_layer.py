"""The adapter layer's equation, its gate and its gradients, against explicit matrix products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_llm_ft.adapters import SparseLoraLayer
from sparse_llm_ft.plan import ModuleAdapter

D_OUT, D_IN, R, ALPHA = 5, 7, 3, 12.0
SCALING = ALPHA / R
OMEGAS = [-1.5, -1e-6, 0.0, 1e-6, 0.7, 2.0]


def make_layer(omega=1.0, train_omega=False, dropout=0.0, bias=True, r=R, dtype=torch.float32, fresh=False):
    torch.manual_seed(0)
    adapter = ModuleAdapter(r=r, lora_alpha=SCALING * r, omega=omega, train_omega=train_omega)
    layer = SparseLoraLayer(nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype), "default", adapter, dropout)
    if not fresh:
        nn.init.normal_(layer.lora_B["default"].weight)
    return layer.requires_grad_(True)


def matrices(layer, name="default"):
    """(W, b, A, B) as float32 copies; b is 0 where there is none."""
    base = layer.base_layer
    bias = torch.zeros(D_OUT) if base.bias is None else base.bias.detach().float()
    weights = base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    w, a, b = (weight.detach().float().clone() for weight in weights)
    return w, bias.clone(), a, b


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("train_omega", [True, False])
@pytest.mark.parametrize("omega", OMEGAS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_equation(omega, train_omega, bias):
    """y = W x + b + max(omega, 0) * (lora_alpha / r) * B A x."""
    layer, x = make_layer(omega, train_omega, bias=bias), inputs(2, 4)
    w, b, a, up = matrices(layer)
    expected = x @ w.T + b + max(omega, 0.0) * SCALING * (x @ a.T @ up.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("train_omega", [True, False])
def test_float32_adapters_on_a_bfloat16_base(train_omega):
    """The same equation, each of the two terms and their sum rounded to bfloat16 (8 bits)."""
    layer, x = make_layer(0.7, train_omega, dtype=torch.bfloat16), inputs(2, 4, dtype=torch.bfloat16)
    for container in (layer.lora_A, layer.lora_B):
        container.float()
    if train_omega:
        layer.lora_omega.float()
    w, b, a, up = matrices(layer)
    term = 0.7 * SCALING * (x.float() @ a.T @ up.T)
    assert term.abs().mean() > 1
    output = layer(x)
    assert output.dtype == torch.bfloat16
    magnitude = float((x.float() @ w.T + b).abs().max() + term.abs().max())
    torch.testing.assert_close(output.float(), x.float() @ w.T + b + term, rtol=0, atol=3 * 2**-8 * magnitude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_born_in_the_dtype_of_the_base(dtype):
    layer = make_layer(train_omega=True, dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(inputs(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("train_omega", [True, False])
def test_a_fresh_adapter_changes_nothing(train_omega):
    layer, x = make_layer(0.7, train_omega, fresh=True), inputs(2, 4)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.lora_A["default"].weight.std() > 0.05


@pytest.mark.parametrize("train_omega", [True, False])
@pytest.mark.parametrize("omega", [-1.5, -1e-6, 0.0])
def test_an_adapter_with_omega_of_at_most_0_is_off(omega, train_omega):
    layer, x = make_layer(omega, train_omega), inputs(2, 4)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("omega", OMEGAS)
def test_omega_receives_its_gradient_on_both_sides_of_0(omega):
    """d loss / d omega = <grad_out, (lora_alpha / r) B A x>, so that an adapter that is off can come back."""
    layer, x, grad_out = make_layer(omega, train_omega=True), inputs(2, 4), torch.randn(2, 4, D_OUT)
    _, _, a, up = matrices(layer)
    layer(x).backward(grad_out)
    expected = (grad_out * SCALING * (x @ a.T @ up.T)).sum().reshape(1)
    assert expected.abs() > 0.1
    torch.testing.assert_close(layer.lora_omega["default"].grad, expected)


@pytest.mark.parametrize("train_omega", [True, False])
@pytest.mark.parametrize("omega", OMEGAS)
def test_gradients_of_a_b_and_the_input(omega, train_omega):
    """With s = max(omega, 0) * lora_alpha / r and g = grad_out, rows are samples: dB = s gᵀ (x Aᵀ), dA = s (g B)ᵀ x,
    dx = g (W + s B A). All of dA and dB are 0 where omega <= 0.
    """
    layer, x, g = make_layer(omega, train_omega), inputs(6).requires_grad_(), torch.randn(6, D_OUT)
    w, _, a, up = matrices(layer)
    layer(x).backward(g)
    s, x_ = max(omega, 0.0) * SCALING, x.detach()
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, s * g.T @ (x_ @ a.T))
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, s * (g @ up).T @ x_)
    torch.testing.assert_close(x.grad, g @ (w + s * up @ a))
    if omega <= 0:
        assert not layer.lora_A["default"].weight.grad.any()
        assert not layer.lora_B["default"].weight.grad.any()


def test_dropout_acts_on_the_adapters_input_in_train_mode():
    layer, x = make_layer(dropout=0.5), inputs(2, 4)
    w, b, a, up = matrices(layer)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(layer.train()(x), x @ w.T + b + SCALING * (dropped @ a.T @ up.T))
    assert not torch.allclose(layer.train()(x), layer.train()(x))


def test_no_dropout_in_eval_mode():
    layer, x = make_layer(dropout=0.5).eval(), inputs(2, 4)
    w, b, a, up = matrices(layer)
    torch.testing.assert_close(layer(x), x @ w.T + b + SCALING * (x @ a.T @ up.T))


@pytest.mark.parametrize(("omega", "train_omega"), [(0.7, True), (0.7, False), (-0.7, True), (-0.7, False)])
def test_delta_weight_is_what_forward_adds(omega, train_omega):
    layer, x = make_layer(omega, train_omega), inputs(2, 4)
    torch.testing.assert_close(x @ layer.get_delta_weight("default").T, layer(x) - layer.base_layer(x))


def test_merge_adds_the_delta_once_and_unmerge_takes_it_away():
    layer, x = make_layer(0.7, train_omega=True), inputs(2, 4)
    w, _, a, up = matrices(layer)
    before = layer(x)
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer.base_layer.weight, w + 0.7 * SCALING * up @ a)
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight, w)
    torch.testing.assert_close(layer(x), before)
    with pytest.warns(UserWarning, match="nothing is merged"):
        layer.unmerge()


def test_merge_into_bfloat16_rounds_the_sum_once():
    layer = make_layer(dtype=torch.bfloat16)
    layer.lora_A.float()
    layer.lora_B.float()
    w, _, a, up = matrices(layer)
    layer.merge()
    assert torch.equal(layer.base_layer.weight, (w + up @ a * SCALING).to(torch.bfloat16))


def test_disabling_a_merged_layer_unmerges_it():
    layer, x = make_layer(), inputs(2, 4)
    w, b, _, _ = matrices(layer)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), x @ w.T + b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_weight(value):
    layer = make_layer()
    w = matrices(layer)[0]
    layer.lora_B["default"].weight.data[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, w)
    assert not layer.merged


def test_scales_multiply_the_adapter_term():
    layer, x = make_layer(), inputs(2, 4)
    base = layer.base_layer(x)
    term = layer(x) - base
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer(x), base + 3 * term)
    layer.scale_layer(2.0)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(layer(x), base + 2 * term)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x), base + term)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer(x), base + 0.5 * term)


def test_active_adapters_add_up():
    layer, x = make_layer(0.7, train_omega=True), inputs(2, 4)
    layer.update_layer("other", ModuleAdapter(r=2, lora_alpha=1.0, omega=0.5), 0.0)
    nn.init.normal_(layer.lora_B["other"].weight)
    w, b, a, up = matrices(layer)
    _, _, a2, up2 = matrices(layer, "other")
    first, second = 0.7 * SCALING * (x @ a.T @ up.T), 0.5 * 0.5 * (x @ a2.T @ up2.T)
    torch.testing.assert_close(layer(x), x @ w.T + b + first)
    layer.set_adapter("other")
    torch.testing.assert_close(layer(x), x @ w.T + b + second)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), x @ w.T + b + first + second)


def test_a_rebuilt_adapter_is_fresh_and_forgets_its_omega():
    layer, x = make_layer(0.7, train_omega=True), inputs(2, 4)
    layer.set_scale("default", 5.0)
    layer.update_layer("default", ModuleAdapter(r=2, lora_alpha=6.0), 0.0)
    assert layer.lora_A["default"].weight.shape == (2, D_IN)
    assert "default" not in layer.lora_omega
    assert torch.equal(layer(x), layer.base_layer(x))
    nn.init.normal_(layer.lora_B["default"].weight)
    w, b, a, up = matrices(layer)
    torch.testing.assert_close(layer(x), x @ w.T + b + 3.0 * (x @ a.T @ up.T))
