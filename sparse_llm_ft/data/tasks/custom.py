"""The user's own data: a local folder, with templates given as `task.prompt` and `task.completion`."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(name="custom", hub_id=None, prompt=None, completion=None)
