"""Under flash attention, whose kernels are PyTorch's here, no sample sees another, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, modeling_flash_attention_utils

from helpers.decoders import DECODERS, SAMPLES, alone, build
from helpers.dispatch import WAITS, Operations
from sparse_llm_ft.data.collate import collate_packed
from sparse_llm_ft.data.samples import Pack, Sample
from sparse_llm_ft.objectives.build import build_objective
from sparse_llm_ft.objectives.language_modeling import CompletionObjective

PACKS = (Pack(SAMPLES[:3]), Pack(SAMPLES[3:]))
LLAMAS = [name for name in DECODERS if name != "gpt2"]

Lengths = tuple[list[int], int]


def one_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int], scale: float) -> Any:
    """(L, heads, d), as flash_attn_func documents causal attention in a window of `window[0]` positions behind."""
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (distance >= 0) & ((distance <= window[0]) if window[0] >= 0 else True)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(0, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lengths | None]]:
    """What attention was called with: lengths, or None for rows as they are."""
    found: list[Lengths | None] = []

    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: float, softmax_scale: float, causal: bool, window_size: Any = (-1, -1)
    ) -> Any:
        assert causal
        found.append(None)
        return torch.stack([one_sequence(*row, window_size, softmax_scale) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: Any = (-1, -1),
    ) -> Any:
        assert causal and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k
        places = cu_seqlens_q.numpy()
        found.append((places.tolist(), int(max_seqlen_q)))
        parts = [slice(*pair) for pair in pairwise(places)]
        return torch.cat([one_sequence(q[part], k[part], v[part], window_size, softmax_scale) for part in parts])

    functions = flash_attn_func, flash_attn_varlen_func, None, None, None
    process = modeling_flash_attention_utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, dict))
    )
    yield found


def expected_losses(model: PreTrainedModel) -> list[float]:
    """Of each sample alone, under attention "sdpa"; then the model is given flash attention."""
    with torch.no_grad():
        losses = [float(alone(model, sample)) for sample in SAMPLES]
    model.config._attn_implementation = "flash_attention_2"
    return losses


@pytest.mark.parametrize("name", LLAMAS)
def test_packs_in_one_row(name: str, calls: list[Lengths | None]) -> None:
    model = build(DECODERS[name]())
    expected = expected_losses(model)
    objective = CompletionObjective(0, True, packs_in_one_row=True, takes_lengths=True)
    batch: Any = objective.batch(PACKS)
    batch["max_length"] = int(batch["max_length"])  # which the host reads from memory of its own
    with Operations() as operations:
        loss = objective.loss(model, batch)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(expected), rel=1e-5)
    assert calls == [([0, 7, 13, 16, 25], 9)] * 2
    assert not operations.seen & WAITS


@pytest.mark.parametrize("name", LLAMAS)
def test_padded_rows_are_left_as_they_are(name: str, calls: list[Lengths | None]) -> None:
    model = build(DECODERS[name]())
    expected = expected_losses(model)
    objective = CompletionObjective(0, True, takes_lengths=True)
    batch = objective.batch(SAMPLES)
    with torch.no_grad():
        assert objective.losses(model, batch).tolist() == pytest.approx(expected, rel=1e-5)
    with Operations() as operations:
        objective.loss(model, batch).backward()
    assert calls == [None] * 4
    assert not operations.seen & WAITS


@pytest.mark.parametrize("name", LLAMAS)
def test_one_row_alone(name: str, calls: list[Lengths | None]) -> None:
    """transformers would look for several samples in it, in every layer."""
    model = build(DECODERS[name]())
    expected = expected_losses(model)
    objective = CompletionObjective(0, True, takes_lengths=True)
    for sample, loss in zip(SAMPLES, expected, strict=True):
        batch = objective.batch([sample])
        with Operations() as operations, torch.no_grad():
            found = objective.losses(model, batch)
        assert found.tolist() == pytest.approx([loss], rel=1e-5)
        assert calls == [([0, sample.length], sample.length)] * 2
        assert not operations.seen & WAITS
        calls.clear()


def test_without_lengths_transformers_finds_the_samples_by_their_positions(calls: list[Lengths | None]) -> None:
    """As for models that do not pass them on to their attention."""
    model = build(DECODERS["llama"]())
    expected = expected_losses(model)
    objective = CompletionObjective(0, True, packs_in_one_row=True)
    with Operations() as operations, torch.no_grad():
        loss = objective.loss(model, objective.batch(PACKS))
    assert float(loss) == pytest.approx(sum(expected), rel=1e-5)
    assert calls == [([0, 7, 13, 16, 25], 9)] * 2
    assert operations.seen & WAITS, "the other tests would see it"


def test_the_lengths_of_packs() -> None:
    packs = [Pack((Sample((5, 6), (7, 2)), Sample((8,), (9, 2)))), Pack((Sample((4, 4, 4), (3, 2)),))]
    batch = collate_packed(packs, 0, in_one_row=True)
    assert batch["cu_seq_lens"].tolist() == [0, 4, 7, 12] and batch["cu_seq_lens"].dtype == torch.int32
    assert batch["max_length"].ndim == 0 and int(batch["max_length"]) == 5
    assert not {"cu_seq_lens", "max_length"} & set(collate_packed(packs, 0))


def test_a_model_gets_lengths_if_it_passes_them_on() -> None:
    """Code from the hub may not."""
    model = build(DECODERS["llama"]())
    task: Any = SimpleNamespace(labels=None)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)

    class Narrow(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
            raise NotImplementedError

    for attention, lengths in (("sdpa", False), ("flash_attention_2", True)):
        model.config._attn_implementation = attention
        objective: Any = build_objective(model, tokenizer, task)
        assert (objective.packs_in_one_row, objective.takes_lengths) == (lengths, lengths)
    model.__class__ = Narrow
    objective = build_objective(model, tokenizer, task)
    assert (objective.packs_in_one_row, objective.takes_lengths) == (True, False)
