"""Finds a split's files in a local folder: one file, shards, or a folder that `datasets` saved. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sparse_llm_ft.data.files import ALL_ENDINGS
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.strict_json_yaml import ParseError, read_json

_STATE = "state.json"
"""`Dataset.save_to_disk`'s list of its files."""

_SHARD = re.compile(r"(.+?)[-_.](\d+)(?:-of-(\d+)(?:-[0-9a-f]{16})?)?")
"""``STEM-00000-of-00002``; older files of the hub have a hash behind it."""


def files_of(folder: Path, stem: str, config: str | None = None) -> tuple[Path, ...]:
    """The files of the split that is named `stem`, in order; () if there are none.

    It is a file ``STEM.jsonl`` (or of another ending). Else it is shards ``STEM-00000-of-00002.parquet``, or a folder
    ``STEM`` with shards or as `save_to_disk` writes it, in the folder itself, its ``data``, or the data set's
    configuration. Else it is the folder itself, if this is such a saved split.

    Args:
        config: the data set's configuration on the hub, a folder of its repository.

    Raises:
        ConfigError: there are several of these, or a shard is missing.
    """
    plain = [path for ending in ALL_ENDINGS if (path := folder / f"{stem}{ending}").is_file()]
    if len(plain) > 1:
        raise _several(folder, stem, [path.name for path in plain])
    if plain:
        return tuple(plain)
    found = [files for place in _places(folder, config) for files in _sharded(place, stem)]
    if not found and (folder / _STATE).is_file() and stem == _saved_split(folder):
        found = [_saved(folder)]
    if len(found) > 1:
        raise _several(folder, stem, [str(files[0].relative_to(folder)) for files in found])
    return found[0] if found else ()


def _several(folder: Path, stem: str, names: list[str]) -> ConfigError:
    return ConfigError(
        "task.path", f"{str(folder)!r} has {names[0]} and {names[1]}", f"expected one file for split {stem}"
    )


def _places(folder: Path, config: str | None) -> Iterator[Path]:
    """The folders in which hub repositories have their shards."""
    yield folder
    for name in dict.fromkeys(filter(None, ("data", config, "default", "plain_text"))):
        if (folder / name).is_dir():
            yield folder / name


def _sharded(place: Path, stem: str) -> Iterator[tuple[Path, ...]]:
    """The split's shards beside each other, and those in a folder of its name; in ``data`` also its only file."""
    shards: dict[str, list[_Shard]] = {}
    for path in sorted(place.iterdir()):
        ending, shard = _ending(path), _shard(path)
        if shard and shard.stem == stem:
            shards.setdefault(ending, []).append(shard)
        elif ending and path.name == f"{stem}{ending}" and place.name == "data":
            yield (path,)
    for numbered in shards.values():
        yield _complete(numbered)
    inner = place / stem
    if (inner / _STATE).is_file():
        yield _saved(inner)
    elif inner.is_dir():
        yield from _in_folder(inner)


def _in_folder(folder: Path) -> Iterator[tuple[Path, ...]]:
    """The files of a folder that is a split, by format; their names are anything."""
    formats: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: _by_number(path.name)):
        if _ending(path) and path.is_file() and not path.name.startswith((".", "cache-")):
            formats.setdefault(_ending(path), []).append(path)
    for paths in formats.values():
        counted: dict[str, list[_Shard]] = {}
        for shard in filter(None, map(_shard, paths)):
            if shard.total is not None:
                counted.setdefault(shard.stem, []).append(shard)
        for numbered in counted.values():
            _complete(numbered)
        yield tuple(paths)


class _Shard(NamedTuple):
    """A file with a number in its name, and with the number of all such files if the name has it."""

    stem: str
    number: int
    total: int | None
    path: Path


def _shard(path: Path) -> _Shard | None:
    ending = _ending(path)
    match = _SHARD.fullmatch(path.name.removesuffix(ending)) if ending and path.is_file() else None
    return match and _Shard(match[1], int(match[2]), int(match[3]) if match[3] else None, path)


def _complete(shards: list[_Shard]) -> tuple[Path, ...]:
    """The shards in order.

    Raises:
        ConfigError: one of those that their names count is missing, or two have the same number.
    """
    shards = sorted(shards, key=lambda shard: shard.number)
    first, numbers = shards[0], {shard.number for shard in shards}
    for one, other in pairwise(shards):
        if one.number == other.number or one.total != other.total:
            raise ConfigError(
                "task.path",
                f"{str(first.path.parent)!r} has {one.path.name} and {other.path.name}",
                "expected shards of one numbering",
            )
    missing = next((number for number in range(first.total or 0) if number not in numbers), None)
    if missing is not None:
        raise ConfigError(
            "task.path",
            f"{str(first.path.parent)!r} has {len(shards)} of the {first.total} shards of {first.path.name}; "
            f"number {missing} is missing",
            "expected all of them",
        )
    return tuple(shard.path for shard in shards)


def _by_number(name: str) -> list[tuple[str, int]]:
    """A key that sorts 2 before 10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _saved(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that `Dataset.save_to_disk` wrote."""
    listed: Any = _state(folder).get("_data_files")
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    names = [str(entry.get("filename")) for entry in entries]
    if not names or any(Path(name).name != name for name in names):
        raise ConfigError("task.path", f"{str(folder / _STATE)!r} lists no files", "expected a folder of save_to_disk")
    files = tuple(folder / name for name in names)
    for path in files:
        if not path.is_file():
            raise ConfigError("task.path", f"{str(path)!r} is missing", f"{_STATE} lists it")
    return files


def _saved_split(folder: Path) -> str:
    """The split that a single saved `Dataset` is, or is a part of (``train[:10%]``)."""
    return str(_state(folder).get("_split") or "train").partition("[")[0]


def _state(folder: Path) -> Mapping[str, Any]:
    try:
        state = read_json(folder / _STATE)
    except (OSError, ParseError) as error:
        raise ConfigError("task.path", f"{str(folder / _STATE)!r} is not readable ({error})", "expected JSON") from None
    return state if isinstance(state, Mapping) else {}


def _ending(path: Path) -> str:
    """The file's ending, with that of a compression; empty if no reader takes it."""
    return next((ending for ending in sorted(ALL_ENDINGS, key=len, reverse=True) if path.name.endswith(ending)), "")
