"""Which kind a model is, what of it is a fresh head, and that the head is the same wherever it is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig, RobertaModel

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.architecture import has_head
from sparse_llm_ft.model.loading import empty_model, head_modules, load_model, load_tokenizer


def config(folder: Path, **settings: object) -> ModelConfig:
    return ModelConfig(**{"name": str(folder), "dtype": "float32"} | settings)


def without(folder: Path, target: Path, *endings: str) -> Path:
    """A copy of a model folder whose weights lack the tensors with these endings."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(endings)}
    assert len(kept) < len(weights)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def head(labels: int) -> TaskMode:
    return TaskMode("sequence_classification", labels)


def test_an_empty_classifier_has_the_names_and_shapes_of_the_loaded_one(encoder_folder: Path) -> None:
    empty, loaded = (build(config(encoder_folder), task_mode=head(3)) for build in (empty_model, load_model))
    shapes = {name: parameter.shape for name, parameter in loaded.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert shapes["classifier.weight"] == (3, 16)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert has_head(empty) and has_head(get_peft_model(loaded, LoraConfig(target_modules=["query"])))


def test_the_head_is_what_the_checkpoint_lacks(encoder_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    pooled = without(encoder_folder, tmp_path / "no-pooler", "pooler.dense.weight", "pooler.dense.bias")
    for build in (empty_model, load_model):
        assert head_modules(build(config(encoder_folder), task_mode=head(2))) == ("classifier",)
        assert head_modules(build(config(pooled), task_mode=head(2))) == ("bert.pooler", "classifier")
        assert head_modules(build(config(model_folder), task_mode=head(2))) == ("score",)
        assert head_modules(build(config(model_folder))) == ()
    wrapped = get_peft_model(load_model(config(pooled), head(2)), LoraConfig(target_modules=["query"]))
    assert head_modules(wrapped) == ("bert.pooler", "classifier")


def test_a_head_of_several_layers_is_one_module(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    assert head_modules(empty_model(config(tmp_path), task_mode=head(2))) == ("classifier",)


def test_a_head_in_the_checkpoint_is_kept_if_it_fits_and_trained_in_any_case(
    encoder_folder: Path, tmp_path: Path
) -> None:
    first = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3)
    first.save_pretrained(tmp_path)
    fitting, other = load_model(config(tmp_path), head(3)), load_model(config(tmp_path), head(2))
    assert torch.equal(fitting.classifier.weight, first.classifier.weight)
    assert other.classifier.weight.shape == (2, 16) and other.classifier.weight.std() > 0
    assert head_modules(fitting) == head_modules(other) == ("classifier",)


@pytest.mark.parametrize("lacking", ["layer.1.output.dense.weight", "word_embeddings.weight"])
def test_a_checkpoint_that_lacks_more_than_a_head_is_refused(
    encoder_folder: Path, tmp_path: Path, lacking: str
) -> None:
    folder = without(encoder_folder, tmp_path / "damaged", lacking)
    with pytest.raises(
        ConfigError, match=r"model.name: .* has no fitting weights for bert\.(encoder.layer.1|embeddings)"
    ):
        empty_model(config(folder), task_mode=head(2))


def test_the_head_is_a_function_of_the_seed(encoder_folder: Path, tmp_path: Path) -> None:
    pooled = without(encoder_folder, tmp_path / "no-pooler", "pooler.dense.weight", "pooler.dense.bias")
    heads = []
    for seed in (3, 3, 4):
        model = load_model(config(pooled), head(2), seed)
        heads.append(torch.cat([model.classifier.weight.flatten(), model.bert.pooler.dense.weight.flatten()]))
        torch.rand(7)  # other draws in between
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_loading_a_classifier_says_nothing(encoder_folder: Path, capfd, caplog) -> None:
    empty_model(config(encoder_folder), task_mode=head(2))
    load_model(config(encoder_folder), head(2))
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_four_bits_leave_the_head_whole(encoder_folder: Path, tmp_path: Path) -> None:
    pooled = without(encoder_folder, tmp_path / "no-pooler", "pooler.dense.weight", "pooler.dense.bias")
    model = load_model(config(pooled, dtype="bfloat16", quantization="nf4"), head(2), seed=1)
    whole = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert whole == {"bert.pooler.dense", "classifier"}
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "Linear4bit"


def test_only_a_model_that_writes_needs_an_end_of_sequence_token(
    encoder_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    assert load_tokenizer(config(encoder_folder), head(2)).pad_token == "[PAD]"
    shutil.copytree(model_folder, tmp_path / "mute")
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "mute")
    with pytest.raises(ConfigError, match="has a tokenizer without end-of-sequence token"):
        load_tokenizer(config(tmp_path / "mute"))
    shutil.copytree(encoder_folder, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="has a tokenizer without padding token"):
        load_tokenizer(config(tmp_path / "bare"), head(2))


def test_an_attention_that_cannot_be_used_is_named(encoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.attn_implementation: 'flashy' cannot be used"):
        empty_model(config(encoder_folder), "flashy", head(2))
    with pytest.raises(ConfigError, match=r"model.name: '/nowhere' is no folder"):
        empty_model(config(Path("/nowhere")), None, head(2))
