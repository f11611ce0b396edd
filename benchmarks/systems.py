"""The systems of the three papers' main and ablation tables, as the settings that select them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        name: the row's title.
        method: the ``method`` section; ``{half}`` and ``{quarter}`` stand for parts of the run's steps.
        paper: the table it belongs to.
        main: whether it runs on every task and model, or as an ablation on one task.
    """

    name: str
    method: Any
    paper: str
    main: bool = True


def _weight(k: int, plus: bool = False, **settings: Any) -> dict[str, Any]:
    """Half of the run selects, and the first cut comes after half of that."""
    name = "weight_lora_plus" if plus else "weight_lora"
    return {"name": name, "keep": k, "steps": "{half}", "cut_after": "{quarter}", "batch_growth": "none"} | settings


def _partial(**settings: Any) -> dict[str, Any]:
    return {"name": "partial_lora", "shots": 16, "micro_batch_size": 8, "masking": "compact"} | settings


def _drop(**settings: Any) -> dict[str, Any]:
    return {"name": "lora_drop", "sample_fraction": 0.1, "pilot_epochs": 3, "threshold": 0.9} | settings


BASELINES = "Baselines"
PARTIAL, DROP, WEIGHT = "Partial-LoRA", "LoRA-drop", "WeightLoRA"
TOGETHER = "Compositions"

SYSTEMS = (
    System("Full fine-tuning", {"name": "full"}, BASELINES, main=False),
    System("LoRA", {"name": "lora"}, BASELINES),
    System("LoRA+", {"name": "lora_plus", "lr_ratio": 4}, BASELINES, main=False),
    System("DoRA", {"name": "dora"}, BASELINES, main=False),
    System("AdaLoRA", {"name": "adalora"}, BASELINES),
    System("VeRA", {"name": "vera"}, BASELINES, main=False),
    System("Tied-LoRA", {"name": "tied_lora"}, BASELINES, main=False),
    System("Sparse Adapter", {"name": "sparse_adapter", "sparsity": 0.5}, BASELINES, main=False),
    System("Partial-LoRA", _partial(), PARTIAL),
    System("Partial-LoRA, SNIP", _partial(importance="snip"), PARTIAL, main=False),
    System("Partial-LoRA, IMP", _partial(importance="imp"), PARTIAL, main=False),
    System("Targeted-LoRA", _partial(selection="targeted"), PARTIAL),
    System("Inverted masks", _partial(selection="inverted"), PARTIAL, main=False),
    System("Stochastic masks", _partial(selection="stochastic"), PARTIAL, main=False),
    System("Flow preservation", _partial(selection="targeted", flow_preservation=True), PARTIAL, main=False),
    System("Balanced 0.1", _partial(ratios="balanced", ratio=0.1), PARTIAL, main=False),
    System("Balanced 0.5", _partial(ratios="balanced", ratio=0.5), PARTIAL, main=False),
    System("Pyramidal 0.7", _partial(ratios="pyramidal", ratio=0.7), PARTIAL, main=False),
    System("Partial-AdaLoRA", _partial(base="adalora"), PARTIAL),
    System("LoRA-drop", _drop(), DROP),
    System("LoRA-drop, no sharing", _drop(share=False), DROP),
    System("LoRA-drop, inverted", _drop(choose="inverted"), DROP, main=False),
    System("LoRA-drop, random", _drop(choose="random"), DROP, main=False),
    System("LoRA-drop, top layers", _drop(choose="top"), DROP, main=False),
    System("WLoRA, K = 10", _weight(10), WEIGHT),
    System("WLoRA, K = 5", _weight(5), WEIGHT, main=False),
    System("WLoRA, K = 1", _weight(1), WEIGHT, main=False),
    System("RLoRA, K = 10", _weight(10, choose="random"), WEIGHT),
    System("RLoRA, K = 5", _weight(5, choose="random"), WEIGHT, main=False),
    System("RLoRA, K = 1", _weight(1, choose="random"), WEIGHT, main=False),
    System("WLoRA+, K = 10", _weight(10, plus=True), WEIGHT),
    System("WLoRA+, K = 10, Gaussian", _weight(10, plus=True, expansion="gaussian"), WEIGHT, main=False),
    System("WLoRA K = 10, then Partial masks", [_weight(10), _partial(floor_metric="loss")], TOGETHER, main=False),
    System("LoRA-drop, then Partial masks", [_drop(), _partial()], TOGETHER, main=False),
)


def settle(method: Any, steps: int, settings: Mapping[str, Mapping[str, Any]]) -> Any:
    """The method section of a run of `steps` steps, with a model's own `settings` by method name."""
    if isinstance(method, list):
        return [settle(part, steps, settings) for part in method]
    fractions = {"{half}": steps // 2, "{quarter}": steps // 4}
    filled: dict[str, Any] = {
        key: fractions.get(value, value) if isinstance(value, str) else value for key, value in method.items()
    }
    filled.update(settings.get(method["name"], {}))
    return filled
