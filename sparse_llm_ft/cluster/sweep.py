"""``--sweep method.keep=10,20 seed=0,1``: the runs of all combinations, each with a folder of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from sparse_llm_ft.errors import UserError

MOST_RUNS = 1000
"""The least MaxArraySize that a cluster has by default is 1001."""

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"


def combinations(sweep: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(folder's name, overrides) of each run, in the order given; the last key varies fastest.

    Args:
        sweep: ``section.key=value,value,...`` each. A comma in brackets or quotes belongs to its value.

    Raises:
        UserError: an argument is none of these, a key or a value stands there twice, or the runs are too many.
    """
    keys: dict[str, list[str]] = {}
    for argument in sweep:
        key, equals, values = argument.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--sweep {argument}: expected section.key=value,value")
        if key in keys:
            raise UserError(f"--sweep {argument}: {key} stands there twice; expected all its values in one argument")
        if key == "output_dir":
            raise UserError("--sweep output_dir: each run has a folder of its own in output_dir; expected another key")
        keys[key] = _split(values)
        if not all(keys[key]) or len(set(keys[key])) < len(keys[key]):
            raise UserError(f"--sweep {argument}: a value is empty or stands there twice; expected {key}=value,value")
    count = 1
    for values_of_key in keys.values():
        count *= len(values_of_key)
    if count > MOST_RUNS:
        raise UserError(f"--sweep: {count} runs; expected at most {MOST_RUNS}")
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: key if last.count(tail) > 1 else tail for key, tail in zip(keys, last, strict=True)}
    found: dict[str, tuple[str, ...]] = {}
    for chosen in itertools.product(*keys.values()):
        pairs = list(zip(keys, chosen, strict=True))
        name = "_".join(f"{short[key]}-{_plain(value)}" for key, value in pairs)[:120]
        while name in found:  # two values whose names differ in signs alone
            name += "+"
        found[name] = tuple(f"{key}={value}" for key, value in pairs)
    return list(found.items())


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", value).strip("-") or "-"


def _split(values: str) -> list[str]:
    """The values between commas that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
