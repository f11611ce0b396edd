"""RTE (Dagan et al., 2005, and after): whether one text entails another. Label 0 is entailment."""

from sparse_llm_ft.data.tasks.glue import glue_task

TASK = glue_task(
    "rte",
    prompt="Does the second text follow from the first?\n\nFirst: {sentence1}\n\nSecond: {sentence2}\n\nAnswer:",
    labels=("yes", "no"),
    texts=("sentence1", "sentence2"),
    metric="accuracy",
)
