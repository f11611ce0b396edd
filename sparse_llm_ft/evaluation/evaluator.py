"""`Evaluator`: metrics of the current model, and a file of its predictions."""

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
from sparse_llm_ft.data.tasks import Task, render
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.distributed.collectives import run_on_rank_zero
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.evaluation.control_tokens import ControlTokens
from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.loop import mean_loss, predict_labels
from sparse_llm_ft.evaluation.metrics import score
from sparse_llm_ft.evaluation.spans import choose_spans
from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.objectives.spans import SpanObjective

Rows = list[dict[str, Any]]
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a fixed subset: before and after training, and in `sparse-llm-ft evaluate`.

    Attributes:
        console: shows the progress.
        end_token_id: ends a decoder's texts beside the end-of-sequence tokens, if given.
    """

    settings: EvaluationConfig
    task: Task
    task_mode: TaskMode
    parts: Sequence[EvalSplit]
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]
    world: World
    zero_stage: int
    seed: int
    console: Console
    end_token_id: int | None = None

    @property
    def count(self) -> int:
        """Number of samples of all parts."""
        return sum(len(part.examples) for part in self.parts)

    def __call__(self, model: nn.Module, predictions: Path) -> dict[str, float]:
        """Collective. ``loss`` (mean per unit) and the task's metrics; a further split's name is appended, e.g.
        ``accuracy_mismatched``.

        Args:
            predictions: rank 0 writes prompts, predictions and targets to this file as JSON lines.
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
        """Collective. Every rank gets all predictions, in order: texts, label indices, or scores; and the mean loss, or
        None if the forward passes do not compute it.
        """
        with Wait(self.console, f"predicting {part.name}".rstrip(), unit="batches") as wait:
            return self._predict(model, part, wait)

    def _predict(self, model: nn.Module, part: EvalSplit, wait: Wait) -> tuple[list[Any], float | None]:
        ranks = self.world.rank, self.world.size
        size = self.settings.micro_batch_size
        if isinstance(self.objective, SpanObjective):
            unanswerable = self.task.no_answer is not None
            spans = choose_spans(model, part.examples, part.samples, self.objective, size, *ranks, unanswerable, wait)
            return spans, None
        if self._has_labels:
            loss, values = predict_labels(model, part.samples, self.objective, size, *ranks, wait)
            return (values if self.task.labels is None else [int(value) for value in values]), loss
        texts = generate(
            model,
            part.samples,
            self.tokenizer,
            self.settings,
            *ranks,
            synced=self.zero_stage == 3,
            seed=self.seed,
            seq2seq=self.task_mode.mode == "seq2seq_lm",
            end_token_id=self.end_token_id,
            wait=wait,
        )
        return texts, None

    @property
    def _has_labels(self) -> bool:
        """Whether the objective predicts labels or scores, so that no text is generated."""
        return not isinstance(self.objective, SpanObjective) and (
            self.task_mode.has_head or self.task.labels is not None
        )

    def _part(self, model: nn.Module, part: EvalSplit) -> tuple[dict[str, float], Rows]:
        predictions, loss = self.predict(model, part)
        metrics, rows = (self._score_labels if self._has_labels else self._score_texts)(part, predictions)
        return {"loss": self._loss(model, part) if loss is None else loss} | metrics, rows

    def _score_texts(self, part: EvalSplit, texts: list[str]) -> tuple[dict[str, float], Rows]:
        spans = isinstance(self.objective, SpanObjective)
        # Generated texts have no control tokens; spans are words of the data on both sides.
        control = ControlTokens.of(self.tokenizer)
        clean, same = (str, str) if spans else (control.strip, control.comparable)
        references = [[clean(text) for text in example.references] for example in part.examples]
        rows: Rows = [
            ({"question": example.texts[0]} if spans else {"prompt": example.prompt})
            | {"prediction": text, "references": right}
            for example, text, right in zip(part.examples, texts, references, strict=True)
        ]
        if self.task.score is not None:
            scores = [example.label for example in part.examples]
            return score(self.task.metrics, [as_score(text, self.task.score) for text in texts], scores), rows
        answers = [same(self._answer(text)) for text in texts]
        return score(self.task.metrics, answers, [[same(text) for text in right] for right in references]), rows

    def _answer(self, text: str) -> str:
        """The text; the empty answer in place of `task.no_answer`, or of the completion that has it."""
        task = self.task
        if not task.no_answer:
            return text
        assert task.completion, "resolve_task made sure"
        is_alone = len(task.completion_columns) == 1
        learned = render(task.completion, {task.completion_columns[0]: task.no_answer}) if is_alone else ""
        return "" if text.strip() in (task.no_answer, learned.strip()) else text

    def _score_labels(self, part: EvalSplit, predictions: list[Any]) -> tuple[dict[str, float], Rows]:
        targets = [sample.label for sample in part.samples]
        rows: Rows = [
            {"prompt": example.prompt, "prediction": self.readable(prediction), "label": self.readable(target)}
            for example, prediction, target in zip(part.examples, predictions, targets, strict=True)
        ]
        return score(self.task.metrics, predictions, targets, len(self.task.labels or ())), rows

    def readable(self, prediction: Any) -> Any:
        """A prediction of `predict`, with label indices replaced by label words."""
        return self.task.labels[prediction] if self._has_labels and self.task.labels is not None else prediction

    def _loss(self, model: nn.Module, part: EvalSplit) -> float:
        world, size = self.world, self.settings.micro_batch_size
        with Wait(self.console, f"measuring the loss {part.name}".rstrip(), unit="batches") as wait:
            return mean_loss(model, part.samples, self.objective, size, world.rank, world.size, wait)


def as_score(text: str, limits: tuple[float, float]) -> float:
    """The first number in a text, clamped to the limits; the lower limit if there is none."""
    found = _NUMBER.search(text)
    return min(max(float(found[0]), limits[0]), limits[1]) if found else limits[0]
