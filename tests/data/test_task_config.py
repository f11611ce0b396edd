"""Settings of a task: what the registry has, what goes together, what is refused."""

from __future__ import annotations

import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.rows import examples_of
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import TASKS, Task
from sparse_llm_ft.errors import UserError


def custom(**settings: object) -> TaskConfig:
    return TaskConfig(**{"name": "custom", "path": ".", "prompt": "{text} ?", "completion": " {answer}"} | settings)


LABELS = {"labels": ("a", "b"), "completion": None}
SCORE = {"score": (0, 5), "completion": None}
CHAT = {"messages": "turns", "prompt": None, "completion": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dialogsun"}, "task.name: 'dialogsun' is unknown; did you mean dialogsum?"),
        ({"name": "sst2"}, "task.name: 'sst2' is unknown; did you mean glue/sst2?"),
        ({"name": "rte"}, "did you mean glue/rte?"),
        ({"prompt": None}, "task.prompt: not given, and task custom has none"),
        ({"completion": "always"}, r"task.completion: 'always' has no \{column\} field"),
        ({"path": None}, "task.path: not given, and task custom has no hub data set"),
        ({"texts": ("text",)}, r"task.texts: \('text',\) is for classification or regression; expected task.labels"),
        ({"label_column": "y"}, "task.label_column: 'y' is for classification or regression"),
        ({"metrics": ("matthews",)}, "task.metrics: 'matthews' does not measure a task of kind generation"),
        ({"metrics": ("rouge", "rouge")}, r"task.metrics: \['rouge', 'rouge'\] names a metric twice"),
        (
            {**LABELS, "metrics": ("rouge",)},
            "'rouge' does not measure a task of kind classification; expected one of acc",
        ),
        ({**SCORE, "metrics": ("accuracy",)}, "kind regression; expected one of pearson, spearman"),
        ({"labels": ("a", "a")}, r"task.labels: \['a', 'a'\] has an empty or a repeated word"),
        ({"labels": ("a", " ")}, "has an empty or a repeated word"),
        ({"labels": ("a", "b")}, r"task.completion: ' \{answer\}' is not the label alone; expected '\{label\}'"),
        ({"score": (0, 5)}, r"task.completion: .* is not the label alone; expected .*, or no task.score"),
        ({"labels": ("a", "b"), "label_column": "text"}, "task.label_column: 'text' is in task.prompt or task.texts"),
        ({**LABELS, "prompt": None}, "task.texts: neither it nor task.prompt is given"),
        ({**LABELS, "references": ("r",)}, r"task.references: \['r'\] is for generation; expected no task.labels"),
        ({**LABELS, "score": (0, 5)}, r"task.score: \[0.0, 5.0\] beside labels \['a', 'b'\]; expected one of them"),
        ({**SCORE, "score": (5, 5)}, r"task.score: \[5.0, 5.0\] is not a range"),
        (
            {**SCORE, "score": (0, 0.5)},
            r"task.score: \[0.0, 0.5\] is narrow, and a model that writes a score writes one",
        ),
        ({"messages": "turns"}, r"task.messages: 'turns' beside prompt '\{text\} \?'; expected one of them"),
        ({**CHAT, "labels": ("a", "b")}, "task.messages: 'turns' beside labels"),
        ({"name": "dialogsum", **CHAT}, "task.messages: 'turns' beside prompt 'Summarize"),
        ({"name": "squad", "completion": " {answer}", "metrics": ("rouge",)}, "a task of kind extractive"),
        (
            {"name": "squad", "references": ("x",)},
            r"task.references: .* is for generation; expected none in task squad",
        ),
        ({"name": "squad", "texts": ("x",)}, r"task.texts: \['x'\]; expected the columns of question and context"),
        ({"name": "squad", "label_column": "x"}, "task.label_column: 'x' is for classification"),
    ],
)
def test_a_task_that_cannot_work_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_task(custom(**settings))


def test_references_of_the_registry_can_be_switched_off() -> None:
    assert resolve_task(TaskConfig(name="dialogsum")).references
    assert resolve_task(TaskConfig(name="dialogsum", references=())).references == ()


def test_every_task_of_the_registry_has_what_its_kind_needs() -> None:
    for name, entry in TASKS.items():
        assert entry.name == name and entry.description
        if name == "custom":
            continue
        task = resolve_task(TaskConfig(name=name))
        assert task == entry and task.source and set(task.splits) == {"train", "validation", "test"}
        made = {column for flat in task.flatten(task.example) for column in flat} if task.flatten else task.example
        assert set(task.columns) <= set(made) and task.example.keys() >= set(task.nested)
        assert (task.outputs is None) == (task.kind == "generation") == (task.texts == ())
        assert task.outputs == {"generation": None, "regression": 1, "extractive": 2}.get(
            task.kind, len(task.labels or ())
        )


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.example], ids=lambda task: task.name)
def test_the_example_of_a_task_becomes_one_sample(task: Task) -> None:
    assert task.example is not None
    ((_, example),) = examples_of(task, task.example, "example", 1)
    right = () if example.answers == () else (example.completion.strip(),)  # where there is no answer, none is right
    assert example.completion.startswith(" ") and example.references == right
    assert example.prompt.endswith(":") and "{" not in example.prompt
    if task.labels:
        assert example.completion == " " + task.labels[task.example["label"]]


# From the GLUE paper's table of metrics and the label features of nyu-mll/glue.
GLUE = {
    "cola": (2, ("matthews",)),
    "sst2": (2, ("accuracy",)),
    "mrpc": (2, ("accuracy", "f1")),
    "qqp": (2, ("accuracy", "f1")),
    "stsb": (1, ("pearson", "spearman")),
    "mnli": (3, ("accuracy",)),
    "qnli": (2, ("accuracy",)),
    "rte": (2, ("accuracy",)),
}


def test_glue_is_measured_as_its_paper_does() -> None:
    found = {name: task for name, task in TASKS.items() if name.startswith("glue/")}
    assert {task.hub_config: (task.outputs, task.metrics) for task in found.values()} == GLUE
    assert all(name == f"glue/{task.hub_config}" for name, task in found.items())


def test_texts_are_the_prompts_columns_unless_given() -> None:
    assert resolve_task(custom(**LABELS, prompt="{x} or {y}")).texts == ("x", "y")
    assert resolve_task(custom(**LABELS, prompt="{x} {y} {z}")).texts == ()
    assert resolve_task(custom(**LABELS, prompt=None, texts=("y",))).texts == ("y",)
    assert resolve_task(custom(**LABELS, prompt=None, texts=("y",))).completion == " {label}"
    assert resolve_task(custom(**SCORE)).texts == ("text",)


@pytest.mark.parametrize(
    ("settings", "kind", "metrics"),
    [
        ({}, "generation", ("rouge",)),
        (CHAT, "generation", ("rouge",)),
        (LABELS, "classification", ("accuracy",)),
        (SCORE, "regression", ("pearson", "spearman")),
        ({"metrics": ("squad", "bleu")}, "generation", ("squad", "bleu")),
        ({**LABELS, "metrics": ("f1",)}, "classification", ("f1",)),
        ({"name": "glue/mrpc", "prompt": None, "completion": None}, "classification", ("accuracy", "f1")),
    ],
)
def test_metrics_are_those_of_the_kind_of_task(settings: dict, kind: str, metrics: tuple) -> None:
    task = resolve_task(custom(**settings))
    assert (task.kind, task.metrics) == (kind, metrics)
