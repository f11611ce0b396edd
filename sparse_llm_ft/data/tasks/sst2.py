"""SST-2 (Socher et al., 2013): the sentiment of a sentence from a film review."""

from sparse_llm_ft.data.tasks.glue import glue_task

TASK = glue_task(
    "sst2",
    prompt="What is the sentiment of the review?\n\n{sentence}\n\nSentiment:",
    labels=("negative", "positive"),
    texts=("sentence",),
    metric="accuracy",
)
