"""Row -> examples. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sparse_llm_ft.data.tasks import BadRow, Row, Task, has_field, listed, render, require, with_fields
from sparse_llm_ft.data.tasks.squad import answers as span_answers

_NO_TEXT = re.compile("[\ud800-\udfff\0]")
_NUMBER = re.compile(r"\s*[+-]?\d{1,9}(\.\d{1,9})?\s*")
_ROLES = ("system", "user", "assistant")
_BESIDE = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "audio", "audios", "video", "videos"),
)
"""What a turn may say beside its content; to read the content alone would teach a model to leave it out."""
_OFFERED = ("tools", "functions", "images", "audios", "videos")
"""Columns beside a chat that its template would show; without them a model learns to answer as if it had seen none."""


@dataclass(frozen=True)
class Example:
    """One sample as text: inputs, target, references and its place in the data.

    Attributes:
        prompt, completion: input and target of a causal language model.
        references: every correct text, stripped, the completion first; () if the context has no answer.
        source, line: the row's file (or hub data set and split) and line; the row's number in parquet, arrow and hub
            data. Both count from 1.
        label: the right label's index in a classification, the score in a regression.
        texts: an encoder's input: one text or a pair; question and context in an extractive task.
        messages: a chat's turns except the last, each with ``role`` and ``content``.
        answers: in an extractive task, each answer and its first character in ``texts[1]``; () if the context has none.
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
    """Yield one row's examples, each with the value of `task.group_by` (empty if the task does not group).

    Args:
        task: from `resolve_task`.

    Raises:
        BadRow: the row cannot be used (`MissingColumn` if it lacks a column).
    """
    require(row, task.nested)
    for flat in task.flatten(row) if task.flatten else (row,):
        fields = (*task.input_columns, *task.completion_columns)
        flat = with_fields(flat, task.columns)
        require(flat, task.columns, fields)
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
        row = {**row, task.label_column: f"{label:.1f}".replace("-0.0", "0.0")}
    row = dict(row) | {
        column: text_of(row, column) for column in (*task.input_columns, *task.completion_columns)
    }  # null is an empty text
    _check_filled(row, task)
    completion = render(task.completion, row)
    if not any(row[column].strip() for column in task.completion_columns) or not completion.strip():
        raise BadRow(f"the completion is empty (column {', '.join(task.completion_columns)})")
    texts = tuple(row[column] for column in task.texts)
    answers = _answers(row, task.texts[1]) if task.extractive else None
    others = [text for text, _ in answers or ()] if task.extractive else _others(task, row)
    prompt = render(task.prompt, row) if task.prompt else "\n".join(texts)
    # Without an answer in the context no text is right; the metric decides what a generating model should have written.
    references = () if answers == () else _distinct((completion, *others))
    return Example(prompt, completion, references, source, line, label=label, texts=texts, answers=answers)


def _chat(task: Task, row: Row, source: str, line: int) -> Example:
    """The last turn is the completion. A model without chat template sees the other turns as plain text."""
    assert task.messages
    offered = next((key for key in _OFFERED if key != task.messages and _is_filled(row.get(key))), None)
    if offered:
        raise BadRow(f"column {offered!r} belongs to the chat, and is not given to its template; expected none")
    turns = _turns(row[task.messages], task.messages)
    *seen, last = turns
    prompt = "".join(f"{turn['role']}:\n{turn['content']}\n\n" for turn in seen) + f"{last['role']}:\n"
    references = _distinct((last["content"], *_others(task, row)))
    return Example(prompt, last["content"], references, source, line, messages=tuple(seen))


def _is_filled(value: Any) -> bool:
    """Whether a column holds anything. Many data sets keep lists as JSON."""
    return value.strip() not in ("", "[]", "{}", "null") if isinstance(value, str) else bool(value)


def _turns(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or len(value) < 2:
        raise BadRow(f"column {column!r} is not a list of two or more turns, each {{role, content}}")
    turns: list[dict[str, str]] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            found = listed(turn, 5) if isinstance(turn, Mapping) else type(turn).__name__
            raise BadRow(f"turn {number} of column {column!r} has {found or 'nothing'}; needed role, content")
        if turn["role"] not in _ROLES:
            raise BadRow(f"turn {number} of column {column!r}: role {turn['role']!r:.60} is not {', '.join(_ROLES)}")
        beside = next((key for key in _BESIDE if turn.get(key)), None)
        if beside:
            raise BadRow(
                f"turn {number} of column {column!r} has {beside}, and only content is read; expected text alone"
            )
        content = text_of(turn, "content")
        if not content.strip():
            raise BadRow(f"turn {number} of column {column!r} is empty")
        turns.append({"role": turn["role"], "content": content})
    if value[-1].get("weight") == 0:
        raise BadRow(f"the last turn of column {column!r} has weight 0, and only the last turn is learned")
    if turns[-1]["role"] != "assistant":
        raise BadRow(f"the last turn of column {column!r} is the {turns[-1]['role']}'s, not the assistant's")
    if all(turn["role"] != "user" for turn in turns):
        raise BadRow(f"column {column!r} has no turn of the user")
    return turns


def _check_filled(row: Row, task: Task) -> None:
    """Every text of an encoder must be filled. A prompt needs one filled column: some columns are optional."""
    empty = [column for column in task.texts if not row[column].strip()]
    if not empty and task.input_columns and not any(row[column].strip() for column in task.input_columns):
        empty = list(task.input_columns)
    if empty:
        raise BadRow(f"column {', '.join(map(repr, empty))} is empty")


def text_of(row: Row, column: str) -> str:
    """A column's text; null becomes an empty one.

    Raises:
        BadRow: the value is not text, or has characters that no tokenizer accepts.
    """
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} is {type(value).__name__}, not text")
    wrong = _NO_TEXT.search(value)
    if wrong:
        what = "a NUL character" if wrong[0] == "\0" else "half of a surrogate pair"
        raise BadRow(f"column {column!r} holds {what}, which is no text")
    return value


def _others(task: Task, row: Row) -> list[str]:
    """The row's references other than its completion."""
    return [text_of(with_fields(row, (column,)), column) for column in task.references if has_field(row, column)]


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _label(labels: Sequence[str], value: Any) -> int:
    """The label's index. The row gives the label word or the index, as a number or as text. If label words are
    numbers (grades from 1 to 5, or 1.0 to 5.0), a number means the word, and never an index: 0 is none of these grades.
    """
    grades = {Decimal(word.strip()): index for index, word in enumerate(labels) if _NUMBER.fullmatch(word)}
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    number = _number(value)
    if number is not None:
        if number in grades:
            return grades[number]
        whole = isinstance(value, int) or (isinstance(value, str) and "." not in value)
        if not grades and whole and 0 <= number < len(labels):
            return int(number)
    if grades:
        raise BadRow(f"label {value!r:.60} is not one of task.labels, {', '.join(labels)}")
    reason = f"task.labels is {', '.join(labels)}"
    if value == -1:
        reason = "the row has no label, as in GLUE's test splits"
    raise BadRow(f"label {value!r:.60} is not 0 to {len(labels) - 1} ({reason})")


def _number(value: Any) -> Decimal | None:
    """The number that a value is, or that a text writes."""
    if isinstance(value, str):
        return Decimal(value.strip()) if _NUMBER.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Decimal(str(value))


def _score(bounds: tuple[float, float], value: Any) -> float:
    """The row's score, given as a number or as text."""
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
    """The row's answers, checked against the context."""
    context = row[column]
    for text, start in (found := span_answers(row)):
        if start < 0 or not context.startswith(text, start):
            raise BadRow(f"answer {text!r:.60} is not at character {start} of column {column!r}")
    return found
