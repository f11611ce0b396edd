"""Rows of a split -> prompts, completions and references, from a local folder or the hub. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.tasks import TASKS, Task, render, template_columns
from sparse_llm_ft.errors import ConfigError, DataError, UserError


@dataclass(frozen=True)
class Example:
    """One row: what the model sees, what it must write, every text that counts as right, and where it stands."""

    prompt: str
    completion: str
    references: tuple[str, ...]
    source: str = "example"
    line: int = 0


def check_task(config: TaskConfig) -> Task:
    """The registry's task with the config's templates in place.

    Raises:
        ConfigError: an unknown task, a template missing, or no place to read from.
    """
    task = TASKS.get(config.name)
    if task is None:
        near = difflib.get_close_matches(config.name, TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError("task.name", f"{config.name!r} is unknown", f"{hint}known: {', '.join(sorted(TASKS))}")
    prompt, completion = config.prompt or task.prompt, config.completion or task.completion
    for setting, template in (("task.prompt", prompt), ("task.completion", completion)):
        if not template:
            raise ConfigError(
                setting, f"not given, and task {task.name} has none", "expected a template such as '{text}'"
            )
        if not template_columns(template):
            raise ConfigError(setting, f"{template!r} has no {{column}} field", "expected one at least")
    if config.path is None and task.hub_id is None:
        raise ConfigError(
            "task.path",
            f"not given, and task {task.name} has no data set on the hub",
            "expected a folder with train.jsonl",
        )
    return Task(task.name, task.hub_id, prompt, completion, task.references, task.splits)


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
        source, rows = f"{task.hub_id}[{task.splits[split]}]", enumerate(_hub_rows(task, split), 1)
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
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(path, line, f"not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise DataError(path, line, f"a JSON object is needed, not {type(row).__name__}")
            yield line, row


def _hub_rows(task: Task, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets  # slow to import, and only needed without a local folder

    try:
        return datasets.load_dataset(task.hub_id, split=task.splits[split])
    except Exception as error:  # the library raises a dozen types for "not there" and "no network"
        raise UserError(
            f"task.name: {task.hub_id} cannot be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "give task.path for a local folder"
        ) from error


def _example(task: Task, row: Mapping[str, Any], source: str, line: int) -> Example:
    assert task.prompt and task.completion, "check_task made sure"
    for column in (*template_columns(task.prompt), *template_columns(task.completion)):
        if column not in row:
            raise DataError(source, line, f"no column {column!r}; found {', '.join(row) or 'none'}")
        if not isinstance(row[column], str):
            raise DataError(source, line, f"column {column!r} is {type(row[column]).__name__}, text is needed")
        if any("\ud800" <= character <= "\udfff" for character in row[column]):
            raise DataError(source, line, f"column {column!r} holds half of a surrogate pair, which is no text")
    completion = render(task.completion, row)
    if not completion.strip():
        raise DataError(source, line, "the completion is empty")
    others = [row[column] for column in task.references if isinstance(row.get(column), str)]
    references = (completion.strip(), *(other.strip() for other in others))
    return Example(render(task.prompt, row), completion, references, source, line)
