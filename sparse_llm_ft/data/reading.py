"""Rows of a split -> examples, from a local folder or the hub. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.tasks import TASKS, Task, render, template_columns
from sparse_llm_ft.documents import DocumentError, parse_json
from sparse_llm_ft.errors import ConfigError, DataError, UserError


@dataclass(frozen=True)
class Example:
    """One row: what the model sees, what it must write, every text that counts as right, and where it stands.

    Attributes:
        prompt, completion: what a causal language model sees and writes.
        label: in a classification, the number of the right label.
        texts: in a classification, what an encoder sees: one text or a pair.
    """

    prompt: str
    completion: str
    references: tuple[str, ...]
    source: str = "example"
    line: int = 0
    label: int | None = None
    texts: tuple[str, ...] = ()


def check_task(config: TaskConfig) -> Task:
    """The registry's task with the config's settings in place.

    Raises:
        ConfigError: an unknown task, a setting missing or at odds with another, or no place to read from.
    """
    entry = TASKS.get(config.name)
    if entry is None:
        near = difflib.get_close_matches(config.name, TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError("task.name", f"{config.name!r} is unknown", f"{hint}known: {', '.join(sorted(TASKS))}")
    given = {
        key: getattr(config, key)
        for key in ("prompt", "completion", "labels", "texts", "label_column", "metric")
        if getattr(config, key)
    }
    task = replace(entry, **given)
    task = _check_generation(task, config) if task.labels is None else _check_classification(task, task.labels)
    for setting, template in (("task.prompt", task.prompt), ("task.completion", task.completion)):
        if template and not template_columns(template):
            raise ConfigError(setting, f"{template!r} has no {{column}} field", "expected one at least")
    if config.path is None and task.hub_id is None:
        raise ConfigError(
            "task.path",
            f"not given, and task {task.name} has no data set on the hub",
            "expected a folder with train.jsonl",
        )
    return task


def _check_generation(task: Task, config: TaskConfig) -> Task:
    for key in ("texts", "label_column", "metric"):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"task.{key}", f"{getattr(config, key)!r} is for classification", "expected task.labels beside it"
            )
    for setting, template in (("task.prompt", task.prompt), ("task.completion", task.completion)):
        if not template:
            raise ConfigError(
                setting, f"not given, and task {task.name} has none", "expected a template such as '{text}'"
            )
    return task


def _check_classification(task: Task, labels: tuple[str, ...]) -> Task:
    """The task with its completion and texts filled in: the label word, and what the prompt shows."""
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise ConfigError("task.labels", f"{list(labels)} has an empty or a repeated word", "expected distinct words")
    shown = template_columns(task.prompt or "")
    if task.label_column in (*shown, *task.texts):
        raise ConfigError(
            "task.label_column",
            f"{task.label_column!r} is in task.prompt or task.texts",
            "expected a column that the model does not see",
        )
    completion = task.completion or f" {{{task.label_column}}}"
    if template_columns(completion) != [task.label_column]:
        raise ConfigError(
            "task.completion",
            f"{completion!r} is not the label alone",
            f"expected '{{{task.label_column}}}' as its only column, or no task.labels",
        )
    if not task.texts and not shown:
        raise ConfigError("task.texts", "not given, nor is task.prompt", "expected one column or two")
    texts = task.texts or (tuple(shown) if len(shown) <= 2 else ())  # more than a pair no encoder takes
    return replace(task, completion=completion, texts=texts)


def read_split(config: TaskConfig, split: str) -> list[Example]:
    """All examples of ``train``, ``validation`` or ``test``.

    Raises:
        UserError: no such split, an empty one, or (DataError) a row that cannot be used, with file and line.
    """
    task = check_task(config)
    if config.path is not None:
        path = Path(config.path) / f"{split}.jsonl"
        if not path.is_file():
            raise ConfigError(
                "task.path",
                f"{config.path!r} has no {split}.jsonl",
                f"found: {', '.join(sorted(p.name for p in Path(config.path).iterdir())) or 'nothing'}",
            )
        source, rows = str(path), _json_lines(path)
    else:
        name = "/".join(part for part in (task.hub_id, task.hub_config) if part)
        source, rows = f"{name}[{task.splits[split]}]", enumerate(_hub_rows(task, split), 1)
    examples = [_example(task, row, source, line) for line, row in rows]
    if not examples:
        raise UserError(f"{source}: no rows")
    return examples


def has_split(config: TaskConfig, split: str) -> bool:
    """Whether `read_split` would find a file. A hub data set is taken to have all three splits."""
    return config.path is None or (Path(config.path) / f"{split}.jsonl").is_file()


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(path, line, f"not UTF-8 ({error.reason} at byte {error.start})") from None
            if not text.strip():
                continue
            try:
                row = parse_json(text, constants=True)  # a column that is not used may hold NaN, as pandas writes it
            except DocumentError as error:
                raise DataError(path, line, f"not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(path, line, f"a JSON object is needed, not {type(row).__name__}")
            yield line, row


def _hub_rows(task: Task, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets  # slow to import, and only needed without a local folder

    try:
        return datasets.load_dataset(task.hub_id, task.hub_config, split=task.splits[split])
    except Exception as error:  # the library raises a dozen types for "not there" and "no network"
        raise UserError(
            f"task.name: {task.hub_id} cannot be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "give task.path for a local folder"
        ) from error


def _example(task: Task, row: Mapping[str, Any], source: str, line: int) -> Example:
    assert task.completion, "check_task made sure"
    label = None
    if task.labels is not None:
        label = _label(task.labels, _column(row, task.label_column, source, line), source, line)
        row = {**row, task.label_column: task.labels[label]}
    prompt_columns = template_columns(task.prompt or "")
    for column in dict.fromkeys((*prompt_columns, *template_columns(task.completion), *task.texts)):
        _check_text(_column(row, column, source, line), column, source, line)
    completion = render(task.completion, row)
    if not completion.strip():
        raise DataError(source, line, "the completion is empty")
    others = [row[column] for column in task.references if isinstance(row.get(column), str)]
    references = (completion.strip(), *(other.strip() for other in others))
    texts = tuple(row[column] for column in task.texts)
    prompt = render(task.prompt, row) if task.prompt else "\n".join(texts)
    return Example(prompt, completion, references, source, line, label, texts)


def _column(row: Mapping[str, Any], column: str, source: str, line: int) -> Any:
    if column not in row:
        raise DataError(source, line, f"no column {column!r}; found {', '.join(map(str, row))[:200] or 'none'}")
    return row[column]


def _check_text(value: Any, column: str, source: str, line: int) -> None:
    if not isinstance(value, str):
        raise DataError(source, line, f"column {column!r} is {type(value).__name__}, text is needed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(source, line, f"column {column!r} holds half of a surrogate pair, which is no text")


def _label(labels: Sequence[str], value: Any, source: str, line: int) -> int:
    """The number of a row's label, which is that number or the label word."""
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    reason = "the row has no label, as in GLUE's test splits" if value == -1 else f"task.labels is {', '.join(labels)}"
    raise DataError(source, line, f"label {value!r:.60} is not 0 to {len(labels) - 1} ({reason})")
