"""The task mode of a model (generation or a head), and its names in transformers and PEFT."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import WITH_HEAD, Mode, TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.multimodal import causal_lm_class

ModelFamily = Literal["encoder", "decoder", "encoder-decoder"]

HEAD_NAMES = frozenset({"score", "pre_classifier", "classifier", "classification_head", "qa_outputs"})
"""transformers' names of heads. A head is trained in full, even if the checkpoint has one."""


class Architecture(NamedTuple):
    """transformers' classes and PEFT's task type for a mode."""

    auto: type
    classes: frozenset[str]
    task_type: str | None
    purpose: str


def _classes(names: object) -> frozenset[str]:
    values: list[str | tuple[str, ...]] = list(dict(names).values())  # type: ignore[call-overload]
    return frozenset(n for value in values for n in ([value] if isinstance(value, str) else value))


ARCHITECTURES: dict[Mode, Architecture] = {
    "sequence_classification": Architecture(
        AutoModelForSequenceClassification,
        _classes(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        "SEQ_CLS",
        "for sequence classification",
    ),
    "question_answering": Architecture(
        AutoModelForQuestionAnswering,
        _classes(MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
        # Not QUESTION_ANS: PEFT's class for it (0.21) keeps `token_type_ids` from the model, and BERT answers worse.
        None,
        "for extractive question answering",
    ),
    # Before causal_lm: BART has one class name in both.
    "seq2seq_lm": Architecture(
        AutoModelForSeq2SeqLM,
        _classes(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        "SEQ_2_SEQ_LM",
        "as a sequence-to-sequence model",
    ),
    "causal_lm": Architecture(
        AutoModelForCausalLM,
        _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "CAUSAL_LM",
        "as a causal language model",
    ),
}


def find_task_mode(settings: PreTrainedConfig, model: str, task: Task, wanted: str) -> TaskMode:
    """Resolve ``task.mode`` for this model.

    Args:
        settings: the model's config.
        model: its name, for messages.
        wanted: ``task.mode``.

    Raises:
        ConfigError: the model or the task does not support the mode.
    """
    # The mode, by default that of the model's family.
    family = model_family(settings)
    mode = _default(family, task) if wanted == "auto" else wanted
    if mode is None:
        raise ConfigError(
            "model.name",
            f"{model!r} is an encoder ({settings.model_type}): it would see the completion it has to predict",
            "expected a causal language model, or a task with labels",
        )

    # Family and mode. T5's and BART's own sequence heads are left out, since they differ in the stack that they read.
    fits: dict[str, tuple[ModelFamily, ...]] = {
        "sequence_classification": ("encoder", "decoder"),
        "question_answering": ("encoder",),
        "causal_lm": ("decoder",),
        "seq2seq_lm": ("encoder-decoder",),
    }
    if family not in fits[mode]:
        possible = ", ".join(name for name, families in fits.items() if family in families)
        raise ConfigError(
            "task.mode",
            f"{mode}, but {model!r} is {'a' if family == 'decoder' else 'an'} {family} ({settings.model_type})",
            f"expected {possible}",
        )

    # Task and mode.
    if mode == "sequence_classification":
        if task.labels is None and task.score is None:
            raise ConfigError(
                "task.mode",
                f"{mode}, but task {task.name} has neither labels nor a score",
                "expected task.labels or task.score too, or another mode",
            )
        return TaskMode("sequence_classification", task.outputs)
    if mode == "question_answering" and not task.extractive:
        raise ConfigError("task.mode", f"{mode}, but task {task.name} is not extractive", "expected squad")
    return TaskMode(mode)  # type: ignore[arg-type]


def model_family(settings: PreTrainedConfig) -> ModelFamily:
    """The model's family, from its config."""
    if getattr(settings, "is_encoder_decoder", False):
        return "encoder-decoder"
    decodes = getattr(settings, "is_decoder", False)
    return "encoder" if settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes else "decoder"


def auto_class(settings: PreTrainedConfig, mode: Mode) -> Any:
    """transformers' auto class that loads a checkpoint with this config in this mode."""
    return causal_lm_class(settings) if mode == "causal_lm" else ARCHITECTURES[mode].auto


def mode_of(model: nn.Module) -> Mode:
    """The mode of a model's class, with or without PEFT around it."""
    base = base_of(model)
    for mode, architecture in ARCHITECTURES.items():
        if type(base).__name__ in architecture.classes:
            # transformers also has decoders that listen among its sequence-to-sequence models (Qwen2-Audio, Voxtral).
            listens = mode == "seq2seq_lm" and model_family(base.config) != "encoder-decoder"  # type: ignore[arg-type]
            return "causal_lm" if listens else mode
    return "causal_lm"


def has_head(model: nn.Module) -> bool:
    """Whether the model, with or without PEFT around it, has a task head."""
    return mode_of(model) in WITH_HEAD


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type; None selects plain `PeftModel`, which passes every argument on."""
    return ARCHITECTURES[mode_of(model)].task_type


def decoder_start_token(settings: PreTrainedConfig, pad_token_id: int) -> int:
    """The first token that an encoder-decoder's decoder sees, in training and in generation.

    T5Gemma's and mBART's configs name none. Then it is the beginning of sequences, as in transformers' `generate`, or
    padding where the model has no such token.

    Args:
        settings: the model's config.
    """
    own = getattr(settings, "decoder_start_token_id", None)
    begin = getattr(settings.get_text_config(decoder=True), "bos_token_id", None)
    return next((token for token in (own, begin) if isinstance(token, int)), pad_token_id)


def base_of(model: nn.Module) -> nn.Module:
    """The model without PEFT around it."""
    bare: object = model
    return bare.get_base_model() if hasattr(bare, "get_base_model") else model  # type: ignore[attr-defined]


def _default(family: ModelFamily, task: Task) -> Mode | None:
    if family == "encoder-decoder":
        return "seq2seq_lm"
    if family == "decoder":
        return "causal_lm"
    if task.extractive:
        return "question_answering"
    return "sequence_classification" if task.outputs is not None else None
