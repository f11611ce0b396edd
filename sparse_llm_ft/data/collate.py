"""Samples -> tensors. The padding side is decided here; the tokenizer's own setting is ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from sparse_llm_ft.data.samples import Pack, Sample, TextSample

IGNORE_INDEX = -100
"""Label of a position that the loss ignores."""

Batch = dict[str, torch.Tensor]
"""A tensor without dimensions is a number that the host reads, so that it stays on the CPU."""


def collate_causal_lm(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Right-padded batch for a decoder.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (len(samples), longest) int64. Prompt and padding have
        the label `IGNORE_INDEX`.
    """
    ids, mask = padded([(*sample.prompt_ids, *sample.completion_ids) for sample in samples], pad_token_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, sample in zip(labels, samples, strict=True):
        row[len(sample.prompt_ids) : sample.length] = torch.tensor(sample.completion_ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def collate_packed(packs: Sequence[Pack], pad_token_id: int, in_one_row: bool = False) -> Batch:
    """Right-padded batch of sequences that hold several samples each.

    Args:
        in_one_row: concatenate all sequences into one row without padding.

    Returns:
        The tensors of `collate_causal_lm`, and ``position_ids``, which restart at 0 with every sample: transformers'
        models separate samples by them if they get no attention mask. Padding counts as a sample of its own. A
        sample's first token has the label `IGNORE_INDEX`: the previous sample must not predict it. For one row also
        ``cu_seq_lens`` (samples + 1,) int32, where each sample begins and the last one ends, and ``max_length`` (), the
        longest one's: flash attention takes them, and transformers would ask the device for them in every layer.
    """
    if in_one_row:
        packs = [Pack(tuple(sample for pack in packs for sample in pack.samples))]
    ids, mask = padded([pack.ids for pack in packs], pad_token_id)
    labels, positions = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    width = ids.shape[1]
    for i, pack in enumerate(packs):
        start = 0
        for sample in pack.samples:
            end = start + sample.length
            positions[i, start:end] = torch.arange(sample.length)
            labels[i, start + len(sample.prompt_ids) : end] = torch.tensor(sample.completion_ids)
            start = end
        positions[i, start:] = torch.arange(width - start)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    if in_one_row:
        lengths = torch.tensor([0, *(sample.length for sample in packs[0].samples)], dtype=torch.int32)
        batch |= {"cu_seq_lens": lengths.cumsum(0, dtype=torch.int32), "max_length": lengths.max()}
    return batch


def collate_seq2seq(samples: Sequence[Sample], pad_token_id: int, start_token_id: int) -> Batch:
    """Right-padded batch for an encoder-decoder.

    Returns:
        ``input_ids`` and ``attention_mask`` (len(samples), longest prompt); ``decoder_input_ids`` (the labels shifted
        right behind the start token), ``decoder_attention_mask`` and ``labels``, each (len(samples), longest
        completion). The two widths differ, so the width identifies a mask.
    """
    ids, mask = padded([sample.prompt_ids for sample in samples], pad_token_id)
    width = max(len(sample.completion_ids) for sample in samples)
    width += width == ids.shape[1]
    inputs, decoder_mask = padded([(start_token_id, *s.completion_ids[:-1]) for s in samples], pad_token_id, width)
    labels, _ = padded([sample.completion_ids for sample in samples], IGNORE_INDEX, width)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch | {"decoder_input_ids": inputs, "decoder_attention_mask": decoder_mask}


def collate_classification(samples: Sequence[TextSample], pad_token_id: int) -> Batch:
    """Right-padded batch for a classification head.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the samples have type ids, ``token_type_ids``, each
        (len(samples), longest) int64; ``labels`` (len(samples),) int64, or float32 in a regression.
    """
    ids, mask = padded([sample.ids for sample in samples], pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([sample.label for sample in samples])}
    types = [sample.type_ids for sample in samples if sample.type_ids is not None]
    if types:
        batch["token_type_ids"] = padded(types, 0)[0]
    return batch


def collate_prompts(samples: Sequence[Sample], pad_token_id: int, side: Literal["left", "right"] = "left") -> Batch:
    """Padded prompts for generation: ``input_ids`` and ``attention_mask``, each (len(samples), longest).

    Args:
        side: where the padding goes; a decoder needs it on the left, since it continues behind its prompt.
    """
    ids, mask = padded([sample.prompt_ids for sample in samples], pad_token_id, left=side == "left")
    return {"input_ids": ids, "attention_mask": mask}


def padded(
    rows: Sequence[Sequence[int]], filler: int, width: int | None = None, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows to one tensor. Returns the values and the mask (1: row, 0: filler), each (rows, width) int64."""
    width = max(map(len, rows)) if width is None else width
    values = torch.full((len(rows), width), filler)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        values[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return values, mask
