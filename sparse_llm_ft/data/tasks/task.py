"""What a task is: where its data lies and how a row becomes a prompt and a completion, or texts and a label."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from sparse_llm_ft.config.schema import Metric

_FIELD = re.compile(r"\{(\w+)\}")

Row = Mapping[str, Any]

Kind = Literal["classification", "regression", "extractive", "generation"]


class BadRow(ValueError):
    """A row that cannot be used; the text says why. Who knows its file and line makes a `DataError` of it."""


class MissingColumn(BadRow):
    """A row without a column that the task needs: most likely none of the file's rows has it."""


@dataclass(frozen=True)
class Task:
    """One entry of the registry.

    Attributes:
        name: as in ``task.name``.
        hub_id: data set on the Hugging Face hub; None where only a local folder will do.
        prompt, completion: templates whose ``{column}`` fields are the row's columns. None: the user gives them.
            In a classification or regression the completion's only field is the label column, which stands for the
            label word, or for the score in one decimal.
        references: further columns that hold alternative completions, used in evaluation where a row has them.
        splits: our split -> the hub's; a local folder has files of the same names.
        hub_config: configuration of the hub's data set, where it has several.
        labels: label words in the order of the integer labels; None where the task is no classification.
        score: lowest and highest label of a regression; None where the task is none.
        extractive: whether completions are spans of a text: ``texts`` are question and context, and rows have
            ``answers`` as SQuAD has them, ``{"text": [...], "answer_start": [...]}``.
        texts: the columns an encoder sees, one or a pair.
        label_column: holds the integer label, the label word itself, or the score.
        metrics: what is measured, the one that papers report first.
        group_by: column; rows of an evaluated split with the same value are one sample with all their references.
        further_splits: name -> (our split -> the hub's): measured beside the first, MNLI's ``mismatched``.
        flatten: makes of a nested row of the hub the flat rows that the templates name; raises `BadRow`.
        nested: columns that `flatten` reads.
        no_answer: what a model that writes shall say where a question has no answer; None: every one has.
        messages: column of a chat: a list of ``{"role": ..., "content": ...}``; its last turn is the completion.
        hub_revision: branch of the hub's data set, where the main one holds a loading script, which `datasets` no
            longer runs: the hub's own conversion to parquet.
        description, source: what it is, and the paper, for people.
        example: a row as the hub has it, for people; of our own making.
        path, on_bad_row, streaming: as in `TaskConfig`; `resolve_task` fills them in.
    """

    name: str
    hub_id: str | None
    prompt: str | None
    completion: str | None
    references: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )
    hub_config: str | None = None
    labels: tuple[str, ...] | None = None
    score: tuple[float, float] | None = None
    extractive: bool = False
    texts: tuple[str, ...] = ()
    label_column: str = "label"
    metrics: tuple[Metric, ...] = ("rouge",)
    group_by: str | None = None
    further_splits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    flatten: Callable[[Row], Iterable[Row]] | None = None
    nested: tuple[str, ...] = ()
    no_answer: str | None = None
    messages: str | None = None
    hub_revision: str | None = None
    description: str = ""
    source: str = ""
    example: Row | None = None
    path: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    streaming: bool = False

    @property
    def kind(self) -> Kind:
        """What is predicted: a label, a score, a span of a text, or a text."""
        if self.labels is not None:
            return "classification"
        return "regression" if self.score is not None else "extractive" if self.extractive else "generation"

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """Columns whose texts a model sees."""
        return tuple(dict.fromkeys((*template_columns(self.prompt or ""), *self.texts)))

    @cached_property
    def filled(self) -> tuple[str, ...]:
        """Columns of the completion."""
        return tuple(template_columns(self.completion or ""))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that a flat row must have, in the order of the templates."""
        label = (self.label_column,) if self.kind in ("classification", "regression") else ()
        further = tuple(column for column in (self.messages, self.group_by) if column)
        return tuple(dict.fromkeys((*self.shown, *self.filled, *label, *further)))

    @property
    def outputs(self) -> int | None:
        """Outputs of a head for the task: its labels, 1 for a score, 2 (start and end) for a span; None: no head."""
        if self.labels is not None:
            return len(self.labels)
        return 2 if self.extractive else 1 if self.score is not None else None


def require(row: Row, columns: Iterable[str]) -> None:
    """Raise `MissingColumn` unless the row has all `columns`."""
    columns = tuple(columns)
    missing = [column for column in columns if column not in row]
    if missing:
        found = ", ".join(map(str, row))[:200] or "none"
        raise MissingColumn(f"no column {missing[0]!r}; found {found}; needed {', '.join(columns)}")


def template_columns(template: str) -> list[str]:
    """The columns a template needs, in order."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def render(template: str, row: Mapping[str, str]) -> str:
    """Fill a template. Only whole ``{column}`` fields are replaced; texts may hold braces of their own."""
    return _FIELD.sub(lambda match: row[match[1]], template)
