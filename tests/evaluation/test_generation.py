"""Texts against loops of one sample at a time, without cache or padding; sampling against the softmax it draws from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.tokenization import Sample
from sparse_llm_ft.evaluation.generation import generate, rank_tokens

EOS = 2
VOCABULARY = 23
SAMPLES = [
    Sample(prompt, (EOS,))
    for prompt in [(1, 5, 6, 7), (1, 4), (1, 12, 3, 9, 9, 15), (1, 8, 20), (1, 16, 5, 5, 11), (1, 18), (1, 7, 6, 19)]
]
NEW = 6


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    return AutoTokenizer.from_pretrained(model_folder)


def seeded(model: nn.Module, scale: float) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=scale, generator=generator)
    return model.eval().requires_grad_(False)


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return seeded(T5ForConditionalGeneration(T5Config(**sizes, eos_token_id=EOS, decoder_start_token_id=0)), 0.6)


def bart() -> nn.Module:
    layers = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "decoder_start_token_id": EOS}
    config = BartConfig(**layers, **sizes, **tokens, max_position_embeddings=32, tie_word_embeddings=False)
    model = seeded(BartForConditionalGeneration(config), 0.6)
    model.generation_config.forced_eos_token_id = None
    model.generation_config.forced_bos_token_id = 1
    return model


@pytest.fixture(params=["llama", "t5", "bart"])
def writer(request: pytest.FixtureRequest, causal: nn.Module) -> nn.Module:
    """A model of which some texts end before `NEW` tokens, some at once, since it has two tokens that end them."""
    model = {"llama": lambda: causal, "t5": t5, "bart": bart}[request.param]()
    model.generation_config.eos_token_id = [EOS]
    rows = [greedy(model, sample) for sample in SAMPLES]
    ends = {end: len({row.index(end) if end in row else NEW for row in rows}) for row in rows for end in row[1:]}
    model.generation_config.eos_token_id = [EOS, max(ends, key=ends.__getitem__)]
    return model


def options(**settings: float) -> EvaluationConfig:
    return EvaluationConfig(**{"max_new_tokens": NEW, "micro_batch_size": 3} | settings)


def texts_of(model: nn.Module, tokenizer, settings: EvaluationConfig, seed: int = 0, samples=SAMPLES) -> list[str]:
    seq2seq = bool(model.config.is_encoder_decoder)
    return generate(model, samples, tokenizer, settings, 0, 1, synced=False, seed=seed, seq2seq=seq2seq)


def next_logits(model: nn.Module, sample: Sample, written: list[int]) -> torch.Tensor:
    """(V,) after the prompt and what is written, everything computed anew."""
    if not model.config.is_encoder_decoder:
        return model(torch.tensor([[*sample.prompt_ids, *written]]), use_cache=False).logits[0, -1]
    before = torch.tensor([[model.config.decoder_start_token_id, *written]])
    logits = model(torch.tensor([sample.prompt_ids]), decoder_input_ids=before, use_cache=False).logits[0, -1]
    if model.config.model_type == "bart" and not written:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(1), 0.0)  # the forced first token
    return logits


def greedy(model: nn.Module, sample: Sample) -> list[int]:
    written: list[int] = []
    while len(written) < NEW:
        token = int(next_logits(model, sample, written).argmax())
        if token in model.generation_config.eos_token_id:
            break
        written.append(token)
    return written


def decoded(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_greedy_texts_are_those_of_a_loop_whatever_the_batch(writer, tokenizer) -> None:
    tokens = [greedy(writer, sample) for sample in SAMPLES]
    lengths = set(map(len, tokens))
    assert len(lengths) > 1, "some end early"
    expected = [decoded(tokenizer, row) for row in tokens]
    assert len(set(expected)) > 2
    writer.train()
    for size in (1, 2, 3, 7):
        assert texts_of(writer, tokenizer, options(micro_batch_size=size)) == expected
    assert writer.training


def test_beams_are_those_of_transformers_on_one_sample(writer, tokenizer) -> None:
    own = {"num_beams": 4, "max_new_tokens": NEW, "do_sample": False}
    changed = 0
    for penalty in (0.0, 2.0):
        expected = []
        for sample in SAMPLES:
            row = writer.generate(torch.tensor([sample.prompt_ids]), **own, length_penalty=penalty, pad_token_id=0)[0]
            tokens = row[1 if writer.config.is_encoder_decoder else len(sample.prompt_ids) :].tolist()
            ends = [tokens.index(end) for end in writer.generation_config.eos_token_id if end in tokens]
            expected.append(decoded(tokenizer, tokens[: min(ends, default=NEW)]))
        for size in (1, 3, 7):
            settings = options(num_beams=4, length_penalty=penalty, micro_batch_size=size)
            assert texts_of(writer, tokenizer, settings) == expected
        changed += expected != texts_of(writer, tokenizer, options())
    assert changed, "the search finds what greedy decoding does not"


def test_ranks_write_what_one_does(writer, tokenizer) -> None:
    seq2seq = bool(writer.config.is_encoder_decoder)
    for settings in (options(), options(num_beams=2), options(temperature=1.5), options(micro_batch_size=1)):
        whole, *parts = (
            rank_tokens(writer, SAMPLES, tokenizer, settings, rank, size, False, seed=4, seq2seq=seq2seq)
            for rank, size in ((0, 1), (0, 2), (1, 2))
        )
        assert torch.equal(sum(parts), whole)
        assert all(((part > 0).any(1)).sum() <= 4 for part in parts)


def test_a_checkpoints_own_settings_do_not_count(writer, tokenizer) -> None:
    expected = texts_of(writer, tokenizer, options())
    kept = {name: getattr(writer.generation_config, name) for name in ("eos_token_id", "forced_bos_token_id")}
    writer.generation_config = own = GenerationConfig(
        **kept,
        do_sample=True,
        max_length=3,
        num_beams=3,
        no_repeat_ngram_size=1,
        repetition_penalty=9.0,
        min_length=5,
        suppress_tokens=list(range(3, 9)),
        forced_eos_token_id=10,
        num_return_sequences=2,
    )
    assert texts_of(writer, tokenizer, options()) == expected
    assert writer.generation_config is own


def test_every_end_token_of_a_chat_model_ends_a_text(causal, tokenizer) -> None:
    causal.generation_config.eos_token_id = [EOS]
    plain = [greedy(causal, sample) for sample in SAMPLES]
    end = max(plain, key=len)[2]
    causal.generation_config.eos_token_id = [end, EOS]
    expected = [row[: row.index(end)] if end in row else row for row in plain]
    assert expected != plain
    assert texts_of(causal, tokenizer, options()) == [decoded(tokenizer, row) for row in expected]


def test_generation_under_peft_is_that_of_its_model(causal, tokenizer) -> None:
    expected = texts_of(causal, tokenizer, options())
    wrapped = get_peft_model(causal, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert texts_of(wrapped, tokenizer, options()) == expected


def first_tokens(model: nn.Module, tokenizer, count: int, **settings: float) -> torch.Tensor:
    """(V,) how often each token was the first after the same prompt."""
    chosen = options(max_new_tokens=1, micro_batch_size=500, **settings)
    rows = rank_tokens(model, SAMPLES[:1] * count, tokenizer, chosen, 0, 1, False, seed=5, seq2seq=False)
    tokens = torch.where(rows[:, 0] > 0, rows[:, 0] - 1, EOS)
    return torch.tensor([Counter(tokens.tolist())[token] for token in range(VOCABULARY)])


def test_sampling_draws_from_the_softmax_at_its_temperature(causal, tokenizer) -> None:
    logits = next_logits(causal, SAMPLES[0], [])
    count = 4000
    for temperature in (0.5, 2.0):
        wanted = (logits / temperature).softmax(-1) * count
        counts = first_tokens(causal, tokenizer, count, temperature=temperature)
        common = wanted >= 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        expected = torch.cat([wanted[common], wanted[~common].sum()[None]]).clamp(min=1e-9)
        square = float(((observed - expected) ** 2 / expected).sum())
        degrees = int(common.sum())
        assert degrees > 2 and square < degrees + 4 * (2 * degrees) ** 0.5, "chi-squared, four standard deviations"


def test_top_p_draws_from_the_least_set_of_that_mass(causal, tokenizer) -> None:
    probabilities = next_logits(causal, SAMPLES[0], []).softmax(-1)
    order = probabilities.argsort(descending=True)
    size = int((probabilities[order].cumsum(0) < 0.7).sum()) + 1
    assert 1 < size < VOCABULARY - 2
    counts = first_tokens(causal, tokenizer, 2000, temperature=1.0, top_p=0.7)
    assert set(counts.nonzero().flatten().tolist()) == set(order[:size].tolist())
    expected = probabilities[order[:size]] / probabilities[order[:size]].sum()
    assert torch.allclose(counts[order[:size]] / 2000, expected, atol=0.05)


def test_a_samples_draw_does_not_depend_on_batches_or_the_global_generator(writer, tokenizer) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    expected = texts_of(writer, tokenizer, options(temperature=2.0), seed=3)
    for size in (1, 7):
        assert texts_of(writer, tokenizer, options(temperature=2.0, micro_batch_size=size), seed=3) == expected
    assert texts_of(writer, tokenizer, options(temperature=2.0), 3, SAMPLES[:4]) == expected[:4]
    assert texts_of(writer, tokenizer, options(temperature=2.0), seed=4) != expected
    assert torch.equal(torch.get_rng_state(), state)
    again = texts_of(writer, tokenizer, options(temperature=2.0), 3, [SAMPLES[0]] * 7)
    assert len(set(again)) > 1, "each sample has noise of its own"
