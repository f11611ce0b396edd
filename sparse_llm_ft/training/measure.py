"""How good the model is as it is, with the predictions written beside what is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.distributed import World
from sparse_llm_ft.evaluation import Objective, accuracy, choose_labels, generate, matthews, mean_loss, rouge
from sparse_llm_ft.folders import write_file
from sparse_llm_ft.training.agreement import on_rank_zero

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Measure:
    """The fixed subset that is measured before and after training."""

    settings: EvaluationConfig
    task: Task
    examples: Sequence[Example]
    samples: Sequence[Any]
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]
    world: World
    zero_stage: int

    def __call__(self, model: nn.Module, predictions: Path) -> dict[str, float]:
        """``loss`` (mean per unit); of a classification ``accuracy`` and, where it is the task's metric,
        ``matthews`` (percent); else ``rouge1``, ``rouge2``, ``rougeL`` (F1, percent). Collective.

        Args:
            predictions: file that rank 0 writes prompts, predictions and what is right into, as JSON lines.
        """
        metrics, rows = self._generation(model) if self.task.labels is None else self._labels(model, self.task.labels)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        on_rank_zero(self.world, lambda: write_file(predictions, lines))
        return dict(metrics)

    def _generation(self, model: nn.Module) -> tuple[Mapping[str, float], Rows]:
        world, size = self.world, self.settings.micro_batch_size
        loss = mean_loss(model, self.samples, self.objective, size, world.rank, world.size)
        texts = generate(
            model,
            self.samples,
            self.tokenizer,
            self.settings.max_new_tokens,
            size,
            world.rank,
            world.size,
            synced=self.zero_stage == 3,
        )
        rows = [
            {"prompt": example.prompt, "prediction": text, "references": example.references}
            for example, text in zip(self.examples, texts, strict=True)
        ]
        return {"loss": loss} | rouge(texts, [example.references for example in self.examples]), rows

    def _labels(self, model: nn.Module, words: Sequence[str]) -> tuple[Mapping[str, float], Rows]:
        world, size = self.world, self.settings.micro_batch_size
        loss, choices = choose_labels(model, self.samples, self.objective, size, world.rank, world.size)
        labels = [sample.label for sample in self.samples]
        metrics = {"loss": loss, "accuracy": accuracy(choices, labels)}
        if self.task.metric == "matthews":
            metrics["matthews"] = matthews(choices, labels)
        rows = [
            {"prompt": example.prompt, "prediction": words[choice], "label": words[label]}
            for example, choice, label in zip(self.examples, choices, labels, strict=True)
        ]
        return metrics, rows
