"""The loss in the output head: its value and gradient against torch's, what it keeps, and which heads it fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_llm_ft.data.collate import IGNORE_INDEX
from sparse_llm_ft.model import head_loss
from sparse_llm_ft.model.head_loss import chunked_cross_entropy, head_targets, make_head_lean

N, D, V = 7, 5, 11


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("elements", [V, 3 * V, 100 * V])  # one position in a chunk, three, all
def test_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, elements: int, bias: bool) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    hidden = torch.randn(N, D, requires_grad=True)
    weight, offset = torch.randn(V, D), torch.randn(V) if bias else None
    targets = torch.randint(0, V, (N,))
    targets[2] = targets[6] = IGNORE_INDEX
    own = chunked_cross_entropy(hidden, weight, offset, targets)
    expected = F.cross_entropy(F.linear(hidden, weight, offset), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    for factor in (1.0, 0.25):
        pair = [torch.autograd.grad(loss * factor, hidden, retain_graph=True)[0] for loss in (own, expected)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_no_position() -> None:
    hidden = torch.randn(0, D, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(V, D), None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None and hidden.grad.shape == (0, D)


def test_keeps_the_gradient_alone() -> None:
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        chunked_cross_entropy(hidden, weight, None, torch.randint(0, V, (N,)))
    assert kept == [(N, D)]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "pad_token_id": 0,
    }
    if kind == "gemma2":  # caps its logits
        return Gemma2ForCausalLM(Gemma2Config(**sizes)).requires_grad_(False)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")).requires_grad_(False)


IDS = torch.tensor([[3, 4, 5, 6, 7], [1, 2, 3, 4, 5]])
POSITIONS = torch.tensor([1, 3])


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_model_returns_the_loss_of_targets_and_logits_without(kind: str) -> None:
    model = tiny(kind)
    plain: Any = model(input_ids=IDS, logits_to_keep=POSITIONS).logits
    targets = IDS[:, POSITIONS + 1]
    assert make_head_lean(model) and not make_head_lean(model)
    torch.testing.assert_close(model(input_ids=IDS, logits_to_keep=POSITIONS).logits, plain)
    with head_targets(targets):
        loss = model(input_ids=IDS, logits_to_keep=POSITIONS).logits
    torch.testing.assert_close(loss, F.cross_entropy(plain.flatten(0, 1), targets.flatten(), reduction="sum"))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_trained_head_returns_logits(part: str) -> None:
    model = tiny("llama")
    head: Any = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(V), requires_grad=False)
    assert make_head_lean(model)
    getattr(head, part).requires_grad_(True)
    with head_targets(IDS[:, POSITIONS + 1]):
        assert model(input_ids=IDS, logits_to_keep=POSITIONS).logits.shape == (2, 2, V)


def test_a_model_that_changes_its_logits_is_left_alone() -> None:
    model = tiny("gemma2")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    assert not make_head_lean(model)
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}


def test_another_kind_of_head_is_left_alone() -> None:
    model = tiny("llama")
    model.set_output_embeddings(nn.Sequential(nn.Linear(8, V)))
    assert not make_head_lean(model)
