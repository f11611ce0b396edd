"""Evaluation leaves every module in the mode that it found, also where a forward pass fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from helpers.tiny_run import run_settings
from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.config import EvaluationConfig, parse_config
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.spans import SpanSample
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.evaluation.generation import rank_tokens
from sparse_llm_ft.evaluation.loop import mean_loss, predict_labels
from sparse_llm_ft.evaluation.spans import rank_spans
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.objectives.classification import ClassificationObjective
from sparse_llm_ft.objectives.spans import SpanObjective
from sparse_llm_ft.plan import uniform_plan
from sparse_llm_ft.training.scorer import Scorer

TEXTS = [TextSample((2, 5, 3), None, 0), TextSample((2, 5, 6, 3), None, 1)]
WINDOWS = [SpanSample((2, 5, 3), None, 1, 1, 0, 0, (None, (0, 4), None))]
CLASSES, SPANS = ClassificationObjective(0), SpanObjective(0)


@dataclass
class Case:
    """What the five loops need: a model with adapters, a tokenizer, and a run that scores."""

    model: nn.Module
    targets: list[str]
    tokenizer: Any
    scorer: Scorer


@pytest.fixture
def case(encoder_folder: Path, data_folder: Path, tmp_path: Path) -> Case:
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder)
    targets = find_targets(base, "all-linear")
    config = parse_config(run_settings(encoder_folder, data_folder, tmp_path))
    scorer = Scorer(config, World(0, 1, 0, 1), CLASSES, Console(1))
    model = add_adapters(base, uniform_plan(targets, 2, 4.0))
    return Case(model, list(targets), AutoTokenizer.from_pretrained(encoder_folder), scorer)


def written(case: Case) -> object:
    samples = [Sample((2, 5), (3,))]
    model: Any = case.model
    model.get_base_model().generation_config = own = GenerationConfig()
    model.generate = lambda **inputs: model(inputs["input_ids"])
    settings = EvaluationConfig(max_new_tokens=2)
    try:
        return rank_tokens(model, samples, case.tokenizer, settings, 0, 1, False, seed=0, seq2seq=False)
    finally:
        assert model.get_base_model().generation_config is own


LOOPS: dict[str, Callable[[Case], object]] = {
    "mean loss": lambda case: mean_loss(case.model, TEXTS, CLASSES, 1, 0, 1),
    "labels": lambda case: predict_labels(case.model, TEXTS, CLASSES, 1, 0, 1),
    "spans": lambda case: rank_spans(case.model, WINDOWS, SPANS, 1, 0, 1),
    "texts": written,
    "scores": lambda case: case.scorer.lora_output(case.model, case.targets, TEXTS),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_modes_are_restored_when_a_forward_pass_fails(case: Case, loop: str) -> None:
    modules = list(case.model.modules())
    case.model.train()
    next(m for m in modules if isinstance(m, nn.Dropout)).eval()  # a module of its own mode
    modes = [module.training for module in modules]
    seen: list[bool] = []

    def fail(*_: Any) -> None:
        seen.extend(module.training for module in modules)
        raise RuntimeError("out of memory")

    case.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        LOOPS[loop](case)
    assert seen and not any(seen)
    assert [module.training for module in modules] == modes
    assert len(set(modes)) == 2
