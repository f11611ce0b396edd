"""Text generation over all ranks: greedy, beam search, or sampling."""

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
from sparse_llm_ft.evaluation.control_tokens import ControlTokens
from sparse_llm_ft.evaluation.loop import evaluation_batches
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.architecture import base_of, decoder_start_token


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
    end_token_id: int | None = None,
    wait: Wait | None = None,
) -> list[str]:
    """Collective. Every rank gets the generated text of every sample, in order.

    A text ends before the first end-of-sequence token, the tokenizer's or one of the checkpoint's generation config
    (chat models have several). Other values of that config are ignored, except an encoder-decoder's forced first token.
    Control tokens are left out; other special tokens are text (`ControlTokens`). Texts, also sampled ones
    (`GumbelNoise`), do not depend on batches or ranks.

    Args:
        settings: ``num_beams`` and ``length_penalty``; ``temperature`` (above 0: samples) and ``top_p``;
            ``max_new_tokens`` and ``micro_batch_size``. Beam search stops when no unfinished beam is likely to beat the
            best finished one (transformers' ``early_stopping=False``).
        synced: ZeRO-3, under which ranks must make equally many forward passes.
        seed: seed of sampling.
        seq2seq: an encoder reads the prompt; the decoder generates from its start token on.
        end_token_id: a further token that ends a text, if given.
        wait: shows how many batches are done.
    """
    tokens = rank_tokens(
        model, samples, tokenizer, settings, rank, world_size, synced, seed, seq2seq, end_token_id, wait
    )
    if world_size > 1:
        dist.all_reduce(tokens)
    base: Any = base_of(model)
    control = ControlTokens.of(tokenizer, [base.generation_config.forced_bos_token_id] if seq2seq else ())
    return [control.decode((row[row > 0] - 1).tolist()) for row in tokens.cpu()]


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
    end_token_id: int | None = None,
    wait: Wait | None = None,
) -> torch.Tensor:
    """Collective. The tokens that this rank generates, see `generate`.

    Returns:
        (samples, max_new_tokens) int64 on the model's device: token id plus 1; 0 behind a text's end and in other
        ranks' rows, so that an all-reduce collects all texts.
    """
    # Settings, and room for the result.
    bare: Any = model
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer made sure"
    device = next(model.parameters()).device
    options = _options(model, tokenizer, settings, seq2seq, end_token_id)
    stops = torch.tensor(options.eos_token_id, device=device)
    tokens = torch.zeros((len(samples), settings.max_new_tokens), dtype=torch.long, device=device)
    collate = partial(collate_prompts, pad_token_id=tokenizer.pad_token_id, side="right" if seq2seq else "left")
    lengths = [len(sample.prompt_ids) for sample in samples]

    # Each batch's new tokens, up to the first stop token.
    with (
        _without_own_settings(model),
        evaluation_batches(
            model, samples, lengths, collate, settings.micro_batch_size, rank, world_size, wait=wait
        ) as batches,
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
                text = row[: int((~torch.isin(row, stops)).long().cumprod(0).sum())]
                tokens[i, : len(text)] = text + 1
    return tokens


class GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into exact sampling: argmax_v (s_v + g_v), with g_v = -log(-log u_v) and u_v uniform in
    (0, 1), is distributed as softmax(s) (Gumbel-max; Maddison et al., 2014, https://arxiv.org/abs/1411.0030).

    The noise for token t of sample i depends only on (seed, i, t). So a text does not depend on its batch or rank, and
    no global random state is consumed.

    Args:
        indices: (batch,) sample indices of the rows.
        begin: number of tokens before the first generated one.
    """

    def __init__(self, seed: int, indices: Sequence[int], begin: int) -> None:
        self._seed, self._indices, self._begin = seed, tuple(indices), begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(batch, vocabulary) scores with noise added."""
        place = input_ids.shape[1] - self._begin
        noise = [np.random.default_rng((self._seed, i, place)).gumbel(size=scores.shape[1]) for i in self._indices]
        noisy: Any = scores + torch.from_numpy(np.stack(noise)).to(scores)
        return noisy


def _sampling(settings: EvaluationConfig, seed: int, indices: Sequence[int], begin: int) -> LogitsProcessorList:
    """Processors that turn greedy decoding into sampling; none at temperature 0."""
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(GumbelNoise(seed, indices, begin))
    return processors


def _options(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    seq2seq: bool,
    end_token_id: int | None,
) -> GenerationConfig:
    """The complete generation config; `eos_token_id` is a list."""
    base: Any = base_of(model)
    own = base.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, end_token_id, *(own if isinstance(own, list | tuple) else [own])]
    options: dict[str, Any] = {"length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
    if seq2seq:
        assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer made sure"
        options["decoder_start_token_id"] = decoder_start_token(base.config, tokenizer.pad_token_id)
        # BART's first token, or mBART's language. transformers moves it here from the model's config.
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
    """Hide the checkpoint's generation config, from which transformers would fill values that `_options` leaves out."""
    base: Any = base_of(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
