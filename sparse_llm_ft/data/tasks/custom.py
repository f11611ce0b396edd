"""The user's own data: a local folder, with `task.prompt` and `task.completion`, or `task.labels` and `task.texts`."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(name="custom", hub_id=None, prompt=None, completion=None)
