"""Keys of earlier versions. A config with one is accepted with a warning if the key changes nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_llm_ft.errors import ConfigError, one_line


@dataclass(frozen=True)
class Removed:
    """A removed key.

    Attributes:
        harmless: the value that requests what happens anyway.
        why: completes "was removed, ...".
    """

    harmless: Any
    why: str


OLD_KEYS: dict[str, str | Removed] = {
    "method.candidates_per_forward": Removed(1, "since one candidate at a time computes least"),
}
"""``section.key`` -> its new name in the same section, or why it was removed. Each method of a list is a section."""


def replace_old_keys(tree: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The tree of settings with the current keys. Rank 0 warns of each old key.

    Args:
        strict: false for a file that an earlier version wrote: it replaces or drops old keys silently.

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
        # `warn` would add a line of source code that has nothing to do with the user's settings.
        warnings.warn_explicit(one_line(text), UserWarning, filename="settings", lineno=0)
