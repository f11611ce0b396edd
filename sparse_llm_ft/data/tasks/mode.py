"""How a model learns a task: by writing, or through a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["sequence_classification", "question_answering", "causal_lm", "seq2seq_lm"]

WITH_HEAD: tuple[Mode, ...] = ("sequence_classification", "question_answering")


@dataclass(frozen=True)
class TaskMode:
    """How a model learns a task.

    Attributes:
        outputs: of a classification head: one for each label, or 1 in a regression; None in other modes.
    """

    mode: Mode = "causal_lm"
    outputs: int | None = None

    @property
    def has_head(self) -> bool:
        """Whether the model's head belongs to the task, and is trained whole."""
        return self.mode in WITH_HEAD


CAUSAL_LM = TaskMode()
