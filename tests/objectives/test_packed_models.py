"""Packed or alone, a sample has one loss: no sample of a sequence sees another. Where it would, packing is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    DeepseekV4Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.decoders import DECODERS, GROUPED, OTHERS, SAMPLES, SIZES, alone, build, check_gradients, objective_of
from sparse_llm_ft.data.collate import IGNORE_INDEX
from sparse_llm_ft.data.samples import Pack, Sample
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.objectives.build import check_packing
from sparse_llm_ft.objectives.language_modeling import CompletionObjective

PACKS = (Pack(SAMPLES[:3]), Pack(SAMPLES[3:]))
"""Of 16 and 9 tokens, so that one is padded."""


def supervise(batch: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """The labels of one sample alone, found by where positions begin anew."""
    starts = (batch["position_ids"] == 0).long().flatten().cumsum(0).view_as(batch["labels"])
    return batch | {"labels": batch["labels"].masked_fill(starts != number + 1, IGNORE_INDEX)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_each_sample_has_the_loss_that_it_has_alone(name: str, attention: str) -> None:
    model = build(DECODERS[name](), attention)
    check_packing(model)
    objective = objective_of(model)
    batch = objective.batch(PACKS)
    with torch.no_grad():
        expected = [float(alone(model, sample)) for sample in SAMPLES]
        packed = [float(objective.loss(model, supervise(batch, number))) for number in range(4)]
    assert packed == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 2) for loss in expected}) == 4


@pytest.mark.parametrize("name", DECODERS)
def test_the_gradients_are_those_of_all_samples_alone(name: str) -> None:
    model = build(DECODERS[name]())
    check_gradients(model, objective_of(model).batch(PACKS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_sample_sees_another(name: str, attention: str) -> None:
    """Neither those before it nor those behind."""
    model = build(DECODERS[name](), attention)
    objective = objective_of(model)
    changed = Pack((Sample((33, 34, 35, 36), (37, 38, 2)), SAMPLES[1], Sample((39,), (33, 2))))
    with torch.no_grad():
        logits = []
        for pack in (PACKS[0], changed):
            batch = objective.batch([pack])
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            logits.append(model(**inputs, use_cache=False).logits[0])
    assert torch.equal(logits[0][7:13], logits[1][7:13])
    assert not torch.equal(logits[0][:7], logits[1][:7]) and not torch.equal(logits[0][13:], logits[1][13:])


@pytest.mark.parametrize("name", OTHERS)
def test_further_families_that_may_be_packed(name: str) -> None:
    model = build(OTHERS[name]())
    with torch.device("meta"):
        check_packing(AutoModelForCausalLM.from_config(OTHERS[name]()))
    objective = objective_of(model)
    with torch.no_grad():
        expected = sum(float(alone(model, sample)) for sample in SAMPLES)
        assert float(objective.loss(model, objective.batch(PACKS))) == pytest.approx(expected, rel=1e-5)


STATEFUL = "has stateful layers"
LEAKS = "lets packed samples attend to each other"
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "mamba": (lambda: MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2), "does not take positions"),
    "jamba": (lambda: JambaConfig(**GROUPED, num_experts=2), STATEFUL),
    "qwen3_next": (lambda: Qwen3NextConfig(**GROUPED, num_experts=4), STATEFUL),
    "deepseek_v4": (
        lambda: DeepseekV4Config(vocab_size=40, hidden_size=32, num_hidden_layers=2, n_routed_experts=4),
        STATEFUL,  # which its layers' names do not tell
    ),
    "lfm2": (lambda: Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]), STATEFUL),
    "opt": (lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), LEAKS),
    "gpt_oss": (lambda: GptOssConfig(**GROUPED, num_local_experts=4), LEAKS),
    "bert": (lambda: BertConfig(**SIZES, is_decoder=True), LEAKS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_in_which_samples_would_see_each_other_are_refused(name: str) -> None:
    settings, reason = REFUSED[name]
    with torch.device("meta"):
        model = BertLMHeadModel(settings()) if name == "bert" else AutoModelForCausalLM.from_config(settings())
    with pytest.raises(ConfigError, match=f"^task.packing: true, but a {name} model {reason}; expected false$"):
        check_packing(model)


@pytest.mark.parametrize("name", ["opt", "gpt_oss"])
def test_those_models_do_see_the_others(name: str) -> None:
    """Should a release of transformers mend them, they need no longer be refused."""
    model = build(REFUSED[name][0](), "eager")
    objective = objective_of(model)
    with torch.no_grad():
        expected = sum(float(alone(model, sample)) for sample in SAMPLES)
        assert float(objective.loss(model, objective.batch(PACKS))) != pytest.approx(expected, rel=1e-3)


def test_encoders_and_encoder_decoders_are_refused() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    with torch.device("meta"):
        models = [
            T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)),
            BertForSequenceClassification(BertConfig(**SIZES)),
        ]
    for model in models:
        with pytest.raises(ConfigError, match="true, but the model is not a causal language model"):
            check_packing(model)


def test_attention_that_makes_no_mask_is_refused_and_flash_gets_one_row() -> None:
    """As transformers asks for: it looks for samples in positions, in a batch of one, where there is no mask."""
    model = build(LlamaConfig(**GROUPED))
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ConfigError, match=r"true, but 'paged\|sdpa' attention lets packed samples"):
        check_packing(model)
    packs = [Pack((Sample((5, 6), (7, 2)), Sample((8,), (9, 2)))), Pack((Sample((4, 4, 4), (3, 2)),))]
    batch = CompletionObjective(0, True, packs_in_one_row=True).batch(packs)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 8, 9, 2, 4, 4, 4, 3, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]
    alone = CompletionObjective(0, True)
    rows = alone.batch(packs)
    assert (batch["labels"] >= 0).sum() == (rows["labels"] >= 0).sum() == 6
    with torch.no_grad():
        model.config._attn_implementation = "sdpa"
        torch.testing.assert_close(alone.loss(model, batch), alone.loss(model, rows))
