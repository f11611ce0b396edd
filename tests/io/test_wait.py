"""What takes a while is shown: when, how often, on which rank, and how; loading counts the bytes of its files."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.loading import load_model


class Ticks(threading.Event):
    """The end of a wait, for which a clock runs instead: it ends after `count` looks at it."""

    def __init__(self, clock: list[float], count: int) -> None:
        super().__init__()
        self.clock, self.left, self.looks = clock, count, list[float]()
        self.over = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.looks.append(timeout)
        if self.left == 0:
            self.over.set()
            return True
        self.left -= 1
        self.clock[0] += timeout
        return False


def watch(monkeypatch: pytest.MonkeyPatch, wait: Wait, count: int, *at: object) -> list[float]:
    """Let `count` waiting times pass in the body of `wait`; returns how long each was."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    ticks = wait._ended = Ticks(clock, count)
    with wait:
        if at:
            wait.at(*at)
        assert not wait._console.enabled or ticks.over.wait(10)
    return ticks.looks


def test_a_line_after_two_seconds_and_every_ten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(0)
    assert watch(monkeypatch, Wait(console, "saving step 4"), 0) == [2.0]
    assert capsys.readouterr().out == ""
    assert watch(monkeypatch, Wait(console, "saving step 4"), 3) == [2.0, 10.0, 10.0, 10.0]
    assert capsys.readouterr().out.splitlines() == [f"saving step 4: 0:{s:02d} so far" for s in (2, 12, 22)]


@pytest.mark.parametrize(
    ("unit", "at", "line"),
    [
        ("bytes", (2**31, 2**32, "2/4 tensors"), "loading: 2.0 of 4.0 GiB, 2/4 tensors, 0:02 left"),
        ("layers", (1, 32), "loading: 1/32 layers, 1:02 left"),
        ("layers", (0, 32), "loading: 0:02 so far"),
    ],
)
def test_a_line_says_how_much_is_left(
    unit: str, at: tuple, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    wait = Wait(Console(0), "loading", unit=unit, first=2.0)
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    class Once(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if release.is_set():
                return True
            wait.at(*at)
            clock[0] += 2.0
            release.set()
            return False

    wait._ended = Once()
    with wait:
        assert release.wait(10)
    assert capsys.readouterr().out.splitlines() == [line]


def test_other_ranks_are_silent_and_have_no_thread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch(monkeypatch, Wait(Console(1), "loading"), 3) == []
    assert capsys.readouterr() == ("", "")


def test_commands_with_a_result_wait_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, Wait(Console(0, stderr=True), "exporting"), 1)
    assert capsys.readouterr() == ("", "exporting: 0:02 so far\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_beside_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich allows one display at a time; both are in it, and what was waited for is gone at the end."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    console, seen = Console(0), []
    console.begin("train", 3, 8)
    assert console._bars is not None
    bars = console._bars
    with Wait(console, "saving [step] 4", first=0.0) as wait:
        for _ in range(200):
            if len(bars.tasks) == 2:
                break
            wait._ended.wait(0.05)
        seen = [task.description for task in bars.tasks]
    assert seen == ["train", "saving [step] 4"] and [task.description for task in bars.tasks] == ["train"]
    console.step({"step": 4, "loss": 1.0, "tokens_per_second": 5.0, "active_adapters": 2}, 8)
    assert bars.tasks[0].completed == 4 and bars.tasks[0].fields["status"].startswith("4/8  loss 1.0000")
    console.end()
    assert console._bars is None and bars.finished is False and not bars.live.is_started
    with Wait(console, "exporting", first=0.0):
        pass
    assert console._bars is None


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loading_counts_every_tensor_and_byte_of_the_files(model_folder: Path, quantization: str) -> None:
    stored = [tensor for file in model_folder.glob("*.safetensors") for tensor in load_file(file).values()]
    size, seen = sum(tensor.nbytes for tensor in stored), []

    class Noting(Wait):
        def at(self, done: int, total: int, note: str = "") -> None:
            seen.append((done, total, note))

    config = ModelConfig(name=str(model_folder), dtype="bfloat16", quantization=quantization)
    load_model(config, wait=Noting(Console(1), "loading", unit="bytes"))
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen}) and {
        total for _, total, _ in seen
    } == {size}
    assert seen[-1] == (size, size, f"{len(stored)}/{len(stored)} tensors")
