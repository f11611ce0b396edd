"""DialogSum (Chen et al., 2021): summaries of spoken dialogues. The test rows carry three references each."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="dialogsum",
    hub_id="knkarthick/dialogsum",
    prompt="Summarize the dialogue.\n\n{dialogue}\n\nSummary:",
    completion=" {summary}",
    references=("summary2", "summary3"),
)
