"""The runs that are killed: every kind of method, at every ZeRO stage it allows, in both precisions."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from helpers.all_methods import DROP, PARTIAL, WEIGHT, with_cache
from helpers.all_methods import METHODS as ALL
from helpers.tiny_run import run_settings

METHODS: dict[str, Any] = {
    "lora": "lora",
    "lora_plus": "lora_plus",
    "dora": "dora",
    "vera": ALL["vera"],
    "adalora": ALL["adalora"],
    "weight_lora": WEIGHT | {"batch_growth": "none"},
    "weight_lora_plus": WEIGHT | {"name": "weight_lora_plus"},
    "lora_drop": DROP,
    "partial_lora": PARTIAL,
    "lora_drop, partial_lora": [DROP, PARTIAL],
    "weight_lora, partial_lora": [WEIGHT, PARTIAL],
}
_ONE_PHASE = ("lora", "lora_plus", "dora", "vera", "adalora")


class Configuration(NamedTuple):
    """What differs from trial to trial."""

    method: str
    stage: int
    dtype: str

    @property
    def changes(self) -> bool:
        """Whether the run has a change of phase."""
        return self.method not in _ONE_PHASE

    def __str__(self) -> str:
        return f"{self.method}, ZeRO-{self.stage}, {self.dtype}"


CONFIGURATIONS = [
    Configuration(method, stage, dtype)
    for method, stage, dtype in product(METHODS, range(4), ("float32", "bfloat16"))
    if not (method in ("adalora", "dora") and stage == 3)
]


def settings(
    configuration: Configuration, model: Path, data: Path, output_dir: Path, report: bool = False
) -> dict[str, Any]:
    """8 counted steps: checkpoints every 2, of which 2 stay; the validation loss every 3; dropout where it can be.

    Args:
        report: whether pictures are drawn, which takes longer than all the rest.
    """
    tree = run_settings(model, data, output_dir) | {"report": report}
    tree["model"]["dtype"] = configuration.dtype
    tree["deepspeed"] = {"zero_stage": configuration.stage}
    tree["training"] |= {"save_every": 2, "keep_checkpoints": 2, "eval_every": 3, "warmup_steps": 2}
    # A run must not find what another one has derived: it would not derive.
    tree["method"] = with_cache(METHODS[configuration.method], output_dir.with_name(f"{output_dir.name}-cache"))
    return tree
