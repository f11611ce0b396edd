"""The files of the encoders and of BART-large: published sizes, the papers' numbers of values, and their tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel

from helpers.families import SMALL_MODELS, files, layered, parsed, settings
from helpers.tiny_files import make_encoder, make_model
from sparse_llm_ft.adapters import count_parameters, find_targets
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.plan import uniform_plan

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
TINY_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def empty(name: str) -> PreTrainedModel:
    """The model at its published size, without weights."""
    auto = AutoModelForSeq2SeqLM if name == "bart-large" else AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(settings(name))


@pytest.mark.parametrize(
    ("name", "linear_layers", "published"),
    [("deberta-v3-base", 72, 184e6), ("roberta-base", 72, 125e6), ("bart-large", 192, 406e6)],
)
def test_they_have_their_published_sizes(name: str, linear_layers: int, published: float) -> None:
    """DeBERTa's fresh pooler is trained whole and gets no adapter."""
    model = empty(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.01)
    targets = find_targets(model, files("methods")["lora"]["adapter"]["target_modules"])
    assert len([target for target in targets if not target.startswith("pooler.")]) == linear_layers


@pytest.mark.parametrize(
    ("name", "method", "values"),
    [
        ("deberta-v3-base", "lora", 1_327_104),  # Partial-LoRA, Table 6: 1.33M
        ("deberta-v3-base", "partial_lora", 1_327_104),  # the same, before masks are drawn
        ("roberta-base", "lora_drop", 294_912),  # LoRA-drop, Table 1: 0.29M
        ("roberta-base", "tied_lora", 172_032 + 19_776),  # A.1: rank 56
    ],
)
def test_their_adapters_have_as_many_values_as_the_papers(name: str, method: str, values: int) -> None:
    config = parsed(files("models")[name], files("tasks")["glue/sst2"], files("methods")[method])
    found = find_targets(empty(name), config.adapter.target_modules)
    targets = {target: shape for target, shape in found.items() if not target.startswith("pooler.")}
    plan = uniform_plan(targets, config.adapter.r, config.adapter.lora_alpha)
    assert count_parameters(build_methods(config, 1000).first(plan, targets).plan, targets) == values


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family with a tiny random model."""
    folder = tmp_path_factory.mktemp("small")
    for name in SMALL_MODELS:
        place = folder / name
        place.mkdir()
        seq2seq = name == "bart-large"
        (make_model if seq2seq else make_encoder)(place)  # the tokenizer
        vocabulary = AutoConfig.from_pretrained(place).vocab_size
        sizes = {"vocab_size": vocabulary, "pad_token_id": 0} | (TINY_BART if seq2seq else TINY)
        numbers = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
        written = settings(name, **sizes, **(numbers if seq2seq else {}))
        auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForSequenceClassification
        auto.from_config(written).save_pretrained(place)
    return folder


def opened(models: Path, name: str, method_file: str, task: str, **changes: object) -> RunContext:
    """The context of the four files, whose model is a local folder."""
    kinds = {"models": name, "tasks": task, "methods": method_file, "deepspeed": "zero2"}
    tree = layered(*(files(kind)[file] for kind, file in kinds.items()))
    changed = {"model": {"name": str(models / name)}, "task": {"max_length": 64, "max_prompt_length": None}}
    config = parse_config(merge(merge(tree, changed), changes))
    return RunContext.open(config, ONE_PROCESS, resolve_task(config.task))


@pytest.mark.parametrize("method", files("methods"))
def test_every_methods_file_takes_an_encoder(method: str, models: Path) -> None:
    """With its own names of query and value, and fewer adapters than WeightLoRA's file keeps."""
    changes = {}
    if "weight_lora" in method:
        section = files("methods")[method]["method"]
        parts = [part | ({"keep": 4} if "keep" in part else {}) for part in _as_list(section)]
        changes = {"method": parts}
    for name in ("deberta-v3-base", "roberta-base"):
        context = opened(models, name, method, "glue/sst2", **changes)
        assert context.task_mode.mode == "sequence_classification" and context.plan.trained


def _as_list(section: object) -> list[dict]:
    return [dict(part) for part in (section if isinstance(section, list) else [section])]


def test_an_encoder_takes_tasks_with_labels_scores_or_spans_and_bart_takes_texts(models: Path) -> None:
    modes = {}
    for name in SMALL_MODELS:
        for task in ("squad", "xsum") if name == "bart-large" else ("glue/sst2", "glue/stsb", "squad", "xsum"):
            try:
                modes[name, task] = opened(models, name, "lora", task).task_mode.mode
            except ConfigError as error:
                modes[name, task] = str(error)
    encoder = ["sequence_classification", "sequence_classification", "question_answering"]
    found = [*modes.values()]
    assert found[:3] == found[4:7] == encoder and found[8:] == ["seq2seq_lm"] * 2
    assert all("is an encoder" in found[i] for i in (3, 7))
