"""A row -> examples. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_llm_ft.data.tasks import BadRow, Row, Task, render, require
from sparse_llm_ft.data.tasks.squad import answers as span_answers

_NO_TEXT = re.compile("[\ud800-\udfff\0]")
_NUMBER = re.compile(r"\s*[+-]?\d{1,9}\s*")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One sample: what the model sees, what it must write, every text that counts as right, and where it stands.

    Attributes:
        prompt, completion: what a causal language model sees and writes.
        references: every text that counts as right, the completion's first; without spaces around them. None where a
            context has no answer.
        source, line: file (or hub data set and split) and line of its row; for parquet, arrow and the hub the row's
            number. Both count from 1.
        label: in a classification the number of the right label, in a regression the score.
        texts: what an encoder sees: one text or a pair; of an extractive task question and context.
        messages: of a chat, all turns but the last, each with ``role`` and ``content``.
        answers: of an extractive task, each answer and the character of ``texts[1]`` that it starts at; () where the
            context has none.
    """

    prompt: str
    completion: str
    references: tuple[str, ...]
    source: str = "example"
    line: int = 0
    label: int | float | None = None
    texts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] | None = None
    answers: tuple[tuple[str, int], ...] | None = None


def examples_of(task: Task, row: Row, source: str, line: int) -> Iterator[tuple[str, Example]]:
    """The examples of one row, each with the value of `task.group_by` (empty where the task has none).

    Args:
        task: as `resolve_task` returned it.

    Raises:
        BadRow: the row cannot be used (`MissingColumn` where it lacks a column).
    """
    require(row, task.nested)
    for flat in task.flatten(row) if task.flatten else (row,):
        require(flat, task.columns)
        example = _chat(task, flat, source, line) if task.messages else _templates(task, flat, source, line)
        yield text_of(flat, task.group_by) if task.group_by else "", example


def _templates(task: Task, row: Row, source: str, line: int) -> Example:
    assert task.completion, "resolve_task made sure"
    label: int | float | None = None
    if task.labels is not None:
        label = _label(task.labels, row[task.label_column])
        row = {**row, task.label_column: task.labels[label]}
    elif task.score is not None:
        label = _score(task.score, row[task.label_column])
        row = {**row, task.label_column: f"{label:.1f}"}
    row = dict(row) | {column: text_of(row, column) for column in (*task.shown, *task.filled)}  # null is an empty text
    _check_filled(row, task)
    completion = render(task.completion, row)
    if not any(row[column].strip() for column in task.filled) or not completion.strip():
        raise BadRow(f"the completion is empty (column {', '.join(task.filled)})")
    texts = tuple(row[column] for column in task.texts)
    answers = _answers(row, task.texts[1]) if task.extractive else None
    others = [text for text, _ in answers or ()] if task.extractive else _others(task, row)
    prompt = render(task.prompt, row) if task.prompt else "\n".join(texts)
    # Where the context has no answer, none is right: what a model that writes says instead is for who measures it.
    references = () if answers == () else _distinct((completion, *others))
    return Example(prompt, completion, references, source, line, label=label, texts=texts, answers=answers)


def _chat(task: Task, row: Row, source: str, line: int) -> Example:
    """The last turn is the completion; a model without chat template sees the others one below the other."""
    assert task.messages
    turns = _turns(row[task.messages], task.messages)
    *seen, last = turns
    prompt = "".join(f"{turn['role']}:\n{turn['content']}\n\n" for turn in seen) + f"{last['role']}:\n"
    references = _distinct((last["content"], *_others(task, row)))
    return Example(prompt, last["content"], references, source, line, messages=tuple(seen))


def _turns(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or len(value) < 2:
        raise BadRow(f"column {column!r} is no list of two or more turns, each {{role, content}}")
    turns: list[dict[str, str]] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            found = ", ".join(map(str, turn))[:60] if isinstance(turn, Mapping) else type(turn).__name__
            raise BadRow(f"turn {number} of column {column!r} has {found or 'nothing'}; needed role, content")
        if turn["role"] not in _ROLES:
            raise BadRow(f"turn {number} of column {column!r}: role {turn['role']!r:.60} is not {', '.join(_ROLES)}")
        content = text_of(turn, "content")
        if not content.strip():
            raise BadRow(f"turn {number} of column {column!r} is empty")
        turns.append({"role": turn["role"], "content": content})
    if turns[-1]["role"] != "assistant":
        raise BadRow(f"the last turn of column {column!r} is the {turns[-1]['role']}'s, the assistant's is needed")
    if all(turn["role"] != "user" for turn in turns):
        raise BadRow(f"column {column!r} has no turn of the user")
    return turns


def _check_filled(row: Row, task: Task) -> None:
    """An encoder needs each of its texts, a prompt any: a column of some rows alone is nothing unusual there."""
    empty = [column for column in task.texts if not row[column].strip()]
    if not empty and task.shown and not any(row[column].strip() for column in task.shown):
        empty = list(task.shown)
    if empty:
        raise BadRow(f"column {', '.join(map(repr, empty))} is empty")


def text_of(row: Row, column: str) -> str:
    """A column's text; null is an empty one.

    Raises:
        BadRow: it holds something else, or what no tokenizer takes.
    """
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} is {type(value).__name__}, text is needed")
    wrong = _NO_TEXT.search(value)
    if wrong:
        what = "a NUL character" if wrong[0] == "\0" else "half of a surrogate pair"
        raise BadRow(f"column {column!r} holds {what}, which is no text")
    return value


def _others(task: Task, row: Row) -> list[str]:
    """The references that this row has beside its completion."""
    return [text_of(row, column) for column in task.references if column in row]


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _label(labels: Sequence[str], value: Any) -> int:
    """The number of a row's label, which is the label word, or that number, as text too. Where words are numbers
    (grades from 1 to 5), a number is the word, whether a file has it as text or not.
    """
    number = isinstance(value, int) and not isinstance(value, bool)
    word = str(value) if number else value
    if isinstance(word, str):
        if word in labels:
            return labels.index(word)
        if _NUMBER.fullmatch(word):
            value = int(word)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    reason = f"task.labels is {', '.join(labels)}"
    if value == -1:
        reason = "the row has no label, as in GLUE's test splits"
    raise BadRow(f"label {value!r:.60} is not 0 to {len(labels) - 1} ({reason})")


def _score(bounds: tuple[float, float], value: Any) -> float:
    """A row's score: a number, as text too, within the bounds."""
    number = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not bounds[0] <= number <= bounds[1]:
        raise BadRow(f"score {value!r:.60} is not a number from {bounds[0]:g} to {bounds[1]:g}")
    return number


def _answers(row: Row, column: str) -> tuple[tuple[str, int], ...]:
    """The row's answers, each of which really stands in the context."""
    context = row[column]
    for text, start in (found := span_answers(row)):
        if start < 0 or not context.startswith(text, start):
            raise BadRow(f"answer {text!r:.60} does not stand at character {start} of column {column!r}")
    return found
