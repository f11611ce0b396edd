"""Rotary embeddings as one function: transformers' bits and gradients, whose attention gets it, and for which calls."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from sparse_llm_ft.model import fused, rotary
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.rotary import rotary_form, rotate

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[3, 4, 5, 6, 7], [1, 2, 3, 4, 5]])
DTYPES = [torch.float32, torch.bfloat16]


def draw(batch: int, angles: int, length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """q (B, 4, T, 8) and k (B, 2, T, 8) as projections lay them out, and cos and sin."""
    torch.manual_seed(batch + length)
    heads = [torch.randn(batch, length, n, 8, dtype=dtype).transpose(1, 2).requires_grad_() for n in (4, 2)]
    return heads, [torch.randn(angles, length, 8, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "angles", "length"), [(1, 1, 5), (3, 1, 5), (3, 3, 4), (2, 1, 1)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_values_and_gradients_are_transformers_bit_by_bit(
    batch: int, angles: int, length: int, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:
        monkeypatch.setattr(fused, "FUSED", {"cpu"})
    heads, table = draw(batch, angles, length, dtype)
    expected, own = apply_rotary_pos_emb(*heads, *table), rotate(None, *heads, *table)  # type: ignore[arg-type]
    outer = [torch.randn_like(value) for value in expected]
    gradients = [torch.autograd.grad(pair, heads, outer) for pair in (expected, own)]
    for found, others in ((own, expected), (gradients[1], gradients[0])):
        assert all(map(torch.equal, found, others))
    assert [value.stride() for value in own] == [value.stride() for value in heads]
    assert fused.Fused.problem is None


def test_derivative() -> None:
    heads, table = draw(2, 1, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotate(None, q, k, *table), heads)  # type: ignore[arg-type]


def test_backward_keeps_the_table_alone() -> None:
    heads, table = draw(2, 1, 3, torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        rotate(None, *heads, *table)  # type: ignore[arg-type]
    assert [value.data_ptr() for value in kept] == [value.data_ptr() for value in table]


@pytest.mark.parametrize("case", ["part of a head", "another type", "an argument", "a trained table"])
def test_other_calls_are_transformers_own(case: str) -> None:
    (q, k), (cos, sin) = draw(2, 1, 3, torch.float32)
    more = {}
    if case == "part of a head":
        cos, sin = cos[..., :4], sin[..., :4]
    elif case == "another type":
        cos, sin = cos.bfloat16(), sin.bfloat16()
    elif case == "an argument":
        more = {"unsqueeze_dim": 1}
    else:
        sin.requires_grad_()
    calls: list[Any] = []
    rotate(lambda *args, **named: calls.append((args, named)), q, k, cos, sin, **more)  # type: ignore[arg-type,return-value]
    ((args, named),) = calls
    assert [id(value) for value in args] == [id(value) for value in (q, k, cos, sin)] and named == more


def test_one_model_changes_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False)
    other = copy.deepcopy(model)
    calls: list[str] = []
    own = rotary._Rotary.apply
    monkeypatch.setattr(rotary._Rotary, "apply", lambda *args: calls.append("own") or own(*args))
    assert make_lean(model) == 10 and make_lean(model) == 0
    embedded = [m(inputs_embeds=m.get_input_embeddings()(IDS).requires_grad_()) for m in (model, other)]
    assert calls == ["own", "own"] and modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb
    assert torch.equal(embedded[0].logits, embedded[1].logits)
    # A copy of a changed model computes with its own modules.
    again = copy.deepcopy(model)
    nn.init.zeros_(again.model.layers[0].self_attn.v_proj.weight)
    assert not torch.equal(again(IDS).logits, model(IDS).logits)


def test_generation_with_a_cache_is_the_same() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    make_lean(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


def test_heads_that_are_rotated_in_part() -> None:
    """Phi calls the function on a part of each head, whose tensors are not contiguous."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5))
    before = model(IDS).logits
    assert make_lean(model) == 2 + 1  # and the head
    torch.testing.assert_close(model(IDS).logits, before)


class Interleaved(LlamaAttention):
    """Its function is another one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return apply_rotary_pos_emb_of_another_kind(*args, **kwargs)


def apply_rotary_pos_emb_of_another_kind(q: torch.Tensor, k: torch.Tensor) -> Any:
    return q, k


def test_what_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (CohereAttention, Interleaved, nn.Linear):  # Cohere turns neighbouring numbers
        assert rotary_form(object.__new__(kind)) is None
    assert rotary_form(object.__new__(LlamaAttention)) is not None

    def scaled(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return tuple(value * 1.001 for value in apply_rotary_pos_emb(q, k, cos, sin))

    monkeypatch.setattr(sys.modules[LlamaAttention.__module__], "apply_rotary_pos_emb", scaled)
    assert rotary_form(object.__new__(LlamaAttention)) is None
