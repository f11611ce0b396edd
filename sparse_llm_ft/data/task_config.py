"""Applies the ``task`` settings to the registry's task and rejects contradictions. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.config.schema import Metric
from sparse_llm_ft.data.tasks import TASKS, Kind, Task, template_columns
from sparse_llm_ft.errors import ConfigError

METRICS_BY_KIND: dict[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "extractive": ("squad",),
    "generation": ("rouge", "bleu", "squad"),
}
"""The metrics that each kind of task allows."""

_DEFAULT: dict[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "extractive": ("squad",),
    "generation": ("rouge",),
}
_SETTINGS = ("prompt", "completion", "messages", "labels", "score", "texts", "label_column", "references")


def find_task(name: str, setting: str = "task.name") -> Task:
    """The registry's task of this name.

    Raises:
        ConfigError: the name is unknown; the message suggests the nearest one (for ``sst2``, ``glue/sst2``).
    """
    entry = TASKS.get(name)
    if entry is None:
        family = [known for known in TASKS if known.endswith(f"/{name}")]
        near = family or difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(setting, f"{name!r} is unknown", f"{hint}known: {', '.join(sorted(TASKS))}")
    return entry


def resolve_task(config: TaskConfig) -> Task:
    """The registry's task with the config's settings applied.

    Raises:
        ConfigError: the task is unknown, a setting is missing or contradicts another, or there is no data source.
    """
    # The registry's entry, overridden by the user's settings.
    entry = find_task(config.name)
    given: dict[str, Any] = {key: getattr(config, key) for key in _SETTINGS if getattr(config, key) is not None}
    task = replace(entry, **given, path=config.path, on_bad_row=config.on_bad_row, streaming=config.streaming)

    # Contradictions, by kind of task; a task with labels gets its completion and texts.
    if task.labels is not None and task.score is not None:
        raise ConfigError("task.score", f"{list(task.score)} beside labels {list(task.labels)}", "expected one of them")
    task = _check_messages(task) if task.messages else task
    if task.kind in ("classification", "regression"):
        task = _check_labelled(task, config)
    else:
        _check_text(task, config)

    # Templates, the data's place and the metrics.
    for setting, template in (("task.prompt", task.prompt), ("task.completion", task.completion)):
        if template and not template_columns(template):
            raise ConfigError(setting, f"{template!r} has no {{column}} field", "expected one at least")
    if config.path is None and task.hub_id is None:
        raise ConfigError(
            "task.path",
            f"not given, and task {task.name} has no hub data set",
            "expected a folder with train.jsonl",
        )
    if config.metrics is None and task.kind == entry.kind:
        return task
    return replace(task, metrics=_check_metrics(task, config.metrics or _DEFAULT[task.kind]))


def _check_metrics(task: Task, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    for metric in metrics:
        if metric not in METRICS_BY_KIND[task.kind]:
            raise ConfigError(
                "task.metrics",
                f"{metric!r} does not measure a task of kind {task.kind}",
                f"expected one of {', '.join(METRICS_BY_KIND[task.kind])}",
            )
    if len(set(metrics)) < len(metrics):
        raise ConfigError("task.metrics", f"{list(metrics)} names a metric twice", "expected each once")
    return metrics


def _check_messages(task: Task) -> Task:
    """A chat takes the place of templates, labels and texts, so none of them may be set."""
    for key in ("prompt", "completion", "labels", "score", "texts"):
        if getattr(task, key):
            raise ConfigError(
                "task.messages", f"{task.messages!r} beside {key} {getattr(task, key)!r}", "expected one of them"
            )
    return task


def _check_text(task: Task, config: TaskConfig) -> None:
    """Reject label settings in a text task, and references in an extractive one."""
    unused = ("label_column", "references") if task.extractive else ("texts", "label_column")
    for key in unused:
        if getattr(config, key) is not None:
            where = "generation" if key == "references" else "classification or regression"
            raise ConfigError(
                f"task.{key}",
                f"{getattr(config, key)!r} is for {where}",
                f"expected none in task {task.name}" if task.extractive else "expected task.labels or task.score too",
            )
    if task.extractive and len(task.texts) != 2:
        raise ConfigError("task.texts", f"{list(task.texts)}", "expected the columns of question and context")
    if task.messages:
        return
    for setting, template in (("task.prompt", task.prompt), ("task.completion", task.completion)):
        if not template:
            raise ConfigError(
                setting, f"not given, and task {task.name} has none", "expected a template such as '{text}'"
            )


def _check_labelled(task: Task, config: TaskConfig) -> Task:
    """The task with defaults: the completion is the label, the texts are the prompt's columns."""
    setting = "task.labels" if task.labels is not None else "task.score"
    labels = task.labels or ()
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise ConfigError("task.labels", f"{list(labels)} has an empty or a repeated word", "expected distinct words")
    if task.score is not None and not task.score[0] < task.score[1]:
        raise ConfigError(
            "task.score", f"{list(task.score)} is not a range", "expected the lowest score and the highest"
        )
    if task.score is not None and task.score[1] - task.score[0] < 1 and task.prompt is not None:
        raise ConfigError(
            "task.score",
            f"{list(task.score)} is narrow, and a model that writes a score writes one decimal",
            "expected a range of 1 or more, with scores that are scaled to it; or no task.prompt, for an encoder",
        )
    if config.references is not None:
        raise ConfigError("task.references", f"{list(config.references)} is for generation", f"expected no {setting}")
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
            f"expected '{{{task.label_column}}}' as its only column, or no {setting}",
        )
    if not task.texts and not shown:
        raise ConfigError("task.texts", "neither it nor task.prompt is given", "expected one column or two")
    texts = task.texts or (tuple(shown) if len(shown) <= 2 else ())  # an encoder takes at most a pair
    return replace(task, completion=completion, texts=texts)
