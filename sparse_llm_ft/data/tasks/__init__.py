"""The task registry: a new task is one file here and one line below."""

from sparse_llm_ft.data.tasks import cnn_dailymail, custom, dart, dialogsum, e2e_nlg, glue, samsum, squad, xsum
from sparse_llm_ft.data.tasks.task import (
    BadRow,
    Kind,
    Metric,
    MissingColumn,
    Row,
    Task,
    render,
    require,
    template_columns,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        cnn_dailymail.TASK,
        custom.TASK,
        dart.TASK,
        dialogsum.TASK,
        e2e_nlg.TASK,
        *glue.TASKS,
        samsum.TASK,
        *squad.TASKS,
        xsum.TASK,
    )
}

__all__ = [
    "TASKS",
    "BadRow",
    "Kind",
    "Metric",
    "MissingColumn",
    "Row",
    "Task",
    "render",
    "require",
    "template_columns",
]
