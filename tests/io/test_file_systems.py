"""What file systems and terminals of clusters lack: syncs of folders, a umask of one's own, characters."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import save_checkpoint
from sparse_llm_ft.io import atomic


def fill(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    (folder / "b.json").write_text("{}")


def test_a_folder_that_cannot_be_synced_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CIFS and sshfs: EINVAL for folders. Files must still be synced."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(atomic, "_warned", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            atomic.write_folder(tmp_path / "target", fill)
            atomic.write_file(tmp_path / "file", "text")
    atomic.verify_folder(tmp_path / "target")
    (record,) = caplog.records
    assert "cannot sync folders" in record.getMessage()


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        atomic.write_folder(tmp_path / "target", fill)


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    """safetensors makes files with mode 0600, whatever the umask: a colleague in the group could not read them."""
    before = os.umask(umask)
    try:
        atomic.write_folder(tmp_path / "target", fill)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "target").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize(("encoding", "written"), [("latin-1", b"\xe9\\u4f60\n"), ("utf-8", "é你\n".encode())])
def test_output_that_cannot_be_encoded_is_escaped(encoding: str, written: bytes) -> None:
    script = "from sparse_llm_ft.io.console import escape_unencodable\nescape_unencodable()\nprint('\\xe9\\u4f60')"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (result.returncode, result.stdout) == (0, written)
    assert result.stderr.count(b"PYTHONIOENCODING=utf-8") == (encoding == "latin-1")


@pytest.fixture
def silly_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: a folder from which an open file was removed is not empty. Here, each folder in which there was one."""
    rmdir = os.rmdir

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if Path(path).name.startswith(("step-", ".old-")):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", refuse)


def test_an_old_checkpoint_that_a_process_has_mapped_ends_no_run(tmp_path: Path, silly_renames: None) -> None:
    for step in (1, 2, 3, 4):
        state = TrainState({"a.lora_A": torch.ones(2)}, {}, {"adapter": step}, Progress(step, step, 0, step), {})
        save_checkpoint(tmp_path, state, keep=2)
    kept = [path.name for path in sorted(tmp_path.iterdir()) if any(path.iterdir())]
    assert kept == ["step-00000003", "step-00000004"]


def test_a_folder_whose_older_one_is_open_is_replaced_all_the_same(tmp_path: Path, silly_renames: None) -> None:
    for _ in range(3):
        atomic.write_folder(tmp_path / "target", fill)
    atomic.verify_folder(tmp_path / "target")
