"""Tasks of GLUE (Wang et al., 2019). Its test splits have no labels: what is measured as ``test`` is validation."""

from __future__ import annotations

from sparse_llm_ft.data.tasks.task import Metric, Task


def glue_task(name: str, prompt: str, labels: tuple[str, ...], texts: tuple[str, ...], metric: Metric) -> Task:
    """The task whose name is also its configuration in the hub's data set."""
    return Task(
        name=name,
        hub_id="nyu-mll/glue",
        prompt=prompt,
        completion=" {label}",
        splits={"train": "train", "validation": "validation", "test": "validation"},
        hub_config=name,
        labels=labels,
        texts=texts,
        metric=metric,
    )
