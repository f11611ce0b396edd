"""Checkpoints: whole or not there, checksummed, free of pickle."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_llm_ft.checkpoint import state as state_module
from sparse_llm_ft.checkpoint import store
from sparse_llm_ft.checkpoint.record import PhaseRecord, RunRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import checkpoint_folder, newest_state, newest_valid, save_checkpoint
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import CheckpointError, TrainingError
from sparse_llm_ft.io import atomic, strict_json_yaml
from sparse_llm_ft.io.atomic import verify_folder, write_folder
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.run_folder import RunFolder

PHASE = Phase("train", AdapterPlan({"a": ModuleAdapter(2, 4.0), "b": None})).with_batch(2, 8)


def make_state(step: int = 3) -> TrainState:
    tensors = {"a.lora_A": torch.randn(2, 3), "a.lora_omega": torch.tensor([0.1234567])}
    moments = {"a.lora_A": {"exp_avg": torch.randn(2, 3), "exp_avg_sq": torch.rand(2, 3)}}
    current = PhaseRecord.of(PHASE, None, parameters=7, optimizer_bytes=56).model_copy(update={"steps": step})
    record = RunRecord(run="mine", samples="", micro_batch_size=2, before={"loss": 1.5}, current=current)
    return TrainState(
        tensors, moments, {"adapter": step}, Progress(step, 8 * step, 0, step), PHASE.to_dict(), {"kept": []}, record
    )


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    state = make_state()
    state.save(tmp_path / "c")
    loaded = TrainState.load(tmp_path / "c")
    assert all(torch.equal(loaded.tensors[n], t) for n, t in state.tensors.items())
    assert torch.equal(loaded.moments["a.lora_A"]["exp_avg_sq"], state.moments["a.lora_A"]["exp_avg_sq"])
    for name in ("optimizer_steps", "progress", "phase", "callback", "record"):
        assert getattr(loaded, name) == getattr(state, name)
    assert {p.suffix for p in (tmp_path / "c").iterdir()} == {".safetensors", ".json"}


@pytest.mark.usefixtures("process_group")
def test_a_resumed_run_reads_and_hashes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, hashed, read = RunFolder(tmp_path / "run"), [], []
    for step in (3, 6):
        save_checkpoint(run.checkpoints, make_state(step), keep=None)
    sha256, load_file = atomic._sha256, state_module.load_file
    monkeypatch.setattr(atomic, "_sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    monkeypatch.setattr(state_module, "load_file", lambda path: (read.append(path.name), load_file(path))[1])
    state = newest_state(run, "mine", World(0, 1, 0, 1), Console(1), None)
    assert state is not None and state.progress.step == 6
    assert sorted(hashed) == ["state.json", "tensors.safetensors"] and read == ["tensors.safetensors"]


@pytest.mark.parametrize("agreed", [6, 3])
def test_only_a_rank_that_goes_by_another_checkpoint_reads_a_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agreed: int
) -> None:
    """A rank of which rank 0's choice is not known: it takes that choice, whatever lies beside it."""
    run, read = RunFolder(tmp_path), []
    for step in (3, 6):
        save_checkpoint(run.checkpoints, make_state(step), keep=None)
    load_file = state_module.load_file
    monkeypatch.setattr(state_module, "load_file", lambda path: (read.append(path.parent.name), load_file(path))[1])
    monkeypatch.setattr(store, "run_long_on_rank_zero", lambda world, action: None)
    monkeypatch.setattr(store, "run_on_every_rank", lambda action, hint: action())
    monkeypatch.setattr(store, "broadcast_int", lambda value: agreed)
    state = newest_state(run, "mine", World(1, 2, 1, 2), Console(1), None)
    assert state is not None and state.progress.step == agreed
    assert read == [f"step-{agreed:08d}"]


def damage_truncate(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def damage_flip(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_missing(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_escape(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["../outside"] = {"bytes": 0, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damage_truncate, "tensors.safetensors has"),
        (damage_flip, "tensors.safetensors differs from its checksum"),
        (damage_manifest, "manifest.json is not readable"),
        (damage_missing, "state.json is missing"),
        (damage_escape, "../outside is missing or not a plain file"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, damage, what: str) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, make_state(step), keep=None)
    damage(checkpoint_folder(tmp_path, 6))
    newest, complaints = newest_valid(tmp_path)
    assert newest is not None and newest.folder == checkpoint_folder(tmp_path, 3)
    assert len(complaints) == 1 and "step-00000006" in complaints[0] and what in complaints[0]


@pytest.mark.parametrize("read", ["manifest.json", "state.json"])
def test_a_checkpoint_that_a_run_removes_meanwhile_gives_way_to_a_newer_one(
    tmp_path: Path, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate` hashes gigabytes while the run goes on, and keeps its newest checkpoints alone."""
    save_checkpoint(tmp_path, make_state(3), keep=None)
    hashed = atomic._sha256

    def trains_on(path: Path) -> str:
        monkeypatch.setattr(atomic, "_sha256", hashed)
        save_checkpoint(tmp_path, make_state(6), keep=None)
        shutil.rmtree(checkpoint_folder(tmp_path, 3))
        if read == "manifest.json":
            return hashed(path)
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(atomic, "_sha256", trains_on)
    newest, complaints = newest_valid(tmp_path)
    assert newest is not None and newest.folder == checkpoint_folder(tmp_path, 6) and complaints == []


def test_a_link_to_nowhere_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_state(3), keep=None)
    checkpoint_folder(tmp_path, 6).symlink_to(tmp_path / "nowhere")
    newest, complaints = newest_valid(tmp_path)
    assert newest is not None and newest.folder == checkpoint_folder(tmp_path, 3)
    assert len(complaints) == 1 and "a link, not a folder" in complaints[0]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    """Every eighth byte of every file; what a flip in the manifest does not touch need not be found."""
    for step in (3, 6):
        save_checkpoint(tmp_path, make_state(step), keep=None)
    path = checkpoint_folder(tmp_path, 6) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        newest, complaints = newest_valid(tmp_path)
        if name == "manifest.json" and not complaints:
            assert json.loads(path.read_bytes()) == json.loads(whole)  # it was white space
            continue
        assert newest.step == 3 and "step-00000006" in complaints[0], place


def test_a_checkpoint_of_another_run_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    own, other = make_state(3), make_state(6)
    other.record.run = "theirs"
    for state in (own, other):
        save_checkpoint(tmp_path, state, keep=None)
    newest, complaints = newest_valid(tmp_path, run="mine")
    assert newest is not None and newest.folder == checkpoint_folder(tmp_path, 3)
    assert len(complaints) == 1 and "step-00000006: belongs to a run with other settings" in complaints[0]
    own.progress.step = 6
    save_checkpoint(tmp_path, own, keep=None)  # the foreign one is in the way, and replaced
    newest, complaints = newest_valid(tmp_path, run="mine")
    assert newest is not None and newest.step == 6 and not complaints


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("where", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_server_that_is_away_makes_no_checkpoint_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    """The run would begin anew at an older one, or be refused for good."""
    run = RunFolder(tmp_path)
    for step in (3, 6):
        save_checkpoint(run.checkpoints, make_state(step), keep=None)

    for module, name in ((atomic, "read_json"), (state_module, "read_json"), (state_module, "load_file")):
        read = {"read_json": strict_json_yaml.read_json, "load_file": load_file}[name]
        monkeypatch.setattr(module, name, partial(_unless_away, read, where, number))
    with pytest.raises(
        TrainingError, match=rf"step-00000006.*{os.strerror(number)}.*; the file system or the hub may be away"
    ):
        newest_state(run, "mine", World(0, 1, 0, 1), Console(1), None)


def _unless_away(read: Callable[..., object], where: str, number: int, path: Path, **options: bool) -> object:
    if path.name == where:
        raise OSError(number, os.strerror(number), str(path))
    return read(path, **options)


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_is_there_whenever_the_process_that_replaces_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one, of a step that is saved again: with what a validation found, or a smaller micro-batch."""
    run, again, renamed = RunFolder(tmp_path), make_state(3), []
    save_checkpoint(run.checkpoints, make_state(3), keep=None)
    again.record.before = {"loss": 1.0}
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        save_checkpoint(run.checkpoints, again, keep=None)
    assert renamed == ["step-00000003", ".tmp-step-00000003"] and newest_valid(run.checkpoints) == (None, [])
    state = newest_state(run, "mine", World(0, 1, 0, 1), Console(1), None)
    assert state is not None and state.progress.step == 3 and state.record.before == {"loss": 1.5}


@pytest.mark.parametrize("where", ["tensors", "moments", "callback_tensors"])
def test_values_that_are_not_finite_are_never_saved(tmp_path: Path, where: str) -> None:
    """A checkpoint that holds one is not read again."""
    state = make_state(3)
    state.callback_tensors = {"a.lora_A": torch.ones(2, 3)}
    held = state.moments["a.lora_A"] if where == "moments" else getattr(state, where)
    next(iter(held.values()))[0, 1] = torch.nan
    with pytest.raises(TrainingError, match=r"step 3 is not saved: a.lora_A or a moment of it is not finite"):
        save_checkpoint(tmp_path, state, keep=None)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_format_is_refused_even_with_good_checksums(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        (path / "state.json").write_text("[]")
        (path / "tensors.safetensors").write_bytes(b"")

    write_folder(tmp_path / "c", fill)
    with pytest.raises(
        CheckpointError, match=r"format None, written by an unknown release; this release .* reads format 3"
    ):
        TrainState.load(tmp_path / "c")


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    make_state(3).save(tmp_path / "c")

    def fail(path: Path) -> None:
        (path / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "c", fail)
    assert TrainState.load(tmp_path / "c").progress.step == 3
    make_state(4).save(tmp_path / "c")
    assert TrainState.load(tmp_path / "c").progress.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_state_that_cannot_be_used_is_replaced_by_the_next_save_although_its_checksums_are_good(
    tmp_path: Path,
) -> None:
    """Otherwise every restart would do the same steps again and never save them."""
    broken = make_state(3)
    broken.phase = {"name": "from another release"}
    broken.save(checkpoint_folder(tmp_path, 3))
    assert newest_valid(tmp_path)[0] is None
    save_checkpoint(tmp_path, make_state(3), keep=None)
    newest, _ = newest_valid(tmp_path)
    assert newest is not None and newest.step == 3


def test_damaged_folders_of_later_steps_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (90, 100, 110):
        save_checkpoint(tmp_path, make_state(step), keep=None)
    for step in (100, 110):
        damage_flip(checkpoint_folder(tmp_path, step))
    save_checkpoint(tmp_path, make_state(95), keep=2)
    assert [int(p.name[5:]) for p in sorted(tmp_path.iterdir())] == [90, 95, 100, 110]


def test_only_the_newest_are_kept_and_a_good_one_is_not_rewritten(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    written = (checkpoint_folder(tmp_path, 3) / "tensors.safetensors").stat().st_mtime_ns
    save_checkpoint(tmp_path, make_state(3), keep=2)
    assert (checkpoint_folder(tmp_path, 3) / "tensors.safetensors").stat().st_mtime_ns == written
    verify_folder(checkpoint_folder(tmp_path, 3))
