"""Rows in the columns of the GEM benchmark (Gehrmann et al., 2021): ``target``, outside of train ``references`` too."""

from collections.abc import Callable, Iterator
from typing import Any

from sparse_llm_ft.data.tasks.template import Row


def gem_texts(row: Row) -> list[Any]:
    """The texts of a row: its ``references`` where it has any, as outside of train, or else its ``target``."""
    references = row.get("references")
    return list(references) if isinstance(references, list) and references else [row["target"]]


def with_gem_columns(column: str, grouped: bool = False) -> Callable[[Row], Iterator[Row]]:
    """A task's `flatten`: rows with GEM's columns get their text in `column`; other rows stay.

    Args:
        grouped: the task groups its evaluated rows, so a row with several references becomes as many rows.
    """

    def flatten(row: Row) -> Iterator[Row]:
        if column in row or "target" not in row:
            yield row
            return
        for text in gem_texts(row) if grouped else [row["target"]]:
            yield {**row, column: text}

    return flatten
