"""4-bit layers that forget their weight between the passes: the same values, and nothing kept but the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from sparse_llm_ft.model.four_bit import computes_as_its_class, dequantised, frozen_output, release_weights


def layer(bias: bool, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = Linear4bit(64, 32, bias=bias, **{"compute_dtype": torch.float32, "quant_type": "nf4", **settings})
    made.load_state_dict({"weight": torch.randn(32, 64)} | ({"bias": torch.randn(32)} if bias else {}))
    made.support_avx512bf16_for_cpu = False  # as load_model leaves it
    return made.to("cpu").requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant_type": "fp4"},
        {"compress_statistics": False},
        {"compute_dtype": torch.bfloat16, "quant_storage": torch.bfloat16},
        {"compute_dtype": None},
    ],
)
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 64), (0, 64)])
def test_operators_called_directly_give_the_bits_of_bitsandbytes_functions(
    settings: Mapping[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without the Python that `Params4bit` has each operation call."""
    for bias in (False, True):
        made = layer(bias, **settings)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            expected = Linear4bit.forward(made, x)
            matrix = dequantize_4bit(made.weight, made.weight.quant_state)
            with monkeypatch.context() as patch:
                patch.setattr(Params4bit, "__torch_function__", None)
                patch.setattr(Linear4bit, "forward", None if x.numel() else Linear4bit.forward)
                output, own = frozen_output(made, x), dequantised(made.weight, made.weight.quant_state)
            assert output.dtype == expected.dtype and torch.equal(output, expected)
            assert type(own) is torch.Tensor and own.dtype == matrix.dtype and torch.equal(own, matrix)


def test_a_first_call_sets_the_type_of_the_computation() -> None:
    made, x = layer(False, compute_dtype=None), torch.randn(2, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(frozen_output(made, x), Linear4bit.forward(layer(False, compute_dtype=None), x))
    assert made.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradient_are_bitsandbytes_own(bias: bool) -> None:
    x = torch.randn(3, 5, 64, requires_grad=True)
    results = []
    for released in (False, True):
        made = layer(bias)
        if released:
            release_weights(nn.ModuleList([made]))
        output = made(x)
        results.append((output, torch.autograd.grad(output.square().sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-5)


def test_keeps_its_parameter_alone_and_reads_it_in_backward() -> None:
    made, x = layer(False), torch.randn(2, 64, requires_grad=True)
    release_weights(made)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = made(x)
    assert [value is made.weight for value in kept] == [True]
    packed = made.weight.data
    made.weight.data = torch.empty(0, dtype=packed.dtype)  # as ZeRO-3 leaves it after the forward pass
    made.weight.data = packed.clone()
    output.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_other_layers_and_trained_biases_are_left_alone() -> None:
    plain = nn.Linear(4, 4)
    release_weights(plain)
    assert "forward" not in plain.__dict__ and computes_as_its_class(plain)
    plain.forward = lambda x: x  # type: ignore[method-assign]
    assert not computes_as_its_class(plain)
    made = layer(True)
    release_weights(made)
    assert computes_as_its_class(made)
    made.bias.requires_grad_(True)
    made(torch.randn(2, 64)).sum().backward()
    assert torch.equal(made.bias.grad, torch.full((32,), 2.0))
