"""`adapted_linear`: the equations against autograd on the plain formula, what it keeps, and when it is used."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparse_llm_ft.adapters.dropout import SeededDropout, _dropped
from sparse_llm_ft.adapters.function import Adapted, adapted_linear, gradient_of_up, times_up
from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.adapters.parts import gate
from sparse_llm_ft.plan import IndexMask, ModuleAdapter

D_IN, D_OUT, R = 10, 7, 3
ROWS, COLS = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5, 7, 9])
MASKS = [(None, None), (ROWS, None), (None, COLS), (ROWS, COLS)]
DROPOUTS = [None, SeededDropout(0.2, 5), SeededDropout(0.6, 5)]


def linear(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    layer = Conv1D(D_OUT, D_IN) if kind == "conv1d" else nn.Linear(D_IN, D_OUT, bias=kind == "bias")
    return layer.to(dtype).requires_grad_(False)


def trained(call: Adapted, dtype: torch.dtype, omega: float | None) -> list[Any]:
    """x, A, B and omega."""
    torch.manual_seed(2)
    rows, cols = D_OUT if call.rows is None else len(call.rows), D_IN if call.cols is None else len(call.cols)
    shapes = [(2, 4, D_IN), (R, cols), (rows, R)]
    values = [torch.randn(shape).to(dtype).requires_grad_(True) for shape in shapes]
    return [*values, None if omega is None else torch.tensor([omega], dtype=dtype, requires_grad=True)]


def plain(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, omega: Any, call: Adapted) -> torch.Tensor:
    """The formula, differentiated by autograd."""
    seen = x if call.cols is None else x[..., call.cols]
    if call.dropout is not None:
        mask = call.dropout.mask((seen.numel(),), seen.device, seen.dtype)
        kept = mask.apply_(torch.ones(seen.numel(), dtype=x.dtype)).view(seen.shape)
        seen = seen * kept / (1 - call.dropout.p)
    change = (seen @ down.T) @ up.T * call.scaling * (1.0 if omega is None else gate(omega))
    if call.rows is not None:
        change = torch.zeros(*x.shape[:-1], D_OUT, dtype=x.dtype).index_copy(-1, call.rows, change)
    return call.base(x) + change


@pytest.mark.parametrize("omega", [None, 0.7, -0.3])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize(("rows", "cols"), MASKS)
@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d"])
def test_equals_the_formula_and_its_gradients(kind: str, rows: Any, cols: Any, dropout: Any, omega: Any) -> None:
    call = Adapted(linear(kind), 1.5, rows, cols, dropout)
    inputs = trained(call, torch.float64, omega)
    weight = torch.randn(2, 4, D_OUT, dtype=torch.float64)
    results = []
    for compute in (adapted_linear, plain):
        output = compute(*inputs, call)
        wanted = [value for value in inputs if value is not None]
        results.append([output, *torch.autograd.grad((output * weight).sum(), wanted)])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_gradcheck(dropout: Any) -> None:
    call = Adapted(linear("bias"), 0.5, ROWS, COLS, dropout)
    inputs = trained(call, torch.float64, 0.8)
    assert torch.autograd.gradcheck(lambda *values: adapted_linear(*values, call), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_precision(dtype: torch.dtype, tolerance: float) -> None:
    call = Adapted(linear("bias", dtype), 2.0, ROWS, COLS, SeededDropout(0.1, 3))
    exact = Adapted(linear("bias"), 2.0, ROWS, COLS, SeededDropout(0.1, 3))
    exact.base.load_state_dict({name: value.double() for name, value in call.base.state_dict().items()})
    inputs = trained(call, dtype, 0.9)
    doubles = [value.detach().double().requires_grad_(True) for value in inputs]
    output, expected = adapted_linear(*inputs, call), plain(*doubles, exact)
    output.sum().backward()
    expected.sum().backward()
    pairs = [(output, expected), *((own.grad, value.grad) for own, value in zip(inputs, doubles, strict=True))]
    for own, value in pairs:
        assert own is not None and value is not None and own.dtype == dtype
        assert (own.double() - value).norm() / value.norm() < tolerance


@pytest.mark.parametrize("nested", [False, True])
def test_a_four_bit_base_is_dequantised_in_both_passes(nested: bool) -> None:
    torch.manual_seed(0)
    base = Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
    base.load_state_dict({"weight": torch.randn(96, 64)})
    base = base.to("cpu").requires_grad_(False)
    call = Adapted(base, 1.0, None, None, None)
    x, down, up = torch.randn(5, 64), torch.randn(R, 64), torch.randn(96, R)
    results = []
    for compute in (adapted_linear, lambda *values: base(values[0]) + values[0] @ values[1].T @ values[2].T):
        inputs = [value.clone().requires_grad_(True) for value in (x, down, up)]
        output = compute(*inputs, None, call) if compute is adapted_linear else compute(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-4)


def kept_storages(compute: Any, *excluded: torch.Tensor) -> list[int]:
    """Data pointers of the storages that `compute()` keeps for backward."""
    found: dict[int, None] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: found.setdefault(value.untyped_storage().data_ptr()) or value, lambda value: value
    ):
        output = compute()
    assert output.requires_grad
    own = {value.untyped_storage().data_ptr() for value in excluded}
    return [pointer for pointer in found if pointer not in own]


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_keeps_its_input_alone(dropout: Any) -> None:
    call = Adapted(linear("bias"), 1.0, ROWS, COLS, dropout)
    x, down, up, omega = trained(call, torch.float64, 0.5)
    kept = kept_storages(lambda: adapted_linear(x, down, up, omega, call), down, up, omega, *call.base.parameters())
    assert kept == [x.untyped_storage().data_ptr()]


def test_no_gradient_of_an_input_that_needs_none() -> None:
    call = Adapted(linear("linear"), 1.0, None, None, None)
    x, down, up, _ = trained(call, torch.float64, None)
    adapted_linear(x.detach(), down, up, None, call).sum().backward()
    assert x.grad is None and down.grad is not None


@pytest.mark.parametrize("p", [0.01, 0.05, 0.25])
def test_entries_are_dropped_independently_with_probability_p(p: float) -> None:
    draw = torch.Generator().manual_seed(0)
    size = 400_000
    dropped = torch.zeros(size).index_fill_(0, _dropped(size, p, draw), 1.0)
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / size) ** 0.5
    for distance in (1, 2, 7):  # no correlation with later entries
        both = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert abs(both - p * p) < 6 * (p * p / size) ** 0.5
    assert _dropped(1, p, draw).numel() <= 1


def dropped_ones(dropout: SeededDropout) -> torch.Tensor:
    ones = torch.ones(50, 20)
    return dropout.mask((50, 20), ones.device, ones.dtype).apply_(ones)


def test_dropout_draws_the_same_mask_at_every_call() -> None:
    for p in (0.1, 0.7):
        dropout = SeededDropout.draw(p)
        first, second = (dropped_ones(dropout) for _ in range(2))
        assert torch.equal(first, second) and 0 < first.mean() < 1
        assert not torch.equal(first, dropped_ones(SeededDropout.draw(p)))


def layer(dropout: float = 0.0) -> tuple[SparseLoraLayer, torch.Tensor]:
    torch.manual_seed(3)
    rows, cols = IndexMask(D_OUT, tuple(ROWS.tolist())), IndexMask(D_IN, tuple(COLS.tolist()))
    adapter = ModuleAdapter(R, 6.0, rows=rows, cols=cols)
    made = SparseLoraLayer(nn.Linear(D_IN, D_OUT).requires_grad_(False), "default", adapter, dropout)
    nn.init.normal_(made.pair("default")[1].weight)
    return made, torch.randn(4, D_IN, requires_grad=True)


def test_hooks_on_the_modules_below_are_respected() -> None:
    made, x = layer()
    expected = made(x)
    calls = []
    for module in (made.base_layer, made.pair("default")[0]):
        module.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(made(x), expected)
    assert len(calls) == 3


def test_a_weight_that_hooks_compute_is_left_to_them() -> None:
    """As torch's pruning and its old weight norm do it."""
    base = nn.Linear(4, 3).requires_grad_(False)
    prune.l1_unstructured(base, "weight", 0.5)
    base.requires_grad_(False)
    layer, x = SparseLoraLayer(base, "default", ModuleAdapter(r=2, lora_alpha=4), 0.0), torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ (base.weight_orig * base.weight_mask).T + base.bias)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    made, x = layer(0.3)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        output = checkpoint(made, x, use_reentrant=reentrant) if checkpointed else made(x)
        parameters = [p for p in made.parameters() if p.requires_grad]
        for value in (x, *parameters):
            value.grad = None
        output.square().sum().backward()
        results.append([value.grad.clone() for value in (x, *parameters) if value.grad is not None])
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own, expected)


def test_autocast() -> None:
    made, x = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = made(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    own = x.grad
    x.grad = None
    made(x).sum().backward()
    assert own is not None and x.grad is not None
    torch.testing.assert_close(own, x.grad, rtol=0.05, atol=0.05)


def test_compiled() -> None:
    made, x = layer()
    expected = torch.autograd.grad(made(x).square().sum(), x)[0]
    compiled = torch.compile(made, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_no_positions(dropout: Any) -> None:
    """An expert that no token was sent to."""
    call = Adapted(linear("bias"), 1.0, ROWS, COLS, dropout)
    _, down, up, omega = trained(call, torch.float64, 0.5)
    x = torch.randn(0, D_IN, dtype=torch.float64, requires_grad=True)
    output = adapted_linear(x, down, up, omega, call)
    output.sum().backward()
    assert output.shape == (0, D_OUT) and x.grad is not None and x.grad.shape == (0, D_IN)
    assert down.grad.abs().sum() == up.grad.abs().sum() == omega.grad.abs().sum() == 0


def test_a_trained_bias_of_the_base_gets_its_gradient() -> None:
    made, x = layer()
    made.base_layer.bias.requires_grad_(True)
    made(x).sum().backward()
    assert torch.equal(made.base_layer.bias.grad, torch.full((D_OUT,), float(len(x))))


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_orders_of_the_products_with_b(on_gpu: bool, dtype: torch.dtype) -> None:
    """Nothing of the tensor that addmm does not read comes through, be it NaN."""
    generator = torch.Generator().manual_seed(0)
    outer, wide, hidden = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 7), (7, 3), (5, 3)))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    with patch.object(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, torch.nan)):
        torch.testing.assert_close(times_up(outer, wide, 0.25, on_gpu), 0.25 * outer @ wide, **tolerance)
        found = gradient_of_up(outer, hidden, 0.25, on_gpu)
    torch.testing.assert_close(found, 0.25 * outer.t() @ hidden, **tolerance)
    assert found.shape == (7, 3) and found.is_contiguous() == on_gpu
