"""The task registry: a new task is one file here and one line below."""

from sparse_llm_ft.data.tasks import cola, custom, dialogsum, rte, sst2
from sparse_llm_ft.data.tasks.task import Metric, Task, render, template_columns

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        cola.TASK,
        custom.TASK,
        dialogsum.TASK,
        rte.TASK,
        sst2.TASK,
    )
}

__all__ = ["TASKS", "Metric", "Task", "render", "template_columns"]
