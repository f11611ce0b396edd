"""DialogSum (Chen et al., 2021). Test dialogues have three summaries: in three rows on the hub, or in three columns."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="dialogsum",
    hub_id="knkarthick/dialogsum",
    prompt="Summarize the dialogue.\n\n{dialogue}\n\nSummary:",
    completion=" {summary}",
    references=("summary2", "summary3"),
    group_by="dialogue",
    metrics=("rouge",),
    description="summaries of spoken dialogues",
    source="DialogSum, Chen et al., 2021",
    example={
        "id": "test_0_1",
        "dialogue": "#Person1#: Is the blue tent dry?\n#Person2#: Not yet. Let's wait until noon.",
        "summary": "#Person2# suggests waiting until noon for the tent to dry.",
        "topic": "camping",
    },
)
