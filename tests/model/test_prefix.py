"""Passes that begin inside a decoder have the outputs of whole passes, on several architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from helpers.tiny_models import IDS, MODELS, llama
from sparse_llm_ft.model.linear import linear_shape
from sparse_llm_ft.model.prefix import Prefix, decoder_layers, lowest_trained, why_not_constant
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, IndexMask, ModuleAdapter, uniform_plan

_SMALL = {"vocab_size": 64, "hidden_size": 32, "attention_dropout": 0.0, "hidden_dropout": 0.0}
DECODERS = {
    **{name: MODELS[name].build for name in ("llama", "mistral", "qwen2", "gpt_neox", "gpt2")},
    # Their layers return tuples.
    "bloom": lambda: BloomForCausalLM(BloomConfig(**_SMALL, n_layer=2, n_head=4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**_SMALL, num_hidden_layers=2, num_attention_heads=4)),
}


def plan_of(model: torch.nn.Module, **changes: object) -> AdapterPlan:
    """An adapter on every linear layer of the decoder's layers."""
    stack = decoder_layers(model)
    names = [name for name, part in model.named_modules() if name.startswith(f"{stack}.") and linear_shape(part)]
    return replace(uniform_plan(dict.fromkeys(names, (32, 32)), 2, 4), **changes)


@pytest.mark.parametrize("name", DECODERS)
def test_a_pass_from_a_layer_on_is_the_whole_pass(name: str) -> None:
    model = DECODERS[name]().train()
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    prefix, layers = Prefix(model, 1), model.get_submodule(decoder_layers(model))
    calls = []
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    expected = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    with prefix.recording() as recorded:
        assert torch.equal(model(input_ids=IDS, attention_mask=mask, use_cache=False).logits, expected)
    states = recorded.states.clone()
    states[1, 4:] = 7.0  # padding
    before = len(calls)
    with prefix.starting(states):
        found = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    assert len(calls) == before == 2
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-6)
    assert torch.equal(model(input_ids=IDS, attention_mask=mask, use_cache=False).logits, expected)
    assert why_not_constant(model, plan_of(model), 16) is None


def test_a_decoder_with_a_head_for_labels() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**_TINY, num_labels=3, pad_token_id=0)).train()
    plan = plan_of(model, trained=("score",))
    assert why_not_constant(model, plan, 16) is None and lowest_trained(model, plan) == 0
    upper = {name: a if ".1." in name else None for name, a in plan.modules.items()}
    assert lowest_trained(model, replace(plan, modules=upper)) == 1
    prefix = Prefix(model, 1)
    with prefix.recording() as recorded:
        expected = model(input_ids=IDS).logits
    with prefix.starting(recorded.states):
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-6)


def test_the_lowest_layer_is_that_of_adapters_and_of_what_is_trained_whole() -> None:
    model = llama(4)
    plan = plan_of(model)
    assert lowest_trained(model, plan) == 0
    upper = {name: a if ".2." in name or ".3." in name else None for name, a in plan.modules.items()}
    assert lowest_trained(model, replace(plan, modules=upper)) == 2
    trained = ("model.layers.1.input_layernorm", "lm_head")
    assert lowest_trained(model, replace(plan, modules=upper, trained=trained)) == 1
    assert lowest_trained(model, replace(plan, modules=dict.fromkeys(plan.modules), trained=("lm_head",))) is None
    assert lowest_trained(model, replace(plan, modules=upper, trained=("model.embed_tokens",))) == 0
    head = AdapterPlan({**dict.fromkeys(plan.modules), "lm_head": ModuleAdapter(2, 4.0)})
    assert lowest_trained(model, head) is None


def test_what_is_no_constant_function_of_the_sample_has_a_reason() -> None:
    def why(name: str = "llama", **settings: object) -> str | None:
        model = MODELS[name].build() if not settings else LlamaForCausalLM(LlamaConfig(**_TINY, **settings))
        return why_not_constant(model, plan_of(model) if name != "bert" else AdapterPlan({}, trained=("x",)), 16)

    assert why() is None
    assert "an encoder" in why("bert")
    assert "attention_dropout 0.1" in why(attention_dropout=0.1)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "beyond 8 tokens" in why(max_position_embeddings=8, rope_parameters=scaled)
    assert why(max_position_embeddings=16, rope_parameters=scaled) is None
    model = MODELS["llama"].build()
    plan = plan_of(model)
    assert why_not_constant(model, replace(plan, trained=(FULL_MODEL,)), 16) == "the whole model is trained"
    rows = {"model.embed_tokens": IndexMask(64, (3,))}
    reason = why_not_constant(model, replace(plan, trained=("model.embed_tokens",), rows=rows), 16)
    assert reason == "model.embed_tokens is trained, which may lie below the layers"
    model.model.layers[0].mlp.noisy = torch.nn.Dropout(0.2)
    assert "layers.0.mlp.noisy 0.2" in why_not_constant(model, plan, 16)


_TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
