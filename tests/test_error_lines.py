"""Errors are one line. However long their parts are, the line keeps the advice at its end."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparse_llm_ft
from sparse_llm_ft.errors import ConfigError, DataError, UserError, one_line, reason_of, shortened

PACKAGE = Path(sparse_llm_ft.__file__).parent


@pytest.mark.parametrize("length", [10, 900, 5000, 10**6])
def test_the_advice_at_the_end_of_a_long_line_stays(length: int) -> None:
    long = "x" * length
    for error in (
        ConfigError("adapter.r", f"{long} is not a number", "expected 8"),
        ConfigError("adapter.r", "0", f"known: {long}, expected 8"),
        DataError("a.jsonl", 3, f"no column {long}; expected 8"),
        UserError(f"{long}; expected 8"),
    ):
        assert str(error).endswith("expected 8") and len(str(error)) < 2100


def test_a_librarys_error_keeps_its_beginning_and_its_end() -> None:
    text = reason_of(ValueError(f"cannot load\n{'x ' * 900}\n  pass token=... instead"), 100)
    assert text.startswith("cannot load x") and text.endswith("pass token=... instead") and len(text) <= 110
    assert shortened("abc", 3) == "abc" and one_line("a\nb") == "a\\nb"


def test_no_librarys_error_is_cut_at_its_end() -> None:
    """`str(error)[:300]` would drop the advice at the end; `reason_of` keeps it."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.lower is None:
                assert "str(error)" not in ast.unparse(node.value), f"{path}:{node.lineno}"
