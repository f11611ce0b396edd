"""Tuners are one object each: no other file asks for one by name, and an unknown one is refused."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_llm_ft
from sparse_llm_ft.adapters import TUNERS, tuner_of
from sparse_llm_ft.adapters.targets import check_modules
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, PlanError

PACKAGE = Path(sparse_llm_ft.__file__).parent
MAY_NAME = {
    "export/gguf_file.py": {"lora"},  # a word of the file format
    "adapters/tuners.py": set(TUNERS),
    "plan.py": {"sparse_lora"},  # the default
}
METHODS = ("config", "methods")
"""Packages that choose a tuner; and names of methods, which are the same words."""


def strings(path: Path) -> Iterator[ast.Constant]:
    """String constants of the code; docstrings and other strings that stand alone are none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def test_only_the_tuners_themselves_and_methods_name_a_tuner() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        allowed = MAY_NAME.get(place.as_posix(), set())
        if place.parts[0] not in METHODS:
            found += [f"{place}:{s.lineno}: {s.value}" for s in strings(path) if s.value in TUNERS.keys() - allowed]
    assert not found


def test_an_unknown_tuner_is_refused_with_the_known_ones() -> None:
    plan = AdapterPlan({"h.0.q": ModuleAdapter(2, 4.0)}, tuner="ia3")
    with pytest.raises(PlanError, match=r"tuner is 'ia3'; known: sparse_lora, lora, rslora, dora, vera, adalora$"):
        check_modules(plan, {"h.0.q": (6, 4)})


def test_an_option_that_its_tuner_does_not_take_is_refused() -> None:
    plan = AdapterPlan({"h.0.q": ModuleAdapter(2, 4.0)}, options={"target_r": 2})
    with pytest.raises(PlanError, match="option 'target_r' is 2, which tuner sparse_lora does not take"):
        tuner_of(plan)
