"""Keys of earlier versions: a config that still has one is accepted with a warning, if the key changes nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_llm_ft.errors import ConfigError, one_line


@dataclass(frozen=True)
class Removed:
    """A key that is gone.

    Attributes:
        harmless: the value that asked for what happens anyway.
        why: completes "was removed, ...".
    """

    harmless: Any
    why: str


OLD_KEYS: dict[str, str | Removed] = {
    "method.candidates_per_forward": Removed(1, "since one candidate at a time computes least"),
}
"""``section.key`` -> its new name in the same section, or why it is gone. Every method of a list is a section."""


def replace_old_keys(tree: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The tree of settings with today's keys. Rank 0 warns of each old one.

    Args:
        strict: false for what an earlier version wrote itself: old keys are replaced or dropped silently.

    Raises:
        ConfigError: a removed key has a value that would change the run.
    """
    current = dict(tree)
    for old, new in OLD_KEYS.items():
        name, _, key = old.partition(".")
        section = current.get(name)
        if isinstance(section, list | tuple):
            current[name] = [_replaced(item, old, key, new, strict) for item in section]
        elif name in current:
            current[name] = _replaced(section, old, key, new, strict)
    return current


def _replaced(section: Any, old: str, key: str, new: str | Removed, strict: bool) -> Any:
    if not isinstance(section, Mapping) or key not in section:
        return section
    rest = {name: value for name, value in section.items() if name != key}
    if isinstance(new, str):
        _warn(f"{old} is now called {old.partition('.')[0]}.{new}", strict)
        return {new: section[key]} | rest
    value = section[key]
    if strict and (value != new.harmless or isinstance(value, bool)):
        raise ConfigError(old, f"{value!r:.60} is not allowed", f"the setting was removed, {new.why}; leave it out")
    _warn(f"{old} is ignored: it was removed, {new.why}", strict)
    return rest


def _warn(text: str, strict: bool) -> None:
    if strict and os.environ.get("RANK", "0") == "0":
        # Not `warn`: it would add a line of source code, which says nothing about the user's settings.
        warnings.warn_explicit(one_line(text), UserWarning, filename="settings", lineno=0)
