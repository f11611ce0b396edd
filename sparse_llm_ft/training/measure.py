"""Loss and ROUGE of the model as it is, with the predictions written beside their references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.encoding import Sample
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.distributed import World
from sparse_llm_ft.evaluation import generate, mean_loss, rouge
from sparse_llm_ft.folders import write_file
from sparse_llm_ft.training.agreement import on_rank_zero


@dataclass(frozen=True)
class Measure:
    """The fixed subset that is measured before and after training."""

    settings: EvaluationConfig
    examples: Sequence[Example]
    samples: Sequence[Sample]
    tokenizer: PreTrainedTokenizerBase
    world: World
    zero_stage: int

    def __call__(self, model: nn.Module, predictions: Path) -> dict[str, float]:
        """``loss`` (mean per completion token), ``rouge1``, ``rouge2``, ``rougeL`` (F1, percent). Collective.

        Args:
            predictions: file that rank 0 writes prompts, predictions and references into, as JSON lines.
        """
        world, size = self.world, self.settings.micro_batch_size
        metrics = {"loss": mean_loss(model, self.samples, self.tokenizer.pad_token_id, size, world.rank, world.size)}
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
        metrics |= rouge(texts, [example.references for example in self.examples])
        rows = [
            {"prompt": example.prompt, "prediction": text, "references": example.references}
            for example, text in zip(self.examples, texts, strict=True)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        on_rank_zero(world, lambda: write_file(predictions, lines))
        return metrics
