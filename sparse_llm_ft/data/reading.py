"""Split -> examples, from a local folder or the hub. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from sparse_llm_ft.data.files import COMPRESSED, ENDINGS, rows_of
from sparse_llm_ft.data.folders import files_of
from sparse_llm_ft.data.rows import Example, examples_of
from sparse_llm_ft.data.tasks import BadRow, MissingColumn, Row, Task, listed, odd_fields, require, with_fields
from sparse_llm_ft.errors import ConfigError, DataError, TrainingError, UserError, reason_of

SPLITS = ("train", "validation", "test")


@dataclass
class Skipped:
    """Counts the rows left out under ``task.on_bad_row: skip``, and keeps the first five reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Count one more row."""
        self.count += 1
        if len(self.reasons) < 5:
            self.reasons.append(str(error))

    def __str__(self) -> str:
        return f"{self.count} rows left out" + (f", the first: {self.reasons[0]}" if self.reasons else "")


def examples(task: Task, split: str, skipped: Skipped, further: str | None = None) -> Iterator[Example]:
    """Yield the examples of ``train``, ``validation`` or ``test`` in one pass, without grouping.

    Args:
        skipped: counts the rows that are left out.
        further: name of one of `Task.further_splits`.

    Raises:
        UserError: the split does not exist or has no usable row; as `DataError`, a row cannot be used.
    """
    return (example for _, example in _grouped_examples(task, split, further, skipped))


def read_split(
    task: Task,
    split: str,
    further: str | None = None,
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> list[Example]:
    """A split's examples. Except in ``train``, rows of the same `Task.group_by` become one with all references.

    Args:
        further: name of one of `Task.further_splits`.
        limit: maximum number of examples; the first ones are taken.
        skipped: counts the rows that are left out.

    Raises:
        UserError: as `examples`.
    """
    pairs = _grouped_examples(task, split, further, Skipped() if skipped is None else skipped)
    if split == "train" or task.group_by is None:
        return [example for _, example in islice(pairs, limit)]
    samples: dict[str, Example] = {}
    for key, example in pairs:
        first = samples.setdefault(key, example)
        references = tuple(dict.fromkeys((*first.references, *example.references)))
        samples[key] = replace(first, references=references)
    return list(samples.values())[:limit]


def check_columns(task: Task, split: str, further: str | None = None) -> None:
    """Check the first row, so that wrong columns, types or labels are reported before anything slow.

    Under ``task.on_bad_row: skip`` the first usable row is checked.

    Raises:
        UserError: as `examples`.
    """
    next(_grouped_examples(task, split, further, Skipped()))
    source, line, row = _first_row(task, split, further)
    for setting, template in (("task.prompt", task.prompt), ("task.completion", task.completion)):
        for odd in odd_fields(template or "", map(str, row)):
            raise DataError(
                source,
                line,
                f"{odd} in {setting}: expected {{column}}, or {{meta.key}} and {{list[0]}} for a value inside of one, "
                f"with names of letters, digits and _; {{{odd}}} writes it as text",
            )


def check_references(task: Task, split: str, named: Iterable[str]) -> None:
    """Check that a split's first row has the columns that the user named in ``task.references``.

    Columns that only the registry names may be missing.

    Args:
        named: the user's columns.

    Raises:
        DataError: a column is missing.
    """
    source, line, row = _first_row(task, split, None)
    try:
        require(with_fields(row, named), named)
    except MissingColumn as error:
        raise DataError(source, line, f"task.references: {error}") from None


def has_split(task: Task, split: str, further: str | None = None) -> bool:
    """Whether the local folder has a file for the split, or the task names such a split of the hub's data set."""
    if task.path is None:
        return split in _names(task, further)
    return bool(split_files(task, split, further))


def split_files(task: Task, split: str, further: str | None = None) -> tuple[Path, ...]:
    """A split's files in the local folder, named after our split or the hub's; () if they are missing or the data are
    the hub's. A split that the hub takes from another (GLUE's ``test``) falls back to that one's files.

    Raises:
        ConfigError: the folder has several such files that are no shards of each other, or not all shards.
    """
    names = _names(task, further)
    if task.path is None or split not in names:
        return ()
    for stems in _stems(names, split, further):
        found = [files for stem in stems if (files := files_of(Path(task.path), stem, task.hub_config))]
        if len(found) > 1:
            both = " and ".join(files[0].name for files in found[:2])
            raise ConfigError("task.path", f"{task.path!r} has {both}", f"expected one file for split {split}")
        if found:
            return found[0]
    return ()


def _stems(names: Mapping[str, str], split: str, further: str | None) -> list[list[str]]:
    """Possible names of the split's file; names of the first list take precedence over the second's."""
    hub = names[split]
    if further is not None:
        return [[hub]]
    owner = next(ours for ours in names if names[ours] == hub)  # for GLUE's test: validation
    taken = [*dict.fromkeys((owner, hub))]
    return [taken] if split == owner else [[split], taken]


def _names(task: Task, further: str | None) -> dict[str, str]:
    """Our split -> the hub's."""
    return dict(task.splits if further is None else task.further_splits[further])


def _grouped_examples(task: Task, split: str, further: str | None, skipped: Skipped) -> Iterator[tuple[str, Example]]:
    """Yield each example with the value of `Task.group_by`. A column missing in the first row is always an error: the
    other rows will lack it too.
    """
    name, rows = _open(task, split, further)
    first, some = True, False
    for source, line, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            found = list(examples_of(task, row, source, line))
        except BadRow as bad:
            error = DataError(source, line, str(bad))
            if task.on_bad_row == "error" or (first and isinstance(bad, MissingColumn)):
                raise error from None
            skipped.add(error)
        else:
            some = True
            yield from found
        first = first and isinstance(row, BadRow)
    if not some:
        raise UserError(f"{name}: no rows" + (f" that can be used; {skipped}" if skipped.count else ""))


def _open(task: Task, split: str, further: str | None) -> tuple[str, Iterator[tuple[str, int, Row | BadRow]]]:
    """The split's display name, and its rows, each with its source and line."""
    name = _names(task, further)[split]
    if task.path is None:
        hub = "/".join(part for part in (task.hub_id, task.hub_config) if part)
        source = f"{hub}[{name}]"
        rows = hub_rows(task, name, task.streaming and split == "train")
        return source, ((source, number, row) for number, row in _numbered(rows, source))
    files = split_files(task, split, further)
    if not files:
        stem = split if further is None else name
        raise ConfigError(
            "task.path",
            f"{task.path!r} has no {stem}.jsonl",
            f"nor another of {', '.join(ENDINGS)} (of text also with {', '.join(COMPRESSED)}), shards "
            f"{stem}-00000-of-00001.parquet, there or in data, or a folder of save_to_disk; "
            f"found: {listed(sorted(p.name for p in Path(task.path).iterdir()))}",
        )
    return str(files[0]), ((str(path), line, row) for path in files for line, row in rows_of(path))


def _first_row(task: Task, split: str, further: str | None) -> tuple[str, int, Row]:
    """Source, line and content of a split's first row that can be read."""
    _, rows = _open(task, split, further)
    return next((source, line, row) for source, line, row in rows if not isinstance(row, BadRow))


def _numbered(rows: Iterable[Row], source: str) -> Iterator[tuple[int, Row]]:
    """The hub's rows with their numbers, from 1.

    Raises:
        TrainingError: the next row cannot be read, since the server of streamed rows is away.
    """
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except Exception as error:  # of a dozen types, as in `hub_rows`
        raise TrainingError(
            f"{source}: the row behind number {number} cannot be read "
            f"({type(error).__name__}: {reason_of(error)}); the same command continues when it can be"
        ) from error


def hub_rows(task: Task, name: str, streamed: bool = False) -> Iterable[Row]:
    """A split of the hub's data set.

    Args:
        name: the hub's name of the split.
        streamed: read rows from the network on demand instead of downloading all of them first.

    Raises:
        UserError: the data set cannot be loaded.
    """
    import datasets  # slow to import; needed only without a local folder

    try:
        rows: Iterable[Row] = datasets.load_dataset(
            task.hub_id, task.hub_config, split=name, revision=task.hub_revision, streaming=streamed
        )
        return rows
    except Exception as error:  # the library raises a dozen types for "not there" and "no network"
        raise UserError(
            f"task.name: {task.hub_id} cannot be loaded from the hub "
            f"({type(error).__name__}: {reason_of(error)}); "
            "give task.path for a local folder"
        ) from error
