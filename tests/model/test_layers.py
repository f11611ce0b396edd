"""Layers found by structure, and compiled: the same losses, one trace for all layers, the same names."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, LlamaConfig, MixtralConfig, T5Config

from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.model import layers
from sparse_llm_ft.model.layers import compile_layers, layer_lists
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.objectives.base import evaluating
from sparse_llm_ft.plan import uniform_plan

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
LAYERS = 10  # more than torch compiles one function for (8)


def test_stacks_of_layers() -> None:
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=1))
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40))
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
    )
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_hidden_layers=2))
    found = [{name: len(stack) for name, stack in layer_lists(model).items()} for model in (llama, gpt2, t5, mixtral)]
    assert found == [
        {"model.layers": 1},
        {"transformer.h": 2},
        {"encoder.block": 2, "decoder.block": 2},
        {"model.layers": 2},
    ]
    assert layer_lists(torch.nn.Sequential(torch.nn.Linear(2, 2))) == {} and compile_layers(torch.nn.Linear(2, 2)) == 0


def losses(compiled: bool, checkpointing: bool) -> list[float]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=LAYERS, num_key_value_heads=2))
    base.requires_grad_(False)
    make_lean(base)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = add_adapters(base, uniform_plan(find_targets(base, "all-linear"), 2, 4, 0.0)).train()
    names = [name for name, _ in model.named_parameters()]
    if compiled:
        assert compile_layers(model) == LAYERS
    assert [name for name, _ in model.named_parameters()] == names
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    found = []
    for length in (6, 9):
        ids = torch.randint(0, 40, (2, length))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        found.append(float(loss.detach()))
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= 0.5 * gradient
    return found


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.long)], ids=["plain", "checkpointing"]
)
def test_compiled_layers_lose_nothing(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BACKEND", "aot_eager")
    counters.clear()
    compiled = losses(True, checkpointing)
    assert counters["frames"]["ok"] == counters["frames"]["total"] <= 4  # not one for each layer
    assert not counters["graph_break"]
    assert compiled == pytest.approx(losses(False, checkpointing), rel=1e-5)
    assert compiled[0] != compiled[1]


def test_a_measurement_sees_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch traces no hook that a layer gets later: evaluation and scores run layers as they are written."""
    monkeypatch.setattr(layers, "BACKEND", "aot_eager")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=1))
    compile_layers(model)
    ids = torch.zeros((1, 4), dtype=torch.long)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    seen: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    counters.clear()
    with evaluating(model), torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert seen == [1] and not counters["frames"]


@pytest.mark.long
def test_inductor_loses_nothing() -> None:
    compiled = losses(True, False)
    assert compiled == pytest.approx(losses(False, False), rel=1e-5)
