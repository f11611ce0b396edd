"""Padded samples: each has the loss that it has alone, and no mask is made where none is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BloomConfig, MistralConfig, OPTConfig, PreTrainedConfig

from helpers.decoders import DECODERS, GROUPED, OTHERS, SAMPLES, SIZES, alone, build, check_gradients, objective_of
from helpers.dispatch import WAITS, Operations
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.collate import collate_prompts
from sparse_llm_ft.model.causal_mask import gets_mask, padded_right

FURTHER: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4),  # whose mask makes its positions
    "mistral, wide window": lambda: MistralConfig(**GROUPED, sliding_window=10),
}


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS, *FURTHER])
def test_each_sample_has_the_loss_that_it_has_alone(name: str) -> None:
    settings = (DECODERS | OTHERS | FURTHER)[name]()
    model = build(settings, "eager" if name == "bloom" else "sdpa")
    if name != "mixtral":  # whose products of experts have no float64
        model.double()  # in which grouped heads need no mask either
    objective = objective_of(model)
    batch = objective.batch(SAMPLES)
    with torch.no_grad():
        expected = [float(alone(model, sample)) for sample in SAMPLES]
        assert objective.losses(model, batch).tolist() == pytest.approx(expected, rel=1e-5)
    check_gradients(model, batch)


@pytest.mark.parametrize(
    ("name", "dtype", "masked"),
    [
        ("llama", torch.bfloat16, False),
        ("llama", torch.float32, True),  # of its grouped heads, which no GPU's kernel takes then
        ("phi", torch.float32, False),
        ("mistral, wide window", torch.bfloat16, False),
        ("mistral", torch.bfloat16, True),
    ],
)
def test_a_mask_is_made_where_it_serves_and_else_the_host_waits_for_nothing(
    name: str, dtype: torch.dtype, masked: bool
) -> None:
    model = build((DECODERS | OTHERS | FURTHER)[name]()).to(dtype)
    settings = ModelConfig(name="tiny", dtype=str(dtype).removeprefix("torch."))
    assert gets_mask(model, settings, 9, padded=True) == masked and not gets_mask(model, settings, 9, padded=False)
    assert gets_mask(model, settings, 9, padded=False, packed=True)
    objective = objective_of(model)
    batch, masks = objective.batch(SAMPLES), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, options: masks.append(options["attention_mask"]), with_kwargs=True
        )
    with Operations() as operations:
        objective.loss(model, batch).backward()
    assert [mask is not None for mask in masks] == [masked] * 2
    assert masked or not operations.seen & WAITS


def test_prompts_that_are_padded_on_the_left_keep_their_mask() -> None:
    """Generation has them, and is in no such context."""
    model = build(DECODERS["llama"]())
    batch = collate_prompts(SAMPLES, 0)
    with torch.no_grad():
        logits = model(**batch).logits[:, -1]
        for row, sample in zip(logits, SAMPLES, strict=True):
            torch.testing.assert_close(row, model(input_ids=torch.tensor([sample.prompt_ids])).logits[0, -1])
        model.to(torch.bfloat16)
        logits = model(**batch).logits[:, -1]
        with padded_right():
            assert not torch.allclose(model(**batch).logits[:, -1], logits), "the context would be wrong there"
