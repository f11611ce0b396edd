"""The user's own data in a local folder; the settings assign the columns."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="custom",
    hub_id=None,
    prompt=None,
    completion=None,
    description="your own data: task.path, and the settings that name its columns",
)
