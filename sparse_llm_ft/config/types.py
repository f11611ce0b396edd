"""What all settings share: their base class, numbers that are not booleans, and valid paths."""

from __future__ import annotations

import math
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_BATCH = 2**20
"""Most samples of one optimizer step: more than any run has, few enough to list them if a checkpoint claims them."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _no_bool(value: Any) -> Any:
    """Refuse YAML's true, which would pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


_LARGEST_INT, _LARGEST_FLOAT = 2**63 - 1, 3.4e38
"""int64's, and what float32 holds: torch, numpy and indices take no more."""


def _in_int64(value: int) -> int:
    if abs(value) > _LARGEST_INT:
        raise ValueError("a number that 64 bits hold")
    return value


def _in_float32(value: float) -> float:
    if abs(value) > _LARGEST_FLOAT:
        raise ValueError(f"a number up to {_LARGEST_FLOAT:g}")
    return value


Int = Annotated[int, BeforeValidator(_no_bool), AfterValidator(_in_int64)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False), AfterValidator(_in_float32)]
Share = Annotated[Float, Field(gt=0, le=1)]


def _as_off(value: Any) -> Any:
    """The text that YAML reads as false where it is not quoted."""
    return "off" if value is False else value


OFF = BeforeValidator(_as_off)
"""Of a setting one of whose values is the text ``off``."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", re.IGNORECASE)
_UNITS = (
    {"": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)} | {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
)


def bytes_of(text: str) -> int | None:
    """Bytes of a text such as ``80GiB``, ``24 GB`` or ``1000000``; None for any other text."""
    match = _SIZE.fullmatch(text.strip())
    size = 0.0 if match is None else float(match[1]) * _UNITS[(match[2] or "").upper()]
    return None if match is None or math.isinf(size) else int(size)


def _as_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return _no_bool(value)
    size = bytes_of(value)
    if size is None:
        raise ValueError("a size such as 80GiB")
    return size


Bytes = Annotated[int, BeforeValidator(_as_bytes)]
"""A number of bytes, perhaps written with its unit."""

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes; Linux's NAME_MAX and PATH_MAX


def expand_path(path: str) -> str:
    """The path with the home folder in place of a leading ~.

    Raises:
        ValueError: the system could take no such path.
    """
    if path.startswith("~"):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError:
            raise ValueError("a path; there is no such home folder") from None
    data = os.fsencode(path)
    if b"\0" in data or len(data) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in data.split(b"/")):
        raise ValueError("a path that the system can take")
    return path


FilePath = Annotated[str, AfterValidator(expand_path)]
"""A path; a leading ~ is the home folder."""

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expand_variables(path: str) -> str:
    """The path with the values of environment variables.

    Raises:
        ValueError: one is not set.
    """
    expanded = os.path.expandvars(path)
    if unset := _VARIABLE.search(expanded):
        raise ValueError(f"a path; {unset[0]} is not set here")
    return expanded


ExpandedPath = Annotated[str, AfterValidator(expand_variables), AfterValidator(expand_path)]
"""A path in which environment variables, as in ``$SCRATCH/run``, have the values that they have here."""


def _iso_date(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("a date in ISO 8601, such as 2026-05-01 or 2026-05-01T12:30:00") from None
    return text


Date = Annotated[str, AfterValidator(_iso_date)]
"""A date, or a date and time, in ISO 8601."""


def is_there(text: str) -> bool:
    """Whether a file or folder of that name can be seen; False if the text cannot be a name."""
    try:
        return Path(text).exists()
    except OSError:  # a name that is too long, or below a folder that may not be read
        return False


def is_file(text: str) -> bool:
    """Whether a file of that name exists; False if the text cannot be a name."""
    try:
        return Path(text).is_file()
    except OSError:  # a name that is too long
        return False
