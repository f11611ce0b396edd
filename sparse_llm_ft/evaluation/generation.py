"""Texts that a model writes: greedily, by beam search, or sampled; over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.collate import collate_prompts
from sparse_llm_ft.data.samples import Sample
from sparse_llm_ft.evaluation.loop import evaluation_batches
from sparse_llm_ft.model.architecture import base_of


def generate(
    model: nn.Module,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    rank: int,
    world_size: int,
    synced: bool,
    seed: int = 0,
    seq2seq: bool = False,
) -> list[str]:
    """Collective. The text that the model writes after every sample's prompt, in order, on every rank.

    A text ends before the first token that ends sequences: the tokenizer's, or one that the checkpoint's generation
    settings name, as those of chat models do. Nothing else of the checkpoint's generation settings counts, but for the
    first token that an encoder-decoder is made to write. Neither batches nor ranks change a text, sampled ones
    included (`GumbelNoise`).

    Args:
        settings: ``num_beams`` and ``length_penalty``; ``temperature`` (above 0: samples) and ``top_p``;
            ``max_new_tokens`` and ``micro_batch_size``. Beams are searched until none that is unfinished is likely to
            become better than the best finished one (transformers' ``early_stopping=False``).
        synced: ZeRO-3, where ranks must make equally many forward passes.
        seed: of sampling.
        seq2seq: an encoder reads the prompt, and a decoder writes from its start token on.
    """
    tokens = rank_tokens(model, samples, tokenizer, settings, rank, world_size, synced, seed, seq2seq)
    if world_size > 1:
        dist.all_reduce(tokens)
    rows = [row[row > 0] - 1 for row in tokens.cpu()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]


def rank_tokens(
    model: nn.Module,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    rank: int,
    world_size: int,
    synced: bool,
    seed: int,
    seq2seq: bool,
) -> torch.Tensor:
    """Collective. What this rank writes, see `generate`.

    Returns:
        (samples, max_new_tokens) int64 on the model's device: each token's id plus 1, and 0 where nothing was
        written, or by another rank: the sum over ranks is everybody's, and no text has to be sent.
    """
    bare: Any = model
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer made sure"
    device = next(model.parameters()).device
    options = _options(model, tokenizer, settings, seq2seq)
    stops = torch.tensor(options.eos_token_id, device=device)
    tokens = torch.zeros((len(samples), settings.max_new_tokens), dtype=torch.long, device=device)
    collate = partial(collate_prompts, pad_token_id=tokenizer.pad_token_id, side="right" if seq2seq else "left")
    lengths = [len(sample.prompt_ids) for sample in samples]
    with (
        _without_own_settings(model),
        evaluation_batches(model, samples, lengths, collate, settings.micro_batch_size, rank, world_size) as batches,
    ):
        for indices, batch in batches:
            begin = 1 if seq2seq else batch["input_ids"].shape[1]
            output = bare.generate(
                **batch,
                generation_config=options,
                logits_processor=_sampling(settings, seed, indices or [0], begin),
                synced_gpus=synced,
            )
            for row, i in zip(output[:, begin:], indices, strict=False):
                written = row[: int((~torch.isin(row, stops)).long().cumprod(0).sum())]
                tokens[i, : len(written)] = written + 1
    return tokens


class GumbelNoise(LogitsProcessor):
    """Makes of greedy decoding an exact sampling: argmax_v (s_v + g_v), with g_v = -log(-log u_v) and u_v uniform in
    (0, 1), is distributed as softmax(s) (Gumbel-max; Maddison et al., 2014, https://arxiv.org/abs/1411.0030).

    The noise of the token at place t of sample i depends on (seed, i, t) alone. So a text does not depend on who shares
    its batch or its rank, and nobody else's random numbers are used up.

    Args:
        indices: (batch,) which samples the rows are.
        begin: how many tokens precede the first written one.
    """

    def __init__(self, seed: int, indices: Sequence[int], begin: int) -> None:
        self._seed, self._indices, self._begin = seed, tuple(indices), begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (batch, vocabulary) with noise."""
        place = input_ids.shape[1] - self._begin
        noise = [np.random.default_rng((self._seed, i, place)).gumbel(size=scores.shape[1]) for i in self._indices]
        noisy: Any = scores + torch.from_numpy(np.stack(noise)).to(scores)
        return noisy


def _sampling(settings: EvaluationConfig, seed: int, indices: Sequence[int], begin: int) -> LogitsProcessorList:
    """What turns greedy decoding into the sampling asked for; nothing at temperature 0."""
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(GumbelNoise(seed, indices, begin))
    return processors


def _options(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: EvaluationConfig, seq2seq: bool
) -> GenerationConfig:
    """All of generation's settings; the tokens that end a text are a list."""
    base: Any = base_of(model)
    own = base.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    options: dict[str, Any] = {"length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
    if seq2seq:
        start = getattr(base.config, "decoder_start_token_id", None)
        options["decoder_start_token_id"] = base.generation_config.decoder_start_token_id if start is None else start
        # BART's first token, or the language that mBART writes. transformers moves it here from the model's config.
        options["forced_bos_token_id"] = base.generation_config.forced_bos_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(token for token in stops if token is not None)),
        **options,
    )


@contextmanager
def _without_own_settings(model: nn.Module) -> Iterator[None]:
    """Hide the checkpoint's generation settings, from which transformers would fill whatever `_options` leaves open."""
    base: Any = base_of(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
