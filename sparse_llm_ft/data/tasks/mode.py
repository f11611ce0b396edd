"""How a model learns a task: by generating text, or through a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["sequence_classification", "question_answering", "causal_lm", "seq2seq_lm"]

WITH_HEAD: tuple[Mode, ...] = ("sequence_classification", "question_answering")


@dataclass(frozen=True)
class TaskMode:
    """How a model learns a task.

    Attributes:
        outputs: outputs of a classification head: one per label, or 1 in a regression; None in other modes.
    """

    mode: Mode = "causal_lm"
    outputs: int | None = None

    @property
    def has_head(self) -> bool:
        """Whether the model has a head for the task, which is trained without an adapter."""
        return self.mode in WITH_HEAD


CAUSAL_LM = TaskMode()
