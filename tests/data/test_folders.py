"""Folders as the hub and `datasets` lay them out give the same rows as one file for each split."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, NamedSplit

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.files import COMPRESSED
from sparse_llm_ft.data.reading import has_split, read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import template_columns
from sparse_llm_ft.errors import ConfigError, UserError

ROWS = {"train": [{"text": f"t{i}", "answer": f"a{i}"} for i in range(25)], "test": [{"text": "q", "answer": "b"}]}


def shards(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in ROWS.items():
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict]) -> bytes:
    return "".join(";".join(row) + "\n" for row in (rows[0].keys(), *(row.values() for row in rows))).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return bytes(sink.getvalue())


PACK = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXT: dict[str, Callable[[list[dict]], bytes]] = {
    ".jsonl": lines,
    ".csv": table,
    ".json": lambda rows: json.dumps(rows).encode(),
}


def splits_of(folder: Path) -> dict[str, list[tuple[str, str]]]:
    task = resolve_task(TaskConfig(name="custom", path=str(folder), prompt="{text}", completion="{answer}"))
    assert not has_split(task, "validation")
    return {split: [(e.prompt, e.completion) for e in read_split(task, split)] for split in ROWS}


WANTED = {split: [tuple(row.values()) for row in rows] for split, rows in ROWS.items()}


@pytest.mark.parametrize("place", ["", "data", "plain_text"])
def test_shards_as_on_the_hub(tmp_path: Path, place: str) -> None:
    shards(tmp_path / place)
    assert splits_of(tmp_path) == WANTED


def test_many_shards_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(12):
        Dataset.from_list(ROWS["train"]).shard(12, i, contiguous=True).to_parquet(folder / f"{i:04}.parquet")
        (tmp_path / f"test_{i}.jsonl").write_bytes(lines([{"text": f"{i}", "answer": "b"}]))
    found = splits_of(tmp_path)
    assert found["train"] == WANTED["train"] and found["test"] == [(f"{i}", "b") for i in range(12)]


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in (0, 2):
        Dataset.from_list(ROWS["train"]).to_parquet(folder / f"train-0000{i}-of-00003.parquet")
    with pytest.raises(ConfigError, match=r"has 2 of the 3 shards of train-00000.*; number 1 is missing"):
        splits_of(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("data/train.jsonl", "data/train-00000-of-00001.jsonl"),
            "data/train.jsonl and data/train-00000-of-00001.jsonl",
        ),
        (("train-0.jsonl", "train_0.jsonl"), "train-0.jsonl and train_0.jsonl; expected shards of one numbering"),
        (("train_0.jsonl", "train-00000-of-00001.jsonl"), "expected shards of one numbering"),
        (("train/a.jsonl", "train/a.csv"), "train/a.csv and train/a.jsonl; expected one file for split train"),
        (("train/train-00000-of-00002.jsonl",), "1 of the 2 shards of .*; number 1 is missing"),
        (("train/a-00000-of-00001.jsonl", "train/b-00001-of-00002.jsonl"), "number 0 is missing"),
    ],
)
def test_no_row_is_read_twice_and_none_is_left_out(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(table(ROWS["train"]) if name.endswith("csv") else lines(ROWS["train"]))
    with pytest.raises(ConfigError, match=message) as error:
        splits_of(tmp_path)
    assert "\n" not in str(error.value)


def test_names_as_older_repositories_and_people_have_them(tmp_path: Path) -> None:
    """A hash behind the number of the shards; numbers without zeros before them; a date, which counts nothing."""
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.jsonl").write_bytes(lines(ROWS["train"][i * 2 : i * 2 + 2]))
    (folder / "12.jsonl").write_bytes(lines(ROWS["train"][24:]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-00000-of-00001-a09b74b3ef9c3b56.jsonl").write_bytes(lines(ROWS["test"]))
    assert splits_of(tmp_path) == WANTED
    for number in ("20240131", "20240201"):
        (tmp_path / f"validation_{number}.jsonl").write_bytes(lines(ROWS["test"]))
    task = resolve_task(TaskConfig(name="custom", path=str(tmp_path), prompt="{text}", completion="{answer}"))
    assert len(read_split(task, "validation")) == 2


def test_a_saved_part_of_a_split_is_that_split(tmp_path: Path) -> None:
    """`load_dataset(..., split="train[:10%]")` names the part."""
    Dataset.from_list(ROWS["train"], split=NamedSplit("train[:10%]")).save_to_disk(tmp_path)
    task = resolve_task(TaskConfig(name="custom", path=str(tmp_path), prompt="{text}", completion="{answer}"))
    assert len(read_split(task, "train")) == 25 and not has_split(task, "test")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    saved = DatasetDict({split: Dataset.from_list(rows) for split, rows in ROWS.items()})
    saved.save_to_disk(tmp_path / "both", num_shards={"train": 3, "test": 1})
    (tmp_path / "both" / "train" / "cache-0.arrow").write_bytes(b"of a map")
    assert splits_of(tmp_path / "both") == WANTED
    (tmp_path / "both" / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00003.arrow' is missing; state.json lists it"):
        splits_of(tmp_path / "both")
    saved["train"].save_to_disk(tmp_path / "one")
    task = resolve_task(TaskConfig(name="custom", path=str(tmp_path / "one"), prompt="{text}", completion="{answer}"))
    assert [(e.prompt, e.completion) for e in read_split(task, "train")] == WANTED["train"]
    assert not has_split(task, "test")


@pytest.mark.parametrize("packed", COMPRESSED)
@pytest.mark.parametrize("ending", TEXT)
def test_compressed_files(tmp_path: Path, ending: str, packed: str) -> None:
    for split, rows in ROWS.items():
        (tmp_path / f"{split}{ending}{packed}").write_bytes(PACK[packed](TEXT[ending](rows)))
    assert splits_of(tmp_path) == WANTED


@pytest.mark.parametrize("packed", COMPRESSED)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) * 2 // 3], lambda data: b"no such format" + data])
def test_a_damaged_archive_is_one_line(tmp_path: Path, packed: str, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"train.jsonl{packed}").write_bytes(damage(PACK[packed](lines(ROWS["train"] * 50))))
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS["test"]))
    with pytest.raises(UserError, match=rf"train\.jsonl\{packed}") as error:
        splits_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_plain_file_comes_first_and_two_layouts_are_an_error(tmp_path: Path) -> None:
    shards(tmp_path / "data")
    shards(tmp_path)
    with pytest.raises(ConfigError, match=r"has train-00000.* and data/train-00000.*; expected one file"):
        splits_of(tmp_path)
    for split, rows in ROWS.items():
        (tmp_path / f"{split}.jsonl").write_bytes(lines(rows[:1]))
    assert splits_of(tmp_path)["train"] == WANTED["train"][:1]


@pytest.mark.parametrize(
    ("name", "row", "references"),
    [
        ("e2e_nlg", {"meaning_representation": "name[The Kettle]"}, ("T.", "U.")),
        ("xsum", {"document": "The Kettle moved.", "xsum_id": "1"}, ("T.",)),
    ],
)
def test_gems_columns_beside_the_originals(name: str, row: dict, references: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines([row | {"gem_id": "g", "target": "T.", "references": []}]))
    (tmp_path / "test.jsonl").write_bytes(lines([row | {"target": "T.", "references": ["T.", "U."]}]))
    task = resolve_task(TaskConfig(name=name, path=str(tmp_path)))
    (learned,), (measured,) = read_split(task, "train"), read_split(task, "test")
    assert learned.completion == " T." and "The Kettle" in learned.prompt and measured.references == references
    (tmp_path / "train.jsonl").write_bytes(lines([row | {"text": "T."}]))
    with pytest.raises(UserError, match=f"no column '{template_columns(task.completion)[0]}'"):
        read_split(task, "train")


def test_gems_columns_of_dart(tmp_path: Path) -> None:
    row = {"gem_id": "g", "tripleset": [["a", "b", "c"]], "target_sources": ["x"], "target": "T."}
    (tmp_path / "train.jsonl").write_bytes(lines([row | {"references": []}]))
    (tmp_path / "test.jsonl").write_bytes(lines([row | {"references": ["T.", "U."]}]))
    task = resolve_task(TaskConfig(name="dart", path=str(tmp_path)))
    (learned,), (measured,) = read_split(task, "train"), read_split(task, "test")
    assert learned.completion == " T." and "a | b | c" in learned.prompt and measured.references == ("T.", "U.")
