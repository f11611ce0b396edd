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
from sparse_llm_ft.data.dataset import EvalSplit
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.distributed.collectives import run_on_rank_zero
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.loop import choose_labels, mean_loss
from sparse_llm_ft.evaluation.metrics import score
from sparse_llm_ft.evaluation.spans import choose_spans
from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.objectives.spans import SpanObjective

Rows = list[dict[str, Any]]
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Evaluator:
    """The fixed subset that is measured before and after training, and by `sparse-llm-ft evaluate`."""

    settings: EvaluationConfig
    task: Task
    task_mode: TaskMode
    parts: Sequence[EvalSplit]
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]
    world: World
    zero_stage: int
    seed: int

    @property
    def count(self) -> int:
        """How many samples all parts have."""
        return sum(len(part.examples) for part in self.parts)

    def __call__(self, model: nn.Module, predictions: Path) -> dict[str, float]:
        """Collective. ``loss`` (mean per unit) and the task's metrics; those of a further split end in its name, as in
        ``accuracy_mismatched``.

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
        run_on_rank_zero(self.world, lambda: write_file(predictions, "".join(lines)))
        return metrics

    def predict(self, model: nn.Module, part: EvalSplit) -> tuple[list[Any], float | None]:
        """Collective. For every example, in order, on every rank: a text, the number of a label, or a score; and the
        mean loss, where the same forward passes give it.
        """
        ranks = self.world.rank, self.world.size
        size = self.settings.micro_batch_size
        if isinstance(self.objective, SpanObjective):
            unanswerable = self.task.no_answer is not None
            spans = choose_spans(model, part.examples, part.samples, self.objective, size, *ranks, unanswerable)
            return spans, None
        if self._chooses:
            loss, chosen = choose_labels(model, part.samples, self.objective, size, *ranks)
            return (chosen if self.task.labels is None else [int(choice) for choice in chosen]), loss
        texts = generate(
            model,
            part.samples,
            self.tokenizer,
            self.settings,
            *ranks,
            synced=self.zero_stage == 3,
            seed=self.seed,
            seq2seq=self.task_mode.mode == "seq2seq_lm",
        )
        return texts, None

    @property
    def _chooses(self) -> bool:
        """Labels or scores come from the objective's judgement, no text is written."""
        return not isinstance(self.objective, SpanObjective) and (
            self.task_mode.has_head or self.task.labels is not None
        )

    def _part(self, model: nn.Module, part: EvalSplit) -> tuple[dict[str, float], Rows]:
        predictions, loss = self.predict(model, part)
        metrics, rows = (self._judge_choices if self._chooses else self._judge_texts)(part, predictions)
        return {"loss": self._loss(model, part) if loss is None else loss} | metrics, rows

    def _judge_texts(self, part: EvalSplit, texts: list[str]) -> tuple[dict[str, float], Rows]:
        spans = isinstance(self.objective, SpanObjective)
        rows: Rows = [
            ({"question": example.texts[0]} if spans else {"prompt": example.prompt})
            | {"prediction": text, "references": example.references}
            for example, text in zip(part.examples, texts, strict=True)
        ]
        if self.task.score is not None:
            scores = [example.label for example in part.examples]
            return score(self.task.metrics, [as_score(text, self.task.score) for text in texts], scores), rows
        answers = [self._answer(text) for text in texts]
        return score(self.task.metrics, answers, [example.references for example in part.examples]), rows

    def _answer(self, text: str) -> str:
        """The text; of a question that may have no answer, the words that say so are the empty one."""
        return "" if self.task.no_answer and text.strip() == self.task.no_answer else text

    def _judge_choices(self, part: EvalSplit, chosen: list[Any]) -> tuple[dict[str, float], Rows]:
        right, words = [sample.label for sample in part.samples], self.task.labels
        rows: Rows = [
            {"prompt": example.prompt, "prediction": self.shown(choice), "label": self.shown(label)}
            for example, choice, label in zip(part.examples, chosen, right, strict=True)
        ]
        return score(self.task.metrics, chosen, right, len(words or ())), rows

    def shown(self, prediction: Any) -> Any:
        """What `predict` has found as people read it: labels by their words."""
        return self.task.labels[prediction] if self._chooses and self.task.labels is not None else prediction

    def _loss(self, model: nn.Module, part: EvalSplit) -> float:
        world, size = self.world, self.settings.micro_batch_size
        return mean_loss(model, part.samples, self.objective, size, world.rank, world.size)


def as_score(text: str, limits: tuple[float, float]) -> float:
    """The first number of a text, held within the limits; the lowest score where it has none."""
    found = _NUMBER.search(text)
    return min(max(float(found[0]), limits[0]), limits[1]) if found else limits[0]
