"""The report while a run trains: drawn beside it, at most once a minute, and replaced by one that does not reload."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from helpers.run_folders import weight_lora_plus_run
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.report import is_live
from sparse_llm_ft.run_folder import RunFolder
from sparse_llm_ft.training import report_writer
from sparse_llm_ft.training.report_writer import REFRESH_SECONDS, ReportWriter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(report_writer.time, "monotonic", lambda: now[0])
    return now


class Drawings:
    """Stands in for `write_report`, and draws as long as it is not released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reloads: list[int | None] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        monkeypatch.setattr(report_writer, "write_report", self)

    def __call__(self, folders: list[Path], output: Path, reload: int | None) -> None:
        self.threads.add(threading.get_ident())
        self.reloads.append(reload)
        assert self.go.wait(10)


def test_a_save_draws_beside_the_training_once_a_minute(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = Drawings(monkeypatch)
    writer = ReportWriter(RunFolder(tmp_path), Console(1), wanted=True)
    writer.refresh()  # a run shorter than a minute has its report at the end
    clock[0] += REFRESH_SECONDS
    writer.refresh()  # returns while it is drawn
    clock[0] += REFRESH_SECONDS
    writer.refresh()  # the other one is still drawn
    drawings.go.set()
    assert writer._thread is not None
    writer._thread.join()
    clock[0] += REFRESH_SECONDS - 1
    writer.refresh()
    writer._thread.join()
    assert drawings.reloads == [REFRESH_SECONDS] * 2 and threading.get_ident() not in drawings.threads
    writer.finish()
    assert drawings.reloads[2:] == [None] and threading.get_ident() in drawings.threads


def test_only_who_is_to_draw_draws(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = Drawings(monkeypatch)
    writer = ReportWriter(RunFolder(tmp_path), Console(1), wanted=False)
    clock[0] += REFRESH_SECONDS
    writer.refresh()
    writer.finish()
    writer.finish_late()
    assert not drawings.reloads


def test_a_report_that_cannot_be_drawn_is_one_line_and_ends_nothing(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    writer = ReportWriter(RunFolder(tmp_path), Console(0), wanted=True)  # no run is there
    for _ in range(2):
        clock[0] += REFRESH_SECONDS
        writer.refresh()
        assert writer._thread is not None
        writer._thread.join()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the report could not be drawn (UserError: ") and "no config.yaml" in line


def test_a_forecast_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk is full, and the adapter is there."""

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    ReportWriter(RunFolder(tmp_path), Console(0), wanted=True, prepare=refuse).finish()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the report could not be drawn (OSError: [Errno 28] No space left on device); the run")


def test_the_page_of_a_running_run_reloads_itself_and_the_last_one_does_not(tmp_path: Path, clock: list[float]) -> None:
    folder = RunFolder(weight_lora_plus_run(tmp_path / "run", layers=2, finished=False))
    writer = ReportWriter(folder, Console(1), wanted=True)
    clock[0] += REFRESH_SECONDS
    writer.refresh()
    assert writer._thread is not None
    writer._thread.join()
    page = (folder.report / "index.html").read_text()
    assert is_live(folder.report) and f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' in page
    assert "The run is not finished; last logged step: 180." in page
    writer.finish_late()  # as if the run had been killed after its summary
    assert not is_live(folder.report)
    drawn = (folder.report / "index.html").stat().st_mtime_ns
    writer.finish_late()
    assert (folder.report / "index.html").stat().st_mtime_ns == drawn
