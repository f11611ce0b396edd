"""Answers as spans of a context: what is learned about them, and which one an encoder chooses.

Source: Devlin et al., 2019, https://arxiv.org/abs/1810.04805, section 4.2 and 4.3, and its script for SQuAD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.spans import SpanSample
from sparse_llm_ft.evaluation.loop import evaluation_batches
from sparse_llm_ft.objectives.base import lengths_of
from sparse_llm_ft.objectives.spans import SpanObjective

LONGEST = 30
"""Most tokens of an answer."""

BEST = 20
"""How many of the most probable starts, and ends, of a window are tried."""


def choose_spans(
    model: nn.Module,
    examples: Sequence[Example],
    samples: Sequence[SpanSample],
    objective: SpanObjective,
    batch_size: int,
    rank: int,
    world_size: int,
    unanswerable: bool,
) -> list[str]:
    """Collective. The answer chosen for every example, in order, on every rank: a piece of its context.

    The span has the largest sum of start and end logit over all windows of an example. It has at most `LONGEST` tokens
    of the context, and comes from the `BEST` starts and ends of each window.

    Args:
        samples: all windows of the examples.
        unanswerable: whether questions may have no answer: "" where the least sum of the classification token's two
            logits, over the windows of an example, is larger than the best span's. Without, "" stands only where no
            span can be formed.
    """
    scores, spans = rank_spans(model, samples, objective, batch_size, rank, world_size)
    if world_size > 1:
        dist.all_reduce(scores)
        dist.all_reduce(spans)
    return spans_of(examples, samples, scores.cpu(), spans.cpu(), unanswerable)


def rank_spans(
    model: nn.Module,
    samples: Sequence[SpanSample],
    objective: SpanObjective,
    batch_size: int,
    rank: int,
    world_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collective. What this rank finds in its windows, see `choose_spans`.

    Returns:
        (windows, 2) float64, the score of the best span (-inf: there is none) and of no answer; and (windows, 2)
        int64, that span's first and last token. 0 where another rank judges: the sum over ranks is everybody's.
    """
    device = next(model.parameters()).device
    scores = torch.zeros((len(samples), 2), dtype=torch.float64, device=device)
    spans = torch.zeros((len(samples), 2), dtype=torch.long, device=device)
    lengths = lengths_of(samples, objective)
    with evaluation_batches(model, samples, lengths, objective.batch, batch_size, rank, world_size) as batches:
        for indices, batch in batches:
            starts, ends = objective.logits(model, batch)
            for row, i in enumerate(indices):
                sample = samples[i]
                allowed = torch.tensor([offset is not None for offset in sample.offsets], device=device)
                best, spans[i] = _best_span(starts[row, : len(allowed)], ends[row, : len(allowed)], allowed)
                scores[i] = torch.stack([best, starts[row, sample.null] + ends[row, sample.null]])
    return scores, spans


def _best_span(starts: torch.Tensor, ends: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best score (-inf: there is none) and its (2,) first and last token, from logits (tokens,)."""
    count = min(BEST, len(starts))
    (a, first), (b, last) = starts.topk(count), ends.topk(count)
    first, last = first[:, None], last[None, :]
    possible = allowed[first] & allowed[last] & (first <= last) & (last < first + LONGEST)
    score, place = (a[:, None] + b[None, :]).masked_fill(~possible, -torch.inf).flatten().max(0)
    return score, torch.stack([first.flatten()[place // count], last.flatten()[place % count]])


def spans_of(
    examples: Sequence[Example],
    samples: Sequence[SpanSample],
    scores: torch.Tensor,
    spans: torch.Tensor,
    unanswerable: bool,
) -> list[str]:
    """The texts of `choose_spans` from what all ranks found, see `rank_spans`."""
    best, null, texts = [-torch.inf] * len(examples), [torch.inf] * len(examples), [""] * len(examples)
    for sample, (score, no_answer), (start, end) in zip(samples, scores.tolist(), spans.tolist(), strict=True):
        i = sample.example
        null[i] = min(null[i], no_answer)
        first, last = sample.offsets[start], sample.offsets[end]
        if score > best[i] and first and last:
            best[i], texts[i] = score, examples[i].texts[1][first[0] : last[1]].strip()
    if unanswerable:
        return ["" if nothing > score else text for nothing, score, text in zip(null, best, texts, strict=True)]
    return texts
