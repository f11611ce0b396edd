"""A derivation comes back as it was stored, or not at all."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from helpers.method_settings import TARGETS, config, start
from sparse_llm_ft.config.derivation import DerivationSettings
from sparse_llm_ft.io.atomic import verify_folder
from sparse_llm_ft.io.content_cache import content_key, hash_files
from sparse_llm_ft.scoring.cache import (
    METADATA,
    TENSORS,
    derivation_key,
    from_bytes,
    hash_samples,
    load,
    save,
    to_bytes,
)
from sparse_llm_ft.scoring.derivation import Derivation
from sparse_llm_ft.scoring.importance import Importance


def derivation(value: float = 1.0) -> Derivation:
    return Derivation(
        settings=DerivationSettings(importance="imp", micro_batch_size=3),
        mu=0.75,
        standard_error=0.1 / 3,
        majority=0.5,
        loss=1.25,
        samples=4,
        units=7,
        ratios={"a.0.q": (1 / 3, 0.0), "pooler": (1.0, 0.25)},
        importance={
            "a.0.q": Importance(torch.full((3,), value), torch.arange(2.0)),
            "pooler": Importance(torch.ones(1), torch.rand(4)),
        },
        notes=("a note",),
    )


def same(a: Derivation | None, b: Derivation) -> bool:
    assert a is not None
    (tensors, metadata), (others, other) = a.to_tensors(), b.to_tensors()
    return (
        metadata == other
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[k], others[k]) for k in tensors)
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    warnings: list[str] = []
    stored = derivation()
    assert load(tmp_path / "cache", "k", warnings.append) is None
    save(tmp_path / "cache", "k", stored)
    assert same(load(tmp_path / "cache", "k", warnings.append), stored)
    assert load(tmp_path / "cache", "other", warnings.append) is None and not warnings


def test_what_is_sent_comes_out_as_it_was() -> None:
    stored = derivation()
    assert same(from_bytes(to_bytes(stored)), stored)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def other_bytes(path: Path) -> None:
    path.write_bytes(bytes(reversed(path.read_bytes())))


@pytest.mark.parametrize("file", [TENSORS, METADATA, "manifest.json"])
@pytest.mark.parametrize("damage", [cut_short, other_bytes, Path.unlink])
def test_a_damaged_entry_is_none_with_a_line_and_is_replaced(tmp_path: Path, file: str, damage) -> None:
    stored = derivation()
    save(tmp_path, "k", stored)
    damage(tmp_path / "k" / file)
    warnings: list[str] = []
    assert load(tmp_path, "k", warnings.append) is None
    assert len(warnings) == 1 and "made anew" in warnings[0] and "\n" not in warnings[0]
    save(tmp_path, "k", stored)
    assert same(load(tmp_path, "k"), stored)


@pytest.mark.parametrize("metadata", [{"version": 0}, {"version": 1}, [], {"version": 1, "settings": {"x": 1}}])
def test_an_entry_of_another_format_is_none(tmp_path: Path, metadata: object) -> None:
    save(tmp_path, "k", derivation())
    text = json.dumps(metadata)
    (tmp_path / "k" / METADATA).write_text(text)
    (tmp_path / "k" / "manifest.json").write_text("{}")  # nothing to check by
    warnings: list[str] = []
    assert load(tmp_path, "k", warnings.append) is None and len(warnings) == 1


def test_a_whole_entry_is_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, "k", derivation(1.0))
    save(tmp_path, "k", derivation(2.0))
    assert same(load(tmp_path, "k"), replace(derivation(1.0), importance=load(tmp_path, "k").importance))
    assert float(load(tmp_path, "k").importance["a.0.q"].rows[0]) == 1.0


def _save_often(folder: Path, damage: bool) -> None:
    for _ in range(10):
        save(folder, "k", derivation())
        if damage:
            (folder / "k" / "manifest.json").unlink(missing_ok=True)


def test_processes_that_save_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_often, args=(tmp_path, i == 0)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    save(tmp_path, "k", derivation())
    verify_folder(tmp_path / "k")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".k.lock", "k"]


def test_keys_depend_on_content_only() -> None:
    assert content_key(a=1, b={"x": [1, 2], "y": None}) == content_key(b={"y": None, "x": [1, 2]}, a=1)
    keys = {content_key(a=1), content_key(a=2), content_key(b=1), content_key(a="1"), content_key(a=[1])}
    assert len(keys) == 5 and all(len(key) == 64 for key in keys)
    for part in (object(), float("nan"), Path("x")):
        with pytest.raises((TypeError, ValueError)):
            content_key(a=part)


def test_a_key_depends_on_the_labels_to_choose_from_and_on_rows_that_are_drawn() -> None:
    """An unused label changes no sample, but which answers are right; rows of new tokens come from the seed."""

    def key(trained: tuple[str, ...] = ("classifier",), seed: int = 0, resized: bool = False, **task: object) -> str:
        model = {"name": "org/base", "resize_embeddings": resized}
        sections = {"model": model, "task": {"name": "custom"} | task, "seed": seed}
        settings = {"name": "partial_lora", "floor_metric": "loss"}
        _, phase = start(settings, trained, **sections)
        return derivation_key(config(settings, **sections), phase, "base", list(TARGETS), [1, 2], [3], {})

    def of_training(**training: object) -> str:
        settings = {"name": "partial_lora", "floor_metric": "loss"}
        _, phase = start(settings, ("classifier",))
        return derivation_key(config(settings, training=training), phase, "base", list(TARGETS), [1, 2], [3], {})

    three = ["no", "yes", "maybe"]
    keys = [key(), key(labels=["no", "yes"]), key(labels=three), key(labels=three, mode="causal_lm")]
    keys += [key(resized=True, seed=seed) for seed in (0, 1)]
    keys += [key(trained=("classifier", "embeddings"))]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    assert of_training(on_oom="shrink", device_memory=2**34) == of_training()
    assert of_training(weight_decay=0.5) != of_training()
    assert key(trained=(), seed=1) == key(trained=())  # samples are drawn by the seed, and are in the key themselves


def test_hashes_of_files_and_samples(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    first = hash_files([a, b])
    assert first == hash_files([b, a]) != hash_files([a])
    b.write_text("3")
    assert hash_files([a, b]) != first

    @dataclass
    class Sample:
        ids: tuple[int, ...]
        label: int | None = None

    samples = [Sample((1, 2), 0), Sample((3,))]
    assert hash_samples(samples) == hash_samples(list(samples)) != hash_samples(samples[::-1])
    assert hash_samples(samples) != hash_samples([Sample((1, 2), 1), Sample((3,))])
    assert hash_samples([{"ids": [1]}]) != hash_samples([])
