"""Rotary embeddings as one function: transformers' bits and gradients, whose attention gets it, and for which calls."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
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
    expected, own = apply_rotary_pos_emb(*heads, *table), rotate(unused, *heads, *table)
    outer = [torch.randn_like(value) for value in expected]
    gradients = [torch.autograd.grad(pair, heads, outer) for pair in (expected, own)]
    for found, others in ((own, expected), (gradients[1], gradients[0])):
        assert all(map(torch.equal, found, others))
    assert [value.stride() for value in own] == [value.stride() for value in heads]
    assert fused.Fused.problem is None


def test_derivative() -> None:
    heads, table = draw(2, 1, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotate(unused, q, k, *table), heads)


def unused(*args: Any, **named: Any) -> Any:
    raise AssertionError("transformers' function was called")


def test_gradients_are_contiguous_for_the_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention may lay them out by heads, and what is not contiguous would not be compiled."""
    seen: list[bool] = []
    own = rotary._rotated_back
    monkeypatch.setattr(rotary, "_rotated_back", lambda *a: seen.append(all(x.is_contiguous() for x in a)) or own(*a))
    for batch in (1, 2):
        heads, table = draw(batch, 1, 5, torch.float32)
        outer = [torch.randn(value.shape) for value in heads]
        torch.autograd.grad(rotate(unused, *heads, *table), heads, outer)
    assert seen == [True, True]


def test_backward_keeps_the_table_alone() -> None:
    heads, table = draw(2, 1, 3, torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        rotate(unused, *heads, *table)
    assert [value.data_ptr() for value in kept] == [value.data_ptr() for value in table]


def test_results_may_be_changed_in_place_and_need_gradients_where_their_inputs_do() -> None:
    (q, k), table = draw(2, 1, 3, torch.float32)
    own, expected = rotate(unused, q, k.detach(), *table), apply_rotary_pos_emb(q, k.detach(), *table)
    for pair in (own, expected):
        assert [value.requires_grad for value in pair] == [True, False]
        pair[0].mul_(2.0)
    gradients = [torch.autograd.grad(pair[0].square().sum(), q)[0] for pair in (own, expected)]
    assert torch.equal(own[0], expected[0]) and torch.equal(*gradients)


@pytest.mark.parametrize(
    ("q", "k", "table"),
    [
        ((2, 4, 3, 8), (2, 2, 3, 8), (1, 3, 4)),  # a part of each head
        ((2, 4, 3, 7), (2, 2, 3, 7), (1, 3, 7)),
        ((1, 4, 3, 8), (1, 2, 3, 8), (3, 3, 8)),
        ((2, 4, 3, 8), (2, 2, 3, 8), (1, 1, 8)),
        ((1, 4, 1, 8), (1, 2, 1, 8), (1, 3, 8)),
        ((6, 4, 1, 8), (6, 2, 1, 8), (1, 6, 8)),
        ((2, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8)),
        ((2, 4, 3, 8), (2, 2, 1, 8), (2, 3, 8)),
        ((4, 3, 8), (2, 3, 8), (3, 8)),
    ],
)
def test_other_shapes_are_transformers_own(q: tuple[int, ...], k: tuple[int, ...], table: tuple[int, ...]) -> None:
    values = [torch.randn(shape) for shape in (q, k, table, table)]
    assert_passed_on(*values)


def test_other_calls_are_transformers_own() -> None:
    (q, k), (cos, sin) = draw(2, 1, 3, torch.float32)
    assert_passed_on(q, k, cos.bfloat16(), sin.bfloat16())
    assert_passed_on(q, k, cos, sin.clone().requires_grad_())
    assert_passed_on(q, k, cos, sin, None, 1)
    assert_passed_on(q, k, cos, sin, unsqueeze_dim=2)
    assert_passed_on(q, cos=cos, sin=sin)
    assert_passed_on(q, cos)


def assert_passed_on(*args: Any, **named: Any) -> None:
    calls: list[Any] = []
    rotate(lambda *a, **n: calls.append((a, n)), *args, **named)  # type: ignore[arg-type,return-value]
    ((found, others),) = calls
    assert list(map(id, found)) == list(map(id, args)) and others == named


def test_names_of_older_callers_are_renamed_as_before() -> None:
    """transformers does that in a decorator around forward."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    make_lean(model)
    hidden, positions = torch.randn(1, 3, 16), torch.arange(3)[None]
    angles = model.model.rotary_emb(hidden, positions)
    for name in ("cache", "past_key_values"):
        if name in inspect.getsource(modeling_llama.LlamaAttention):
            cache = DynamicCache()
            model.model.layers[0].self_attn(hidden, position_embeddings=angles, attention_mask=None, **{name: cache})
            assert cache.get_seq_length() == 3, name


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

    def of_a_cache(q: torch.Tensor, k: torch.Tensor, table: Any, layer: Any) -> Any:
        return q * table.cos_cached, k

    def asserting(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None) -> Any:
        assert position_ids is not None
        return q, k

    scripted = torch.jit.script(of_two)  # its signature is not known
    for other in (scaled, of_a_cache, asserting, scripted, lambda q, k, cos, sin: q, lambda x: x):
        monkeypatch.setattr(sys.modules[LlamaAttention.__module__], "apply_rotary_pos_emb", other)
        assert rotary_form(object.__new__(LlamaAttention)) is None


def of_two(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q, k
