"""E2E NLG Challenge (Novikova et al., 2017): one row per reference, several per meaning representation."""

from sparse_llm_ft.data.tasks.gem import with_gem_columns
from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="e2e_nlg",
    hub_id="tuetschek/e2e_nlg",
    hub_revision="refs/convert/parquet",
    prompt="Describe the restaurant.\n\n{meaning_representation}\n\nDescription:",
    completion=" {human_reference}",
    group_by="meaning_representation",
    flatten=with_gem_columns("human_reference", grouped=True),
    metrics=("bleu", "rouge"),
    description="descriptions of restaurants from their attributes",
    source="E2E NLG, Novikova et al., 2017",
    example={
        "meaning_representation": "name[The Kettle], eatType[coffee shop], area[riverside]",
        "human_reference": "The Kettle is a coffee shop by the river.",
    },
)
