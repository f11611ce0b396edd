"""Templates: text with ``{column}`` fields. Imports no torch.

A field names a column, ``{dialogue}``, or a value inside of one, ``{meta.dialogue}`` or ``{turns[0].text}``. Doubled
braces stand for single ones: ``{{dialogue}}`` is the text ``{dialogue}``. Braces around anything else are text, so that
JSON needs no escapes: ``{"text": "{dialogue}"}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

Row = Mapping[str, Any]


class BadRow(ValueError):
    """A row that cannot be used, and why. The reader, who knows file and line, raises it as a `DataError`."""


class MissingColumn(BadRow):
    """A row lacks a column that the task needs; probably all rows of the file do."""


class Part(NamedTuple):
    """A stretch of a template: text, a field's name, or a brace that was doubled."""

    text: str
    kind: Literal["text", "field", "brace"]


_KEY = r"""\[(?:-?\w+|'[^'\]{}]*'|"[^"\]{}]*")\]"""
_PATH = rf"\w+(?:\.\w+|{_KEY})*"
_FIELD = re.compile(rf"\{{[ \t]*({_PATH})[ \t]*\}}")
_ESCAPED = re.compile(rf"\{{\{{[ \t]*({_PATH})[ \t]*\}}\}}")
_KEYS = re.compile(rf"\.?(\w+)|{_KEY}")
_FORMATTED = re.compile(rf"\{{[ \t]*({_PATH})[ \t]*(?:![rsa])?(?::[^\s{{}}\"']*)?[ \t]*\}}")
_NAMES_SHOWN = 30


def template_columns(template: str) -> list[str]:
    """The template's fields, in order and without repetition."""
    return list(dict.fromkeys(part.text for part in _parts(template) if part.kind == "field"))


def escaped_columns(template: str) -> list[str]:
    """The names in doubled braces, which look like fields and are text, in order and without repetition."""
    found = (_ESCAPED.match(template, place) for place in sorted(_doubled(template)))
    return list(dict.fromkeys(match[1] for match in found if match))


def odd_fields(template: str, columns: Iterable[str]) -> list[str]:
    """What looks like a field of one of the columns but is text: ``{first name}``, ``{text!r}``, ``{text:>10}``."""
    text, known = "".join(part.text if part.kind == "text" else "\0" for part in _parts(template)), list(columns)
    named = [f"{{{column}}}" for column in known if f"{{{column}}}" in text]
    return named + [match[0] for match in _FORMATTED.finditer(text) if _keys(match[1])[0] in known]


def render(template: str, row: Mapping[str, str]) -> str:
    """Fill a template's fields.

    Args:
        row: the text of each field, by its name as in `template_columns`.
    """
    return "".join(row[part.text] if part.kind == "field" else part.text for part in _parts(template))


def with_fields(row: Row, names: Iterable[str]) -> Row:
    """The row with the values inside of its columns that `names` point to, each under that name.

    Raises:
        MissingColumn: there is no such column, or no such value in it.
        BadRow: a list in it is too short.
    """
    nested = {name: _value(row, name) for name in names if name not in row and len(_keys(name)) > 1}
    return {**row, **nested} if nested else row


def has_field(row: Row, name: str) -> bool:
    """Whether the row has a column of that name, or a value inside of one that the name points to."""
    try:
        return name in with_fields(row, (name,))
    except BadRow:
        return False


def require(row: Row, columns: Iterable[str], fields: Iterable[str] = ()) -> None:
    """Raise `MissingColumn` unless the row has all `columns`.

    Args:
        fields: those that a template names.
    """
    columns = tuple(columns)
    for column in columns:
        if column not in row:
            hint = f"; in a template {{{{{column}}}}} writes {{{column}}} as text" if column in fields else ""
            raise MissingColumn(f"no column {column!r}; found {listed(_paths(row))}; needed {', '.join(columns)}{hint}")


def listed(names: Iterable[str], most: int = _NAMES_SHOWN) -> str:
    """The names with commas between them; of very many, or of long ones, the first, and how many more there are."""
    every = [name if len(name) <= 60 else f"{name[:57]}..." for name in map(str, names)]
    rest = len(every) - most
    return (", ".join(every[:most]) + (f" and {rest} more" if rest > 0 else "")) or "none"


def _value(row: Row, name: str) -> Any:
    """The value that a name points to. Inside of null everything is null."""
    head, *keys = _keys(name)
    if head not in row:
        require(row, (name,), (name,))
    value: Any = row[head]
    for key in keys:
        if value is None:
            return None
        if isinstance(value, Mapping):
            if key not in value:
                raise MissingColumn(
                    f"no column {name!r}: {key!r} is not in column {head!r}; found {listed(_paths(row))}"
                )
            value = value[key]
        elif isinstance(value, Sequence) and not isinstance(value, str) and re.fullmatch(r"-?\d+", key):
            place = int(key)
            if not -len(value) <= place < len(value):
                raise BadRow(f"{name!r}: column {head!r} has a list of {len(value)} there")
            value = value[place]
        else:
            raise MissingColumn(
                f"no column {name!r}: column {head!r} has {type(value).__name__} where {key!r} is looked for; "
                f"found {listed(_paths(row))}"
            )
    return value


def _paths(row: Row) -> Iterator[str]:
    """The names that fields of a row can have, of nested mappings too."""
    for column, value in row.items():
        inner = [key for key in value if isinstance(key, str)] if isinstance(value, Mapping) else []
        yield from (f"{column}.{key}" for key in inner) if inner else (str(column),)


def _keys(name: str) -> list[str]:
    """``turns[0].text`` -> turns, 0, text; a name of another form is one key."""
    if not re.fullmatch(_PATH, name):
        return [name]
    return [match[1] or match[0].strip("[]").strip("'\"") for match in _KEYS.finditer(name)]


@lru_cache(maxsize=64)
def _parts(template: str) -> tuple[Part, ...]:
    """Texts, fields and doubled braces of a template."""
    doubled = _doubled(template)
    parts: list[Part] = []
    begin = place = 0
    while place < len(template):
        field = None if place in doubled else _FIELD.match(template, place)
        if not field and place not in doubled:
            place += 1
            continue
        parts.append(Part(template[begin:place], "text"))
        parts.append(Part(field[1], "field") if field else Part(template[place], "brace"))
        begin = place = field.end() if field else place + 2
    return tuple(part for part in (*parts, Part(template[begin:], "text")) if part.text)


def _doubled(template: str) -> set[int]:
    """The places of each ``{{`` and of its ``}}``. Braces nest: in ``{"a": {"b": "c"}}`` none is doubled."""
    found: set[int] = set()
    opened: list[int] = []  # places of doubled braces, and -1 for a single one
    place = 0
    while place < len(template):
        pair = template[place : place + 2]
        field = _FIELD.match(template, place)
        if field:
            place = field.end()
        elif pair == "{{":
            opened.append(place)
            place += 2
        elif pair == "}}" and opened and opened[-1] >= 0:
            found |= {opened.pop(), place}
            place += 2
        else:
            if pair[0] == "{":
                opened.append(-1)
            elif pair[0] == "}" and opened and opened[-1] < 0:
                opened.pop()
            place += 1
    return found
