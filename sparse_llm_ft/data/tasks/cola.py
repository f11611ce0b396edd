"""CoLA (Warstadt et al., 2019): whether a sentence is grammatical. Most are, hence Matthews' coefficient."""

from sparse_llm_ft.data.tasks.glue import glue_task

TASK = glue_task(
    "cola",
    prompt="Is this sentence grammatical?\n\n{sentence}\n\nAnswer:",
    labels=("no", "yes"),
    texts=("sentence",),
    metric="matthews",
)
