"""The systems of the three papers' main and ablation tables, as the settings that select them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        name: the row's title.
        method: the ``method`` section; ``{half}`` and ``{quarter}`` stand for parts of the run's steps.
        paper: the table it belongs to.
        main: whether it runs on every task and model, or as an ablation on one task.
        adapter: settings of the ``adapter`` section in which it differs from the others: place and rank.
    """

    name: str
    method: Any
    paper: str
    main: bool = True
    adapter: Mapping[str, Any] = field(default_factory=dict)


def _weight(k: int, plus: bool = False, **settings: Any) -> dict[str, Any]:
    """Half of the run selects, and the first cut comes after half of that."""
    name = "weight_lora_plus" if plus else "weight_lora"
    return {"name": name, "keep": k, "steps": "{half}", "cut_after": "{quarter}", "batch_growth": "none"} | settings


def _partial(**settings: Any) -> dict[str, Any]:
    """Masks whose ratios are given."""
    return {"name": "partial_lora", "micro_batch_size": 8, "masking": "compact"} | settings


def _derived(**settings: Any) -> dict[str, Any]:
    """The paper's: Algorithm 1 on the default D_t, 200 samples."""
    return _partial(derivation="single", **settings)


def _drop(**settings: Any) -> dict[str, Any]:
    return {"name": "lora_drop", "sample_fraction": 0.1, "pilot_epochs": 3, "threshold": 0.9} | settings


QUERY_VALUE = {"target_modules": r".*\.(query|value|q_proj|v_proj)"}
"""Where LoRA-drop and its baselines have their adapters (A.1)."""
TWELVE = {"r": 12}
"""AdaLoRA ends with LoRA's budget: 12 ranks pruned to 8."""

BASELINES = "Baselines"
PARTIAL, DROP, WEIGHT = "Partial-LoRA", "LoRA-drop", "WeightLoRA"
TOGETHER = "Compositions"

SYSTEMS = (
    System("Full fine-tuning", {"name": "full"}, BASELINES, main=False),
    System("LoRA", {"name": "lora"}, BASELINES),
    System("LoRA+, ratio 4", {"name": "lora_plus", "lr_ratio": 4}, BASELINES, main=False),
    System("DoRA", {"name": "dora"}, BASELINES, main=False),
    System("AdaLoRA", {"name": "adalora", "target_r": 8}, BASELINES, adapter=TWELVE),
    System("VeRA", {"name": "vera", "r": 256}, BASELINES, main=False),
    System("Random masking 0.1", {"name": "random_masking", "ratio": 0.1}, BASELINES, main=False),
    System("Partial-LoRA", _derived(), PARTIAL),
    System("Partial-LoRA, SNIP", _derived(importance="snip"), PARTIAL, main=False),
    System("Partial-LoRA, IMP", _derived(importance="imp"), PARTIAL, main=False),
    System("Targeted-LoRA", _derived(selection="targeted"), PARTIAL),
    System("Inverted masks", _derived(selection="inverted"), PARTIAL, main=False),
    System("Stochastic masks", _derived(selection="stochastic"), PARTIAL, main=False),
    System("IMP, flow preservation", _derived(importance="imp", flow_preservation=True), PARTIAL, main=False),
    System("Balanced 0.1", _partial(ratios="balanced", ratio=0.1), PARTIAL, main=False),
    System("Balanced 0.5", _partial(ratios="balanced", ratio=0.5), PARTIAL, main=False),
    System("Pyramidal 0.7", _partial(ratios="pyramidal", ratio=0.7), PARTIAL, main=False),
    System(
        "Partial-AdaLoRA",
        _derived(base="adalora", adalora={"target_r": 8}, masking="optimizer"),
        PARTIAL,
        adapter=TWELVE,
    ),
    System("LoRA, query and value", {"name": "lora"}, DROP, adapter=QUERY_VALUE),
    System("LoRA-drop", _drop(), DROP, adapter=QUERY_VALUE),
    System("LoRA-drop, no sharing", _drop(share=False), DROP, adapter=QUERY_VALUE),
    System("LoRA-drop, inverted", _drop(choose="inverted"), DROP, main=False, adapter=QUERY_VALUE),
    System("LoRA-drop, random", _drop(choose="random"), DROP, main=False, adapter=QUERY_VALUE),
    System("LoRA-drop, top layers", _drop(choose="top"), DROP, main=False, adapter=QUERY_VALUE),
    # Half of LoRA's values on query and value, as in the paper. On MiniLM's 12 modules of 384 × 384 LoRA has 73,728,
    # and Tied-LoRA of rank 21 has 2 · 21 · 768 + 12 · (21 + 384) = 37,116.
    System("Sparse Adapter", {"name": "sparse_adapter", "sparsity": 0.5}, DROP, main=False, adapter=QUERY_VALUE),
    System(
        "Sparse Adapter, rows and columns (ours)",
        {"name": "sparse_adapter", "rule": "rows_columns", "sparsity": 0.5},
        DROP,
        main=False,
        adapter=QUERY_VALUE,
    ),
    System("Tied-LoRA", {"name": "tied_lora"}, DROP, main=False, adapter={**QUERY_VALUE, "r": 21}),
    System("VeRA, query and value", {"name": "vera", "r": 512}, DROP, main=False, adapter=QUERY_VALUE),
    System("WLoRA, K = 10", _weight(10), WEIGHT),
    System("WLoRA, K = 5", _weight(5), WEIGHT, main=False),
    System("WLoRA, K = 1", _weight(1), WEIGHT, main=False),
    System("RLoRA, K = 10", _weight(10, choose="random"), WEIGHT),
    System("RLoRA, K = 5", _weight(5, choose="random"), WEIGHT, main=False),
    System("RLoRA, K = 1", _weight(1, choose="random"), WEIGHT, main=False),
    System("WLoRA+, K = 10", _weight(10, plus=True), WEIGHT),
    System("WLoRA+, K = 10, Gaussian", _weight(10, plus=True, expansion="gaussian"), WEIGHT, main=False),
    System("WLoRA K = 10, then Partial masks", [_weight(10), _derived(floor_metric="loss")], TOGETHER, main=False),
    System("LoRA-drop, then Partial masks", [_drop(), _derived()], TOGETHER, main=False),
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
