"""The task registry: a new task is one file here and one line below."""

from sparse_llm_ft.data.tasks import custom, dialogsum
from sparse_llm_ft.data.tasks.task import Task, render, template_columns

TASKS: dict[str, Task] = {task.name: task for task in (custom.TASK, dialogsum.TASK)}

__all__ = ["TASKS", "Task", "render", "template_columns"]
