"""What is printed for nobody is dropped; every other failure stays one."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from sparse_llm_ft.io.output import outlived


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def test_a_pipe_without_reader_is_noticed_once_and_takes_all_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    noticed: list[int] = []
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with outlived(lambda: noticed.append(1)):
            say("heard\n")
            assert os.read(read, 100) == b"heard\n"
            os.close(read)
            for _ in range(3):
                say("x" * 100_000)
            assert noticed == [1]
        assert sys.stdout is stream
        stream.flush()  # as the interpreter does at its end


def test_a_full_disk_is_an_error_still(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OSError) as error, outlived(lambda: None):
            say("more")
        assert error.value.errno == errno.ENOSPC
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_a_process_without_standard_output_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with outlived(lambda: None):
        assert sys.stdout is None
