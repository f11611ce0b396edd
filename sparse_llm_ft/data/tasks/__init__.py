"""The task registry. To add a task, write one file here and enter its name in `_FILES`."""

from collections.abc import Iterator
from importlib import import_module

from sparse_llm_ft.data.tasks.task import Kind, Metric, Task
from sparse_llm_ft.data.tasks.template import (
    BadRow,
    MissingColumn,
    Row,
    escaped_columns,
    has_field,
    listed,
    odd_fields,
    render,
    require,
    template_columns,
    with_fields,
)

_FILES = (
    "cnn_dailymail",
    "custom",
    "dart",
    "dialogsum",
    "e2e_nlg",
    "glue",
    "samsum",
    "squad",
    "xsum",
)


def _tasks() -> Iterator[Task]:
    """Each file's ``TASK``, or all of its ``TASKS``."""
    for name in _FILES:
        module = import_module(f"{__name__}.{name}")
        yield from getattr(module, "TASKS", None) or (module.TASK,)


TASKS: dict[str, Task] = {task.name: task for task in _tasks()}

__all__ = [
    "TASKS",
    "BadRow",
    "Kind",
    "Metric",
    "MissingColumn",
    "Row",
    "Task",
    "escaped_columns",
    "has_field",
    "listed",
    "odd_fields",
    "render",
    "require",
    "template_columns",
    "with_fields",
]
