"""SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016 and 2018). Neither has a public test split, so ``test`` is the validation
split.

A generating model is trained on the first answer; all answers count as correct.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sparse_llm_ft.data.tasks.task import Task
from sparse_llm_ft.data.tasks.template import BadRow, Row

UNANSWERABLE = "unanswerable"
"""What a generating model must write if the text has no answer."""

_PROMPT = "{context}\n\nQuestion: {question}\nAnswer:"
_SPLITS = {"train": "train", "validation": "validation", "test": "validation"}
_EXAMPLE = {
    "id": "1",
    "title": "Lighthouse",
    "context": "The lighthouse was built in 1871 and is still lit by hand.",
    "question": "When was the lighthouse built?",
    "answers": {"text": ["1871"], "answer_start": [28]},
}


def answers(row: Row) -> tuple[tuple[str, int], ...]:
    """Each answer's text and first character; () if there is none.

    Raises:
        BadRow: ``answers`` does not have the form ``{"text": [...], "answer_start": [...]}``.
    """
    value: Any = row["answers"]
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise BadRow('column \'answers\' is not {"text": [...], "answer_start": [...]} of equal lengths')
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or isinstance(start, bool):
            raise BadRow(f"column 'answers' has {text!r:.60} at {start!r:.20}, expected a text and an integer")
    return tuple(zip(texts, starts, strict=True))


def flatten(row: Row) -> Iterator[Row]:
    """Yield the row with ``answer``, its first answer."""
    found = answers(row)
    if not found:
        raise BadRow("column 'answers' is empty; questions without answer need task squad_v2")
    yield {**row, "answer": found[0][0]}


def flatten_v2(row: Row) -> Iterator[Row]:
    """Yield the row with ``answer``, its first answer or `UNANSWERABLE`."""
    found = answers(row)
    yield {**row, "answer": found[0][0] if found else UNANSWERABLE}


TASKS = (
    Task(
        name="squad",
        hub_id="rajpurkar/squad",
        prompt=f"Answer the question in words of the text.\n\n{_PROMPT}",
        completion=" {answer}",
        splits=_SPLITS,
        extractive=True,
        texts=("question", "context"),
        flatten=flatten,
        nested=("answers",),
        metrics=("squad",),
        description="answers that are spans of a paragraph",
        source="SQuAD, Rajpurkar et al., 2016",
        example=_EXAMPLE,
    ),
    Task(
        name="squad_v2",
        hub_id="rajpurkar/squad_v2",
        prompt=f"Answer the question in words of the text, or say {UNANSWERABLE}.\n\n{_PROMPT}",
        completion=" {answer}",
        splits=_SPLITS,
        extractive=True,
        texts=("question", "context"),
        flatten=flatten_v2,
        nested=("answers",),
        metrics=("squad",),
        description="as squad, and questions that the paragraph does not answer",
        source="SQuAD 2.0, Rajpurkar et al., 2018",
        no_answer=UNANSWERABLE,
        example={**_EXAMPLE, "question": "Who built it?", "answers": {"text": [], "answer_start": []}},
    ),
)
