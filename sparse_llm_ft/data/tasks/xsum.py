"""XSum (Narayan et al., 2018)."""

from sparse_llm_ft.data.tasks.gem import with_gem_columns
from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="xsum",
    hub_id="EdinburghNLP/xsum",
    hub_revision="refs/convert/parquet",
    prompt="Summarize the article in one sentence.\n\n{document}\n\nSummary:",
    completion=" {summary}",
    flatten=with_gem_columns("summary"),
    metrics=("rouge",),
    description="summaries of news articles in one sentence",
    source="XSum, Narayan et al., 2018",
    example={
        "document": "The harbour's oldest crane was moved on Sunday.\nIt will stand beside the museum from May.",
        "summary": "A harbour crane has been moved to the museum.",
        "id": "1",
    },
)
