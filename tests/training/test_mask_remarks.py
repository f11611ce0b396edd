"""The learning rate that a masked plan is told to try."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.method_settings import TARGETS, config, start
from sparse_llm_ft.plan import AdapterPlan, IndexMask
from sparse_llm_ft.training.records import mask_remarks

ADAPTER = config("lora").adapter
SHAPES = {"a": (8, 16), "b": (4, 16)}


def plan(rows: dict[str, int], columns: int, grow: float = 1.0) -> AdapterPlan:
    """Masks that keep the first rows and columns, with scalings multiplied by `grow`."""
    uniform = next(iter(start("lora")[1].plan.active.values()))
    modules = {}
    for name, (d_out, d_in) in SHAPES.items():
        kept = {"rows": IndexMask.of(d_out, range(rows[name])), "cols": IndexMask.of(d_in, range(columns))}
        modules[name] = replace(uniform, lora_alpha=uniform.lora_alpha * grow, **kept)
    return AdapterPlan(modules)


@pytest.mark.parametrize(
    ("rows", "columns", "grow", "effect", "most"),
    [
        ({"a": 2, "b": 1}, 4, 1.0, 1 / 8, "4"),  # 1/4 of the rows, the root of 1/4 of the columns
        ({"a": 2, "b": 1}, 4, 2.0, 1 / 4, "4"),  # mask_scaling: only the rows are left
        ({"a": 1, "b": 3}, 16, 1.0, (1 / 8 + 3 / 4) / 2, "2.3"),
        ({"a": 1, "b": 1}, 1, 1.0, (1 / 8 + 1 / 4) / 2 / 4, "4"),
        ({"a": 1, "b": 1}, 1, 0.1, (1 / 8 + 1 / 4) / 2 / 40, "4"),
    ],
)
def test_the_rate_follows_the_kept_shares(rows, columns, grow, effect, most) -> None:
    (line,) = mask_remarks(plan(rows, columns, grow), SHAPES, ADAPTER)
    assert (
        f"first-order step is {effect:.3f} of" in line
        and f"consider up to {most} times LoRA's training.learning_rate" in line
    )


def test_plans_that_keep_nearly_all_are_told_nothing() -> None:
    assert mask_remarks(plan({"a": 8, "b": 4}, 16), SHAPES, ADAPTER) == []
    assert mask_remarks(plan({"a": 6, "b": 3}, 12), SHAPES, ADAPTER) == []
    assert mask_remarks(start("lora")[1].plan, TARGETS, ADAPTER) == []
    assert mask_remarks(AdapterPlan({"a": None}, trained=("score",)), SHAPES, ADAPTER) == []
