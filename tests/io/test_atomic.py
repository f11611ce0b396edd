"""Writers that meet: several processes at one file, a folder that appears meanwhile, and what killed ones leave."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparse_llm_ft.io import atomic
from sparse_llm_ft.io.atomic import (
    draft_of,
    new_folder,
    remove_dead_drafts,
    verify_folder,
    write_file,
    write_folder,
    write_new_folder,
)

_TEXTS = [letter * 50_000 for letter in "abc"]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def left_by_killed(target: Path) -> Path:
    """The name of a draft whose process is dead."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return target.with_name(f".tmp-{target.name}@{atomic._host()}-{process.pid}.{process.pid}")


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """A run's folder has two writers while `submit` says "pending" and a job begins."""
    target = tmp_path / "state.json"
    script = (
        "import sys\nfrom pathlib import Path\nfrom sparse_llm_ft.io.atomic import write_file\n"
        "for _ in range(60): write_file(Path(sys.argv[1]), sys.argv[2] * 50_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(target), text[0]]) for text in _TEXTS]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert target.read_text() in _TEXTS and names(tmp_path) == ["state.json"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    target, folder = tmp_path / "state.json", tmp_path / "export"
    left_by_killed(target).write_text("half")
    left_by_killed(folder).mkdir()
    elsewhere = tmp_path / ".tmp-export@another.host-7.7"
    elsewhere.mkdir()
    write_file(target, "whole")
    remove_dead_drafts(folder)
    assert sorted(names(tmp_path)) == [elsewhere.name, "state.json"]


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "quota exceed")]
)
def test_an_error_leaves_what_was_there_and_nothing_else(number: int, said: str, tmp_path: Path) -> None:
    """A disk that is full stays full of half a checkpoint otherwise."""
    target = tmp_path / "step-1"
    write_folder(target, lambda folder: (folder / "a").write_text("old") and None)

    def fill(folder: Path) -> None:
        (folder / "a").write_text("half of a checkpoint")
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=f"{said}.*: '{target}'"):
        write_folder(target, fill)
    verify_folder(target)
    assert (target / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_draft_of_another_target_is_not_touched(tmp_path: Path) -> None:
    for name in ("export-merged", "export@home"):
        other = left_by_killed(tmp_path / name)
        other.mkdir()
        remove_dead_drafts(tmp_path / "export")
        assert other.is_dir()


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "there" / "export"

    def fill(folder: Path) -> None:
        remove_dead_drafts(target)
        assert not target.exists() and folder.is_dir()
        (folder / "a").write_text("1")

    write_new_folder(target, fill)
    verify_folder(target, required=["a"])
    assert names(target.parent) == ["export"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appeared_meanwhile_stays(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "export"
    with pytest.raises(FileExistsError, match="came into being meanwhile"), new_folder(target) as draft:
        (draft / "ours").touch()
        if kind == "folder":
            target.mkdir()
            (target / "notes.txt").write_text("a user's")
        else:
            target.write_text("a user's")
    kept = target / "notes.txt" if kind == "folder" else target
    assert kept.read_text() == "a user's" and names(tmp_path) == ["export"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "export") as draft:
        (draft / "half").touch()
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), draft_of(tmp_path / "push"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_an_earlier_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    """A container's first process has the same number whenever it starts."""
    draft = tmp_path / f".tmp-export@{atomic._host()}-{os.getpid()}.{threading.get_native_id()}"
    (draft / "files").mkdir(parents=True)
    write_new_folder(tmp_path / "export", lambda folder: (folder / "a").touch())
    assert sorted(names(tmp_path / "export")) == ["a", "manifest.json"] and names(tmp_path) == ["export"]


def test_no_process_has_a_number_beyond_all(tmp_path: Path) -> None:
    odd = tmp_path / f".tmp-state.json@{atomic._host()}-99999999999999999999.1"
    odd.touch()
    write_file(tmp_path / "state.json", "{}")
    assert names(tmp_path) == ["state.json"]
