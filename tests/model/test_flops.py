"""Operations of a step against torch's own counter, and the layer down to which backward goes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    T5Config,
)

from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.model import flops
from sparse_llm_ft.model.flops import StepFlops, lowest_layer, model_flops, peak_flops, plan_flops
from sparse_llm_ft.model.prefix import Prefix
from sparse_llm_ft.plan import AdapterPlan, uniform_plan

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2)
TOKENS, LENGTH = 12, 6


def counted(config: LlamaConfig, lowest: int, supervised: int, whole: bool, cached: bool = False) -> int:
    """What torch counts in one step with eager attention, which looks back and ahead and masks half of it."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(whole)
    if lowest < len(model.model.layers) and not whole:
        layer = model.model.layers[lowest]
        layer.register_forward_pre_hook(lambda _, given: (given[0].requires_grad_(), *given[1:]))
    elif not whole:
        model.model.norm.register_forward_pre_hook(lambda _, given: (given[0].requires_grad_(), *given[1:]))
    ids = torch.zeros((TOKENS // LENGTH, LENGTH), dtype=torch.long)
    prefix, started = Prefix(model, max(lowest, 1)), nullcontext()
    if cached:
        with prefix.recording() as recorded:
            model(ids, use_cache=False)
        started = prefix.starting(recorded.states)
    with started, FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False, logits_to_keep=supervised).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("lowest", [0, 2, 3])
@pytest.mark.parametrize("supervised", [2, 6])
def test_a_frozen_base_equals_torchs_count(lowest: int, supervised: int) -> None:
    sizes = model_flops(AutoModelForCausalLM.from_config(LLAMA))
    assert sizes is not None and sizes.causal
    both_ways = replace(sizes, causal=False)
    rows = supervised * TOKENS // LENGTH
    found = both_ways.step(TOKENS, TOKENS * LENGTH, rows, lowest)
    assert found == counted(LLAMA, lowest, supervised, whole=False)
    attention = sizes.attention * TOKENS * LENGTH  # half of the map lies in the past
    assert sizes.step(TOKENS, TOKENS * LENGTH, rows, lowest) == found - attention * (2 * 3 + 4 * (3 - lowest))


def test_layers_below_a_cached_state_do_not_count() -> None:
    sizes = replace(model_flops(AutoModelForCausalLM.from_config(LLAMA)), causal=False)
    found = sizes.step(TOKENS, TOKENS * LENGTH, 2 * TOKENS // LENGTH, 2, cached=1.0)
    assert found == counted(LLAMA, 2, 2, whole=False, cached=True)
    assert found < sizes.step(TOKENS, TOKENS * LENGTH, 2 * TOKENS // LENGTH, 2, cached=0.5)


def test_a_whole_model_makes_gradients_of_its_weights_too() -> None:
    sizes = model_flops(AutoModelForCausalLM.from_config(LLAMA))
    assert sizes is not None
    found = replace(sizes, causal=False).step(TOKENS, TOKENS * LENGTH, TOKENS, 0, whole=True)
    # In the lowest layer torch makes no gradient of nothing but the embeddings, which are no matrix product.
    assert found == counted(LLAMA, 0, LENGTH, whole=True)


def test_gpt2_and_an_encoder_are_known() -> None:
    gpt2 = model_flops(AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40)))
    assert gpt2 is not None and gpt2.layers == (12 * 16 * 16,) * 2 and gpt2.causal and gpt2.head == 640
    bert = model_flops(AutoModelForSequenceClassification.from_config(BertConfig(**SIZES)))
    assert bert is not None and not bert.causal and bert.head == 0
    assert bert.layers == (4 * 16 * 16 + 2 * 16 * 24,) * 3


def test_what_the_arithmetic_does_not_hold_for_is_not_guessed() -> None:
    t5 = T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
    assert model_flops(AutoModelForSeq2SeqLM.from_config(t5)) is None
    for config in (MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8), MixtralConfig(**SIZES)):
        assert model_flops(AutoModelForCausalLM.from_config(config)) is None
    assert model_flops(torch.nn.Linear(2, 2)) is None


def plan_of(layers: list[int], trained: tuple[str, ...] = ()) -> AdapterPlan:
    model = AutoModelForCausalLM.from_config(LLAMA)
    plan = uniform_plan(find_targets(model, "all-linear"), 2, 4, 0.0)
    modules = {name: a if any(f".{i}." in name for i in layers) else None for name, a in plan.modules.items()}
    return replace(plan, modules=modules, trained=trained)


def test_the_lowest_layer_that_trains_something() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    assert [lowest_layer(model, plan_of(layers)) for layers in ([0, 1, 2], [1, 2], [2])] == [0, 1, 2]
    assert lowest_layer(model, plan_of([2], ("lm_head",))) == 2
    assert lowest_layer(model, plan_of([2], ("model.embed_tokens",))) == 0
    assert lowest_layer(model, plan_of([], ("lm_head",))) == 3
    assert lowest_layer(model, plan_of([], ("",))) == 0


def test_a_share_of_the_peak_only_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert plan_flops(model, plan_of([0]), "bfloat16", cpu, 1) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "Some": None}
    for name, expected in names.items():
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(cuda) == expected
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    found = plan_flops(model, plan_of([1]), "bfloat16", cuda, 2)
    assert isinstance(found, StepFlops) and (found.lowest, found.whole, found.peak) == (1, False, 2 * 312e12)
    assert found.mfu(TOKENS, 72, 6, 0.5) == found.model.step(TOKENS, 72, 6, 1) / (2 * 312e12 * 0.5)
    assert plan_flops(model, plan_of([1]), "float32", cuda, 2) is None
