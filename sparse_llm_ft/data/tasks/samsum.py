"""SAMSum (Gliwa et al., 2019)."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="samsum",
    hub_id="knkarthick/samsum",
    prompt="Summarize the conversation.\n\n{dialogue}\n\nSummary:",
    completion=" {summary}",
    metrics=("rouge",),
    description="summaries of messenger conversations",
    source="SAMSum, Gliwa et al., 2019",
    example={
        "id": "1",
        "dialogue": "Ida: Did you feed the cat?\nJon: Twice. She is very convincing.",
        "summary": "Jon fed the cat twice.",
    },
)
