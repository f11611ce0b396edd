"""What a task is: where its data lies and how a row becomes a prompt and a completion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Task:
    """One entry of the registry.

    Attributes:
        name: as in ``task.name``.
        hub_id: data set on the Hugging Face hub; None where only a local folder will do.
        prompt, completion: templates whose ``{column}`` fields are the row's columns. None: the user gives them.
        references: further columns that hold alternative completions, used in evaluation where a row has them.
        splits: our split -> the hub's.
    """

    name: str
    hub_id: str | None
    prompt: str | None
    completion: str | None
    references: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )


def template_columns(template: str) -> list[str]:
    """The columns a template needs, in order."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def render(template: str, row: Mapping[str, str]) -> str:
    """Fill a template. Only whole ``{column}`` fields are replaced; texts may hold braces of their own."""
    return _FIELD.sub(lambda match: row[match[1]], template)
