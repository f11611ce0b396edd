"""How a model learns a task, by its body and `task.mode`, and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from helpers.tiny_modes import make_bart, make_t5
from sparse_llm_ft.config import ModelConfig, TaskConfig
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.architecture import base_of, find_task_mode, has_head, mode_of, model_family, task_type
from sparse_llm_ft.model.loading import empty_model, find_model_task_mode, head_modules, load_model

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BODIES: dict[str, PreTrainedConfig] = {
    "encoder": BertConfig(**SIZES),
    "decoder": LlamaConfig(**SIZES),
    "encoder-decoder": T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
}
BART = BartConfig(
    vocab_size=20,
    d_model=16,
    **{f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")},
)


def task(kind: str) -> Task:
    settings = {
        "labels": {"labels": ("no", "yes", "perhaps"), "texts": ("a", "b"), "prompt": "{a} {b}"},
        "score": {"score": (0.0, 5.0), "texts": ("a", "b"), "prompt": "{a} {b}"},
        "text": {"prompt": "{a}", "completion": "{b}"},
        "spans": {"name": "squad"},
    }[kind]
    return resolve_task(TaskConfig(**{"name": "custom", "path": "."} | settings))


HEAD3, HEAD1 = TaskMode("sequence_classification", 3), TaskMode("sequence_classification", 1)
WRITES, BOTH, SPANS = TaskMode("causal_lm"), TaskMode("seq2seq_lm"), TaskMode("question_answering")
FOUND = {
    # (body, task): what each mode gives; a mode that is left out is refused.
    ("encoder", "labels"): {"auto": HEAD3, "sequence_classification": HEAD3},
    ("encoder", "score"): {"auto": HEAD1, "sequence_classification": HEAD1},
    ("encoder", "spans"): {"auto": SPANS, "question_answering": SPANS},
    ("encoder", "text"): {},
    ("decoder", "labels"): {"auto": WRITES, "causal_lm": WRITES, "sequence_classification": HEAD3},
    ("decoder", "score"): {"auto": WRITES, "causal_lm": WRITES, "sequence_classification": HEAD1},
    ("decoder", "spans"): {"auto": WRITES, "causal_lm": WRITES},
    ("decoder", "text"): {"auto": WRITES, "causal_lm": WRITES},
    **{("encoder-decoder", kind): {"auto": BOTH, "seq2seq_lm": BOTH} for kind in ("labels", "score", "spans", "text")},
}
MODES = ("auto", "sequence_classification", "question_answering", "causal_lm", "seq2seq_lm")


@pytest.mark.parametrize(("body", "kind"), FOUND)
def test_every_body_with_every_task_and_mode(body: str, kind: str) -> None:
    found = {}
    for mode in MODES:
        try:
            found[mode] = find_task_mode(BODIES[body], "some/model", task(kind), mode)
        except ConfigError as error:
            assert str(error).startswith("model.name" if mode == "auto" else "task.mode")
            assert "\n" not in str(error)
    assert found == FOUND[body, kind]


@pytest.mark.parametrize(
    ("body", "kind", "mode", "message"),
    [
        (
            "encoder",
            "text",
            "auto",
            "model.name: 'some/model' is an encoder (bert): it would see the completion it has to predict; "
            "expected a causal language model, or a task with labels",
        ),
        (
            "encoder",
            "labels",
            "causal_lm",
            "task.mode: causal_lm, but 'some/model' is an encoder (bert); "
            "expected sequence_classification, question_answering",
        ),
        (
            "decoder",
            "text",
            "seq2seq_lm",
            "task.mode: seq2seq_lm, but 'some/model' is a decoder (llama); expected sequence_classification, causal_lm",
        ),
        (
            "encoder-decoder",
            "labels",
            "sequence_classification",
            "task.mode: sequence_classification, but 'some/model' is an encoder-decoder (t5); expected seq2seq_lm",
        ),
        (
            "decoder",
            "text",
            "sequence_classification",
            "task.mode: sequence_classification, but task custom has neither labels nor a score; "
            "expected task.labels or task.score too, or another mode",
        ),
        (
            "encoder",
            "labels",
            "question_answering",
            "task.mode: question_answering, but task custom is not extractive; expected squad",
        ),
    ],
)
def test_refusals_say_what_does_not_fit(body: str, kind: str, mode: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_task_mode(BODIES[body], "some/model", task(kind), mode)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "body"),
    [
        *((settings, body) for body, settings in BODIES.items()),
        (BART, "encoder-decoder"),
        (RobertaConfig(), "encoder"),
        (DistilBertConfig(), "encoder"),
        (BertConfig(is_decoder=True), "decoder"),
        (GPT2Config(), "decoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_a_body_is_known_by_its_settings(settings: PreTrainedConfig, body: str) -> None:
    assert model_family(settings) == body


BUILT = [
    (AutoModelForSequenceClassification, BODIES["encoder"], "sequence_classification", "SEQ_CLS"),
    (AutoModelForSequenceClassification, BODIES["decoder"], "sequence_classification", "SEQ_CLS"),
    (AutoModelForQuestionAnswering, BODIES["encoder"], "question_answering", None),
    (AutoModelForCausalLM, BODIES["decoder"], "causal_lm", "CAUSAL_LM"),
    (AutoModelForSeq2SeqLM, BODIES["encoder-decoder"], "seq2seq_lm", "SEQ_2_SEQ_LM"),
    (AutoModelForSeq2SeqLM, BART, "seq2seq_lm", "SEQ_2_SEQ_LM"),
]


@pytest.mark.parametrize(("auto", "settings", "mode", "peft_name"), BUILT)
def test_a_models_mode_is_that_of_its_class_bare_or_under_peft(auto, settings, mode: str, peft_name) -> None:
    with torch.device("meta"):
        model = auto.from_config(settings)
    endings = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    target = next(ending for ending in endings if ending in ("query", "q_proj", "q"))
    wrapped = get_peft_model(model, LoraConfig(target_modules=[target]), low_cpu_mem_usage=True)
    for each in (model, wrapped):
        assert mode_of(each) == mode and task_type(each) == peft_name and base_of(each) is model
        assert has_head(each) == (mode in ("sequence_classification", "question_answering"))


def test_barts_decoder_alone_is_a_decoder() -> None:
    with torch.device("meta"):
        assert mode_of(BartForCausalLM(BART)) == "causal_lm"


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_an_encoder_decoder_is_loaded_whole(make, tmp_path: Path) -> None:
    """Empty and loaded have the same names, no head, and what is shared is shared once."""
    make(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="float32")
    task_mode = find_model_task_mode(config, task("text"), "auto")
    assert task_mode == BOTH and not task_mode.has_head
    empty, loaded = empty_model(config, task_mode=task_mode), load_model(config, task_mode)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert head_modules(empty) == head_modules(loaded) == ()
    own = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    assert not loaded.config.use_cache
