"""A folder has one owner, on file systems with the kernel's locks and on those without."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparse_llm_ft.io import folder_lock
from sparse_llm_ft.io.content_cache import ContentCache
from sparse_llm_ft.io.folder_lock import OWNER_FILE, FolderLock


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def own(folder: Path, host: str, pid: int, age: float = 0.0) -> None:
    """A file that another process has left, last touched `age` seconds ago."""
    path = folder / OWNER_FILE
    path.write_text(json.dumps({"host": host, "pid": pid, "since": 0}))
    os.utime(path, (time.time() - age,) * 2)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_kernel_s_lock_leaves_no_owner_s_file(tmp_path: Path) -> None:
    FolderLock(tmp_path).acquire()
    assert not (tmp_path / OWNER_FILE).exists()


def test_without_flock_the_second_is_refused(tmp_path: Path, no_flock: None) -> None:
    first = FolderLock(tmp_path)
    first.acquire()
    assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == os.getpid()
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        FolderLock(tmp_path).acquire()
    first.release()
    FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("age", [59.0, 90.0])
def test_another_host_s_is_stale_without_a_beat(tmp_path: Path, no_flock: None, age: float) -> None:
    """Its process was killed, perhaps a moment ago: the next job of a chain begins on another node."""
    own(tmp_path, "elsewhere", 1, age)
    FolderLock(tmp_path).acquire()


def test_another_host_s_next_beat_keeps_the_folder(tmp_path: Path, no_flock: None) -> None:
    own(tmp_path, "elsewhere", 1, 30.0)
    beat = threading.Timer(1.0, os.utime, [tmp_path / OWNER_FILE])
    beat.start()
    with pytest.raises(BlockingIOError, match="process 1 on elsewhere"):
        FolderLock(tmp_path).acquire()
    beat.join()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", OWNER_FILE}


def test_whoever_waits_gets_the_folder_when_it_is_free(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    first.acquire()
    threading.Timer(0.7, first.release).start()
    began = time.monotonic()
    FolderLock(tmp_path).wait()
    assert time.monotonic() - began > 0.6


def test_a_dead_process_of_this_host_holds_nothing(tmp_path: Path, no_flock: None) -> None:
    own(tmp_path, socket.gethostname(), dead_pid())
    FolderLock(tmp_path).acquire()


def test_the_owner_touches_its_file(tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.01)
    FolderLock(tmp_path).acquire()
    os.utime(tmp_path / OWNER_FILE, (0, 0))
    end = time.monotonic() + 10
    while not (tmp_path / OWNER_FILE).stat().st_mtime:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        FolderLock(tmp_path).acquire()


def test_a_cache_is_written_without_flock(tmp_path: Path, no_flock: None) -> None:
    def read(folder: Path) -> str:
        return (folder / "text").read_text()

    cache = ContentCache(tmp_path / "cache", read)
    cache.write("key", lambda folder: Path(folder / "text").write_text("made") and None)
    assert cache.load("key") == "made"
    assert {path.name for path in cache.folder.iterdir()} <= {"key", ".key.lock"}  # nobody holds it any more
    # A job that was killed on another node while it wrote an entry holds nothing.
    (cache.folder / ".other.lock-owner").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(cache.folder / ".other.lock-owner", (time.time() - 90,) * 2)
    cache.write("other", lambda folder: Path(folder / "text").write_text("made") and None)
    assert cache.load("other") == "made"
