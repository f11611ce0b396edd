"""The list of tasks, and one task in detail, as text. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.reading import SPLITS, has_split, read_split
from sparse_llm_ft.data.rows import Example, examples_of
from sparse_llm_ft.data.task_config import METRICS_BY_KIND, find_task, resolve_task
from sparse_llm_ft.data.tasks import TASKS, Task
from sparse_llm_ft.errors import ConfigError, one_line

_LONGEST = 1200


def list_tasks() -> str:
    """A line for each task: name, metrics, the hub's data set, description."""
    rows = [(task.name, ", ".join(task.metrics), _hub(task), task.description) for _, task in sorted(TASKS.items())]
    rows = [("task", "metrics", "data set", "what it is"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    )


def show_task(name: str, path: str | None = None) -> str:
    """One task in detail, with an example.

    Args:
        path: folder with the example's data (its first split); None: the example is an invented row.

    Raises:
        UserError: an unknown name, or data that cannot be used.
    """
    task = find_task(name, "TASK")
    lines = [f"{key + ':':<14}{value}" for key, value in _facts(task)]
    example, where = _example(task, path)
    if example is not None:
        lines += ["", f"example from {where}", *(f"{key + ':':<14}{value}" for key, value in _parts(example))]
    return "\n".join(lines)


def _facts(task: Task) -> Iterator[tuple[str, str]]:
    yield task.name, task.description
    if task.source:
        yield "paper", task.source
    if task.hub_id is None:
        yield "settings", "path, and one of: prompt and completion; messages; labels and texts; score and texts"
        yield "metrics", "; ".join(f"{kind}: {', '.join(metrics)}" for kind, metrics in METRICS_BY_KIND.items())
        return
    yield "data set", _hub(task)
    yield "splits", _splits(task.splits)
    for further, splits in task.further_splits.items():
        yield further, _splits(splits)
    made = set(task.columns) - set(task.example or ())
    yield "columns", ", ".join(dict.fromkeys((*task.nested, *(name for name in task.columns if name not in made))))
    if task.references:
        yield "references", ", ".join(task.references) + " (where a row has them)"
    if task.group_by:
        yield "grouped by", f"{task.group_by}: its rows are one sample with all their references, but in train"
    if task.labels is not None:
        yield "labels", ", ".join(f"{number} {word}" for number, word in enumerate(task.labels))
    if task.score is not None:
        yield "score", f"{task.score[0]:g} to {task.score[1]:g}"
    if task.texts:
        yield "texts", ", ".join(task.texts)
    yield "prompt", repr(task.prompt)
    yield "completion", repr(task.completion)
    yield "metrics", ", ".join(task.metrics)


def _example(task: Task, path: str | None) -> tuple[Example | None, str]:
    """An example, and its source."""
    if path is None:
        if task.example is None:
            return None, ""
        (_, example), *_ = examples_of(task, task.example, "example", 1)
        return example, "an invented row"
    if not Path(path).is_dir():
        raise ConfigError("--path", f"{path!r} is not a folder", "expected a folder with train.jsonl")
    task = resolve_task(TaskConfig(name=task.name, path=path))
    split = next((split for split in SPLITS if has_split(task, split)), "train")
    (example,) = read_split(task, split, limit=1)
    return example, f"{example.source}, line {example.line}"


def _parts(example: Example) -> Iterator[tuple[str, str]]:
    yield "prompt", _short(example.prompt)
    yield "completion", repr(example.completion[:_LONGEST])
    yield "references", " | ".join(map(_short, example.references)) or "none: there is no answer"
    if example.texts:
        yield "texts", " | ".join(map(_short, example.texts))
    if example.label is not None:
        yield "label", f"{example.label:g}"
    if example.answers is not None:
        yield "answers", ", ".join(f"{text} at character {start}" for text, start in example.answers) or "none"


def _splits(splits: Mapping[str, str]) -> str:
    return ", ".join(ours if ours == theirs else f"{ours} (the hub's {theirs})" for ours, theirs in splits.items())


def _short(text: str) -> str:
    """The text with control characters made visible; a long one is truncated in the middle."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 300]} [...] {text[-300:]}"
    return ("\n" + " " * 14).join(one_line(line).rstrip() for line in text.splitlines())


def _hub(task: Task) -> str:
    return " ".join(part for part in (task.hub_id or "-", task.hub_config) if part)
