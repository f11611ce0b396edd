"""Inputs that readers must survive: any JSON value, texts that break terminals and paths, documents with one wound."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

NASTY = st.sampled_from(
    ["", "..", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\ud800", "~nobody_at_all/x", "é" * 300, "x" * 5000]
)
TEXTS = st.one_of(st.text(max_size=20), NASTY)
NUMBERS = st.one_of(
    st.integers(-3, 70_000), st.sampled_from([10**12, -(10**30), 10**400, 2**63]), st.floats(), st.booleans()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def wounded(draw: st.DrawFn, document: Any) -> Any:
    """The document with one value, anywhere in it, replaced, taken away or added."""
    document = copy.deepcopy(document)
    place = document
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if action == "remove":
        del place[key]
    elif action == "add" and isinstance(place, dict):
        place[draw(TEXTS)] = draw(VALUES)
    else:
        place[key] = draw(VALUES)
    return document


def is_one_line(error: Exception) -> bool:
    """Whether a person can read it: one printable line of bounded length, not empty."""
    return 0 < len(str(error)) < 8000 and str(error).isprintable()
