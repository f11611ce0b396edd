"""How good the model is as it is, with the predictions written beside what is right."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.distributed import World
from sparse_llm_ft.evaluation import (
    Objective,
    SpanObjective,
    choose_labels,
    choose_spans,
    generate,
    mean_loss,
    score,
)
from sparse_llm_ft.folders import write_file
from sparse_llm_ft.modes import Use
from sparse_llm_ft.training.agreement import on_rank_zero
from sparse_llm_ft.training.samples import Measured

Rows = list[dict[str, Any]]
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Measure:
    """The fixed subset that is measured before and after training, and by `sparse-llm-ft evaluate`."""

    settings: EvaluationConfig
    task: Task
    use: Use
    parts: Sequence[Measured]
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]
    world: World
    zero_stage: int
    seed: int

    @property
    def count(self) -> int:
        """Samples of all parts."""
        return sum(len(part.examples) for part in self.parts)

    def __call__(self, model: nn.Module, predictions: Path) -> dict[str, float]:
        """``loss`` (mean per unit), and the task's metrics; those of a further split end in its name, as in
        ``accuracy_mismatched``. Collective.

        Args:
            predictions: file that rank 0 writes prompts, predictions and what is right into, as JSON lines.
        """
        metrics: dict[str, float] = {}
        lines = []
        for part in self.parts:
            found, rows = self._part(model, part)
            ending = f"_{part.name}" if part.name else ""
            metrics |= {f"{name}{ending}": value for name, value in found.items()}
            where = {"split": part.name} if part.name else {}
            lines += [json.dumps(row | where, ensure_ascii=False) + "\n" for row in rows]
        on_rank_zero(self.world, lambda: write_file(predictions, "".join(lines)))
        return metrics

    def _part(self, model: nn.Module, part: Measured) -> tuple[dict[str, float], Rows]:
        if self.use.mode == "question_answering":
            return self._spans(model, part)
        if self.use.has_head or self.task.labels is not None:
            return self._labels(model, part)
        return self._texts(model, part)

    def _texts(self, model: nn.Module, part: Measured) -> tuple[dict[str, float], Rows]:
        texts = generate(
            model,
            part.samples,
            self.tokenizer,
            self.settings,
            self.world.rank,
            self.world.size,
            synced=self.zero_stage == 3,
            seed=self.seed,
            seq2seq=self.use.mode == "seq2seq_lm",
        )
        rows: Rows = [
            {"prompt": example.prompt, "prediction": text, "references": example.references}
            for example, text in zip(part.examples, texts, strict=True)
        ]
        loss = {"loss": self._loss(model, part)}
        if self.task.score is not None:
            scores = [example.label for example in part.examples]
            return loss | score(self.task.metrics, [as_score(text, self.task.score) for text in texts], scores), rows
        answers = [self._answer(text) for text in texts]
        return loss | score(self.task.metrics, answers, [example.references for example in part.examples]), rows

    def _answer(self, text: str) -> str:
        """The text; of a question that may have no answer, the words that say so are the empty one."""
        return "" if self.task.no_answer and text.strip() == self.task.no_answer else text

    def _labels(self, model: nn.Module, part: Measured) -> tuple[dict[str, float], Rows]:
        world, size = self.world, self.settings.micro_batch_size
        loss, chosen = choose_labels(model, part.samples, self.objective, size, world.rank, world.size)
        right = [sample.label for sample in part.samples]
        words = self.task.labels
        if words is None:
            predictions: list[Any] = chosen
            shown: list[Any] = [chosen, right]
        else:
            predictions = [int(choice) for choice in chosen]
            shown = [[words[i] for i in numbers] for numbers in (predictions, right)]
        rows: Rows = [
            {"prompt": example.prompt, "prediction": prediction, "label": label}
            for example, prediction, label in zip(part.examples, *shown, strict=True)
        ]
        return {"loss": loss} | score(self.task.metrics, predictions, right, len(words or ())), rows

    def _spans(self, model: nn.Module, part: Measured) -> tuple[dict[str, float], Rows]:
        assert isinstance(self.objective, SpanObjective)
        texts = choose_spans(
            model,
            part.examples,
            part.samples,
            self.objective,
            self.settings.micro_batch_size,
            self.world.rank,
            self.world.size,
            unanswerable=self.task.no_answer is not None,
        )
        rows: Rows = [
            {"question": example.texts[0], "prediction": text, "references": example.references}
            for example, text in zip(part.examples, texts, strict=True)
        ]
        metrics = score(self.task.metrics, texts, [example.references for example in part.examples])
        return {"loss": self._loss(model, part)} | metrics, rows

    def _loss(self, model: nn.Module, part: Measured) -> float:
        world, size = self.world, self.settings.micro_batch_size
        return mean_loss(model, part.samples, self.objective, size, world.rank, world.size)


def as_score(text: str, limits: tuple[float, float]) -> float:
    """The first number of a text, held within the limits; the lowest score where it has none."""
    found = _NUMBER.search(text)
    return min(max(float(found[0]), limits[0]), limits[1]) if found else limits[0]
