"""`model.resize_embeddings`: what transformers' `resize_token_embeddings` makes, also without weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.tiny_files import grow_tokenizer
from helpers.tiny_models import MODELS, llama
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.loading import empty_model, load_model
from sparse_llm_ft.model.resizing import grow_embeddings, new_rows, resized

T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
BERT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {
    "untied": lambda: llama(),
    "biased head": lambda: with_biased_head(llama()),
    "bart": MODELS["bart"].build,
    "gpt2": MODELS["gpt2"].build,
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=True)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
}


def with_biased_head(model: PreTrainedModel) -> PreTrainedModel:
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, head.out_features)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_resized_as_transformers_does(kind: str) -> None:
    torch.manual_seed(1)
    model = KINDS[kind]()
    expected, empty = copy.deepcopy(model), copy.deepcopy(model).to("meta")
    torch.manual_seed(5)
    expected.resize_token_embeddings(67)
    before = torch.random.get_rng_state()
    grow_embeddings(model, 67, 5)
    grow_embeddings(empty, 67)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert new_rows(model) == range(64, 67) and model.config.get_text_config().vocab_size == 67
    wanted = expected.state_dict()
    assert {name: t.shape for name, t in empty.state_dict().items()} == {name: t.shape for name, t in wanted.items()}
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    names = [name for name, _ in model.named_parameters()]  # shared weights are shared still
    assert names == [name for name, _ in expected.named_parameters()] == [name for name, _ in empty.named_parameters()]
    assert not model.get_input_embeddings().weight.requires_grad


def test_a_table_that_is_large_enough_stays() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    grow_embeddings(model, 60)
    assert not new_rows(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_is_loaded_with_a_row_for_each_token(model_folder: Path, tmp_path: Path, quantization: str) -> None:
    folder = grow_tokenizer(model_folder, tmp_path / "grown")
    settings = ModelConfig(name=str(folder), dtype="bfloat16", quantization=quantization, resize_embeddings=True)
    model = load_model(settings, seed=3)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(3)
    expected.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
    for own, other in (
        (model.get_input_embeddings(), expected.get_input_embeddings()),
        (model.get_output_embeddings(), expected.get_output_embeddings()),
    ):
        assert own.weight.dtype == torch.bfloat16 and torch.equal(own.weight, other.weight)
    ids = torch.tensor([[1, new_rows(model).stop - 1]])
    assert model(input_ids=ids).logits.shape[-1] == new_rows(model).stop == empty_model(settings).config.vocab_size


def test_what_transformers_cannot_resize_is_one_line(model_folder: Path) -> None:
    class Rigid(type(llama())):
        def resize_token_embeddings(self, *_: object, **__: object) -> None:
            raise NotImplementedError("not here")

    class Twofold(type(llama())):
        def resize_token_embeddings(self, count: int, *_: object, **__: object) -> None:
            super().resize_token_embeddings(count, mean_resizing=False)
            self.further = nn.Embedding(count, 4, device="meta")

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens([f"<t{i}>" for i in range(80)])
    config = ModelConfig(name="base", resize_embeddings=True)
    with torch.device("meta"):
        rigid, twofold = Rigid(llama().config), Twofold(llama().config)
        twofold.further = nn.Embedding(64, 4)
    with pytest.raises(ConfigError, match=r"model.resize_embeddings: .*cannot resize 'base' \(not here\)"):
        resized(rigid, config, tokenizer)
    with pytest.raises(ConfigError, match=r"has a further table by tokens, further.weight"):
        resized(twofold, config, tokenizer)
