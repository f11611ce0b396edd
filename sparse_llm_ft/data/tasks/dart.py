"""DART (Nan et al., 2021): a row has a set of triples and several sentences that express them."""

from collections.abc import Iterator, Mapping
from typing import Any

from sparse_llm_ft.data.tasks.gem import gem_texts
from sparse_llm_ft.data.tasks.task import Task
from sparse_llm_ft.data.tasks.template import BadRow, Row, require


def flatten(row: Row) -> Iterator[Row]:
    """Yield one row per sentence: ``triples`` is ``subject | relation | object ; ...``, ``text`` the sentence.

    Raises:
        BadRow: triples or sentences are missing or have another form.
    """
    triples = row["tripleset"]
    if not _lists_of_text(triples) or any(len(triple) != 3 for triple in triples):
        raise BadRow("column 'tripleset' is not a list of [subject, relation, object]")
    linear = " ; ".join(" | ".join(triple) for triple in triples)
    for text in gem_texts(row) if "target" in row and "annotations" not in row else _annotated(row):
        yield {**row, "triples": linear, "text": text}


def _annotated(row: Row) -> list[Any]:
    require(row, ("annotations",))
    return _texts(row["annotations"])


def _texts(annotations: Any) -> list[Any]:
    """The sentences of a list of ``{"source", "text"}`` (as published) or of a mapping of lists (as in `datasets`)."""
    if isinstance(annotations, Mapping):
        texts = annotations.get("text")
    elif isinstance(annotations, list):
        texts = [one.get("text") if isinstance(one, Mapping) else None for one in annotations]
    else:
        texts = None
    if not isinstance(texts, list) or not texts:
        raise BadRow("column 'annotations' has no list of texts")
    return texts


def _lists_of_text(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(inner, list) and all(isinstance(text, str) for text in inner) for inner in value)
    )


TASK = Task(
    name="dart",
    hub_id="Yale-LILY/dart",
    hub_revision="refs/convert/parquet",
    prompt="Describe the facts.\n\n{triples}\n\nDescription:",
    completion=" {text}",
    group_by="triples",
    flatten=flatten,
    nested=("tripleset",),
    metrics=("bleu", "rouge"),
    description="sentences from sets of triples",
    source="DART, Nan et al., 2021",
    example={
        "tripleset": [["The Kettle", "AREA", "riverside"], ["The Kettle", "OPENED", "1998"]],
        "subtree_was_extended": False,
        "annotations": {"source": ["made up"], "text": ["The Kettle opened by the river in 1998."]},
    },
)
