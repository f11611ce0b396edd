"""The encoded splits of a run."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.encoding import Sample, TextSample, encode_split, encode_texts
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.modeling import Kind, model_kind
from sparse_llm_ft.training.prepare import Prepared

Split = tuple[Sample, ...] | tuple[TextSample, ...]


@dataclass(frozen=True)
class Samples:
    """The encoded splits of a run; `validation` and `measured` may be empty."""

    train: Split
    validation: Split
    measured: Split
    shortened: int

    @classmethod
    def encode(cls, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Samples:
        """Tokenise all that `prepare` read, for a model that writes or for an encoder.

        Raises:
            UserError: a sample that does not fit, or a task that does not say what such a model sees.
        """
        config, task = prepared.config, prepared.task
        kind = model_kind(config.model, task.classes)
        _check_inputs(task, kind, config.model)
        encode = encode_texts if kind == "classifier" else encode_split
        train, validation, measured = (
            encode(examples, tokenizer, config.task.max_length)
            for examples in (prepared.train, prepared.validation, prepared.measured)
        )
        return cls(train.samples, validation.samples, measured.samples, train.shortened)


def _check_inputs(task: Task, kind: Kind, model: ModelConfig) -> None:
    if kind == "causal_lm" and not task.prompt:
        raise ConfigError(
            "task.prompt",
            f"not given, and {model.name!r} is a causal language model",
            "expected a template such as '{text}'",
        )
    if kind == "classifier" and not task.texts:
        raise ConfigError(
            "task.texts",
            f"not given, and {model.name!r} is an encoder, which task.prompt shows more than two columns",
            "expected one column or two",
        )
