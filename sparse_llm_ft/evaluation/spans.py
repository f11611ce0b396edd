"""Chooses an encoder's answer spans in extractive question answering.

Source: Devlin et al., 2019, https://arxiv.org/abs/1810.04805, sections 4.2 and 4.3, and its SQuAD script.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.spans import SpanSample
from sparse_llm_ft.evaluation.loop import evaluation_batches
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.objectives.base import lengths_of
from sparse_llm_ft.objectives.spans import SpanObjective

LONGEST = 30
"""Maximum tokens of an answer."""

BEST = 20
"""Number of most probable starts, and of ends, that are combined per window."""


def choose_spans(
    model: nn.Module,
    examples: Sequence[Example],
    samples: Sequence[SpanSample],
    objective: SpanObjective,
    batch_size: int,
    rank: int,
    world_size: int,
    unanswerable: bool,
    wait: Wait | None = None,
) -> list[str]:
    """Collective. Every rank gets every example's answer, in order: a span of its context.

    The span has the largest sum of start and end logit over all windows of an example. It has at most `LONGEST` tokens
    and combines one of the `BEST` starts with one of the `BEST` ends of a window.

    Args:
        samples: all windows of the examples.
        unanswerable: whether questions may have no answer. Then the answer is "" if the classification token's two
            logits have a larger sum in every window than the best span. Otherwise it is "" only if no span is possible.
        wait: shows how many batches are done.
    """
    scores, spans = rank_spans(model, samples, objective, batch_size, rank, world_size, wait)
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
    wait: Wait | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collective. The best spans of this rank's windows, see `choose_spans`.

    Returns:
        (windows, 2) float64, the scores of the best span (-inf if there is none) and of no answer; and (windows, 2)
        int64, that span's first and last token. Other ranks' rows are 0, so that an all-reduce collects all windows.
    """
    device = next(model.parameters()).device
    scores = torch.zeros((len(samples), 2), dtype=torch.float64, device=device)
    spans = torch.zeros((len(samples), 2), dtype=torch.long, device=device)
    lengths = lengths_of(samples, objective)
    with evaluation_batches(
        model, samples, lengths, objective.batch, batch_size, rank, world_size, wait=wait
    ) as batches:
        for indices, batch in batches:
            starts, ends = objective.logits(model, batch)
            for row, i in enumerate(indices):
                sample = samples[i]
                allowed = torch.tensor([offset is not None for offset in sample.offsets], device=device)
                best, spans[i] = _best_span(starts[row, : len(allowed)], ends[row, : len(allowed)], allowed)
                scores[i] = torch.stack([best, starts[row, sample.null] + ends[row, sample.null]])
    return scores, spans


def _best_span(starts: torch.Tensor, ends: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best score (-inf if no span is possible) and its (2,) first and last token, from logits (tokens,)."""
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
    """The texts of `choose_spans`, from all ranks' results of `rank_spans`."""
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
