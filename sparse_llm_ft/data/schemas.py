"""How samples lie in Arrow files."""

from __future__ import annotations

import pyarrow

from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.spans import SpanSample

_IDS = pyarrow.list_(pyarrow.int32())


def schema_of(kind: type, is_score: bool) -> pyarrow.Schema:
    """Columns of `Sample`, `TextSample` or `SpanSample`.

    Args:
        is_score: whether labels are scores of a regression and not numbers of labels.
    """
    if kind is SpanSample:
        numbers = dict.fromkeys(("start", "end", "null", "example"), pyarrow.int32())
        return pyarrow.schema({"ids": _IDS, "type_ids": _IDS} | numbers | {"offsets": pyarrow.list_(_IDS)})
    label = pyarrow.float64() if is_score else pyarrow.int64()
    if kind is Sample:
        columns = {"prompt": _IDS, "completion": _IDS}
    else:
        assert kind is TextSample, kind
        columns = {"ids": _IDS, "type_ids": _IDS}
    return pyarrow.schema(columns | {"label": label, "shortened": pyarrow.bool_()})
