"""What a task is: where its data lies and how a row becomes a prompt and a completion, or texts and a label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_FIELD = re.compile(r"\{(\w+)\}")

Metric = Literal["accuracy", "matthews"]


@dataclass(frozen=True)
class Task:
    """One entry of the registry.

    Attributes:
        name: as in ``task.name``.
        hub_id: data set on the Hugging Face hub; None where only a local folder will do.
        prompt, completion: templates whose ``{column}`` fields are the row's columns. None: the user gives them.
            In a classification the completion's only field is the label column, which stands for the label word.
        references: further columns that hold alternative completions, used in evaluation where a row has them.
        splits: our split -> the hub's.
        hub_config: configuration of the hub's data set, where it has several.
        labels: label words in the order of the integer labels; None where the task is no classification.
        texts: the columns an encoder sees, one or a pair.
        label_column: holds the integer label, or the label word itself.
        metric: what a classification is judged by; accuracy is measured in any case.
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
    texts: tuple[str, ...] = ()
    label_column: str = "label"
    metric: Metric | None = None

    @property
    def classes(self) -> int | None:
        """Number of labels; None where the task is no classification."""
        return None if self.labels is None else len(self.labels)


def template_columns(template: str) -> list[str]:
    """The columns a template needs, in order."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def render(template: str, row: Mapping[str, str]) -> str:
    """Fill a template. Only whole ``{column}`` fields are replaced; texts may hold braces of their own."""
    return _FIELD.sub(lambda match: row[match[1]], template)
