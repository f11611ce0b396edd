"""`Task`: where the data are, and how a row becomes a prompt and a completion, or texts and a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from sparse_llm_ft.config.schema import Metric
from sparse_llm_ft.data.tasks.template import Row, template_columns

Kind = Literal["classification", "regression", "extractive", "generation"]


@dataclass(frozen=True)
class Task:
    """One entry of the registry.

    Attributes:
        name: as in ``task.name``.
        hub_id: data set on the Hugging Face hub; None if the task needs a local folder.
        prompt, completion: templates with ``{column}`` fields; None if the user gives them. In a classification or
            regression the completion's only field is the label column, filled with the label word, or the score to one
            decimal.
        references: columns with alternative completions, used in evaluation; a row may lack them.
        splits: our split -> the hub's; files of a local folder have the same names.
        hub_config: configuration of the hub's data set, if it has several.
        labels: label words in the order of the integer labels; None unless the task is a classification.
        score: lowest and highest label of a regression; None for other tasks.
        extractive: whether completions are spans of a text. Then ``texts`` are question and context, and rows have
            ``answers`` in SQuAD's form, ``{"text": [...], "answer_start": [...]}``.
        texts: an encoder's input columns, one or a pair.
        label_column: holds the integer label, the label word, or the score.
        metrics: the metrics; the papers' main one comes first.
        group_by: column; rows of an evaluated split with the same value become one sample with all references.
        further_splits: name -> (our split -> the hub's), also evaluated: MNLI's ``mismatched``.
        flatten: turns a nested row of the hub into flat rows with the templates' columns; raises `BadRow`.
        nested: columns that `flatten` reads.
        no_answer: what a generating model must write if a question has no answer; None if every question has one.
        messages: column of a chat, a list of ``{"role": ..., "content": ...}``; the last turn is the completion.
        hub_revision: branch of the hub's data set. Set if the main branch has a loading script, which `datasets` no
            longer runs: the hub's own conversion to parquet.
        few_shot_fraction: share of the training set that Partial-LoRA derives ratios from; None: some shots per class.
        description, source: a short description and the paper, for display.
        example: an invented row in the hub's format, for display.
        path, on_bad_row, streaming: see `TaskConfig`; `resolve_task` sets them.
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
    few_shot_fraction: float | None = None
    description: str = ""
    source: str = ""
    example: Row | None = None
    path: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    streaming: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of prediction: a label, a score, a span of a text, or a text."""
        if self.labels is not None:
            return "classification"
        return "regression" if self.score is not None else "extractive" if self.extractive else "generation"

    @cached_property
    def input_columns(self) -> tuple[str, ...]:
        """Columns of the prompt and of `texts`."""
        return tuple(dict.fromkeys((*template_columns(self.prompt or ""), *self.texts)))

    @cached_property
    def completion_columns(self) -> tuple[str, ...]:
        """Columns of the completion's template."""
        return tuple(template_columns(self.completion or ""))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Required columns of a flat row, in the templates' order."""
        label = (self.label_column,) if self.kind in ("classification", "regression") else ()
        further = tuple(column for column in (self.messages, self.group_by) if column)
        return tuple(dict.fromkeys((*self.input_columns, *self.completion_columns, *label, *further)))

    @property
    def outputs(self) -> int | None:
        """Number of a head's outputs: one per label, 1 for a score, 2 (start and end) for a span; None without head."""
        if self.labels is not None:
            return len(self.labels)
        return 2 if self.extractive else 1 if self.score is not None else None
