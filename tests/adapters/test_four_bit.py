"""Adapters on a 4-bit base (bitsandbytes nf4 on the CPU)."""

from __future__ import annotations

from unittest import mock

import bitsandbytes.functional as quantization
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn import modules as bitsandbytes_modules

from helpers.tiny_models import IDS, LLAMA_MODULES, adapters_of, llama, logits, with_adapters
from sparse_llm_ft.adapters import SparseLoraLayer
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.model.loading import DTYPES, load_model

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def load(folder, dtype):
    with mock.patch("sparse_llm_ft.model.loading.device", lambda: torch.device("cpu")):
        return load_model(ModelConfig(name=str(folder), quantization="nf4", dtype=dtype))


def four_bit_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def codes(layer):
    """The bytes behind the weight (as bfloat16 some of them would be NaN, and unequal to themselves)."""
    return layer.weight.data.contiguous().view(torch.uint8)


def assert_near(actual, expected, dtype):
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=atol)


def test_load_model_forbids_bitsandbytes_to_repack_weights_inside_forward(folder, monkeypatch):
    """On every machine: this one is made to look like a CPU with AVX512-BF16."""
    monkeypatch.setattr(bitsandbytes_modules, "has_avx512bf16", lambda: True)
    assert Linear4bit(4, 4).support_avx512bf16_for_cpu
    model = load(folder, "bfloat16")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    layers = four_bit_layers(model)
    assert len(layers) == 2 * len(LLAMA_MODULES)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    before = {name: codes(layer).clone() for name, layer in layers.items()}
    logits(model)
    assert all(torch.equal(codes(layer), before[name]) for name, layer in layers.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_is_that_of_the_dequantized_base_plus_the_adapter(folder, dtype):
    """y = W' x + omega * (lora_alpha / r) * B A x with W' what the 4-bit codes stand for; dx = g (W' + ... B A)."""
    model = with_adapters(load(folder, dtype), r=4, lora_alpha=8.0, train_omega=True)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert isinstance(layer, SparseLoraLayer)
    layer.lora_omega["default"].data.fill_(0.5)
    base = layer.base_layer
    w = quantization.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    update = 0.5 * 2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    x = torch.randn(3, 5, base.in_features).to(DTYPES[dtype]).requires_grad_()
    output = layer(x)
    assert output.dtype == DTYPES[dtype]
    assert_near(output.detach(), x.detach().float() @ (w + update.float()).T, dtype)
    assert (x.detach().float() @ update.float().T).abs().max() > 0.1 * output.abs().max()
    g = torch.randn(3, 5, base.out_features)
    output.backward(g.to(DTYPES[dtype]))
    assert_near(x.grad, g @ (w + update.float()), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_leave_the_logits_and_backward_reaches_only_the_adapters(folder, dtype):
    base = load(folder, dtype)
    expected = logits(base)
    model = with_adapters(base, r=4, train_omega=True)
    named = adapters_of(model)
    assert len(named) == 3 * 2 * len(LLAMA_MODULES)
    assert not torch.allclose(logits(model), expected)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in named.items():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    trained = {id(parameter) for parameter in named.values()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in trained]
    assert len(rest) > 2 * len(LLAMA_MODULES)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in rest)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert torch.equal(logits(model), expected)
