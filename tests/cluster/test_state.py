"""state.json: what a run says about itself, and how it says its end."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from sparse_llm_ft.cluster import state_writer
from sparse_llm_ft.cluster.state import Reason, RunState, job_id, read_state
from sparse_llm_ft.cluster.state_writer import StateWriter, reason_of_failure
from sparse_llm_ft.distributed import exit_status
from sparse_llm_ft.distributed.world import ONE_PROCESS, World
from sparse_llm_ft.errors import (
    ConfigError,
    DivergedError,
    OutOfMemoryConfigError,
    PreemptionRequested,
    TrainingError,
    UserError,
)

LINE = {"step": 3, "phase": "train", "loss": 2.5, "tokens_per_second": 100.0}


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


def stored(folder: Path) -> RunState:
    found = read_state(folder)
    assert found is not None
    return found


def test_a_state_reads_as_it_was_written(tmp_path: Path) -> None:
    state = RunState(state="failed", reason="killed", step=7, job_id="12_3", failed_nodes=["n1"], loss=0.5)
    state.write(tmp_path)
    assert read_state(tmp_path) == state


def test_without_a_file_there_is_no_state(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"state": "great"}', '{"step": -1}', '{"pid": 1.5}', '{"job_id": "1; rm"}', '{"updated": NaN}'],
)
def test_a_file_that_is_no_state_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json: not "):
        read_state(tmp_path)


def test_the_task_of_an_array_has_the_arrays_number() -> None:
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "7"}) == "7"
    assert job_id({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "7_2"


def test_a_run_that_begins_counts_attempts_and_keeps_hours(tmp_path: Path) -> None:
    for attempt in (1, 2):
        writer = StateWriter(tmp_path, World(0, 4, 0, 4))
        with writer.recorded():
            writer.begin()
            running = stored(tmp_path)
            assert (running.state, running.attempt, running.pid) == ("running", attempt, os.getpid())
            writer._state = writer._present().model_copy(update={"attempt_started": time.time() - 900})  # a quarter
    done = stored(tmp_path)
    assert done.state == "completed" and done.reason is None
    assert done.gpu_hours == pytest.approx(2 * 4 * 0.25, rel=1e-3)


def test_an_attempt_that_the_batch_script_has_counted_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    RunState(state="running", job_id="5", attempt=3, attempt_started=100.0, started=50.0).write(tmp_path)
    StateWriter(tmp_path, ONE_PROCESS).begin()
    now = stored(tmp_path)
    assert (now.attempt, now.attempt_started, now.started) == (3, 100.0, 50.0)


def test_a_thread_writes_progress_and_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_writer, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(state_writer, "BEAT_SECONDS", 0.05)
    writer = StateWriter(tmp_path, ONE_PROCESS)
    with writer.recorded():
        writer.begin()
        writer.step(LINE, 8, logged=True)
        writer.step(LINE | {"step": 4, "loss": 1.0}, 8, logged=False)
        end = time.monotonic() + 30
        while stored(tmp_path).step < 4 and time.monotonic() < end:
            time.sleep(0.01)
        now = stored(tmp_path)
        assert (now.step, now.total_steps, now.loss, now.tokens_per_second) == (4, 8, 2.5, 100.0)
        assert now.seconds_left is not None and now.seconds_left >= 0
        while stored(tmp_path).updated == now.updated and time.monotonic() < end:
            time.sleep(0.01)
        assert stored(tmp_path).updated > now.updated


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, World(1, 2, 1, 2))
    with writer.recorded():
        writer.begin()
        writer.step(LINE, 8, logged=True)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_refused_before_it_has_its_folder_leaves_no_state(tmp_path: Path) -> None:
    with pytest.raises(UserError), StateWriter(tmp_path, ONE_PROCESS).recorded():
        raise UserError("in use by another process")
    assert not list(tmp_path.iterdir())


def caused(cause: OSError) -> UserError:
    error = UserError(f"data: not readable ({cause.strerror})")
    error.__context__ = cause  # as `raise ... from None` leaves it
    return error


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (PreemptionRequested("SIGTERM", "saved step 3"), "preempted", None),
        (KeyboardInterrupt(), "preempted", None),
        (ConfigError("seed", "-1", "expected 0 or more"), "failed", "bad_setting"),
        (caused(OSError(errno.ENOSPC, "No space left on device")), "failed", "bad_setting"),
        (caused(OSError(errno.ESTALE, "Stale file handle")), "failed", "error"),  # the file server restarts
        (DivergedError("step 3 has loss nan"), "failed", "diverged"),
        (MemoryError(), "failed", "out_of_memory"),
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "failed", "out_of_memory"),
        (OutOfMemoryConfigError("training.on_oom", "shrink", "expected less"), "failed", "out_of_memory"),
        (TrainingError("no adapter is left"), "failed", "error"),
        (RuntimeError("gloo"), "failed", "error"),
    ],
)
def test_each_end_has_its_state(error: BaseException, state: str, reason: Reason | None, tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, ONE_PROCESS)
    with pytest.raises(type(error)), writer.recorded():
        writer.begin()
        raise error
    last = stored(tmp_path)
    assert (last.state, last.reason) == (state, reason)


def test_torchs_own_error_is_out_of_memory() -> None:
    import torch

    assert reason_of_failure(torch.OutOfMemoryError("CUDA out of memory")) == "out_of_memory"


def test_a_lack_of_memory_says_what_would_be_right(tmp_path: Path) -> None:
    class OutOfMemoryError(RuntimeError):
        """Named as torch's."""

    for error, advice in (
        (OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "a smaller training.micro_batch_size"),
        (MemoryError(), "submit with --sbatch=--mem=0"),
    ):
        writer = StateWriter(tmp_path, ONE_PROCESS)
        with pytest.raises(type(error)), writer.recorded():
            writer.begin()
            raise error
        assert advice in stored(tmp_path).message


def test_the_death_of_another_rank_is_recorded_before_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the collective's own error was recorded first."""
    monkeypatch.setattr(exit_status.os, "_exit", lambda status: None)
    writer = StateWriter(tmp_path, World(0, 2, 0, 1))
    with pytest.raises(RuntimeError), writer.recorded():
        writer.begin()
        raise RuntimeError("gloo")
    exit_status.end_at_once(World(0, 2, 0, 1), {1}, "rank 1 (n2) stopped answering")
    exit_status.call_before_end(None)
    last = stored(tmp_path)
    assert (last.reason, last.message) == ("node_failure", "rank 1 (n2) stopped answering")


def test_a_disk_that_hangs_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(exit_status.os, "_exit", left.append)
    monkeypatch.setattr(exit_status, "_GRACE_SECONDS", 0.05)
    never = threading.Event()
    exit_status.call_before_end(lambda text: never.wait(60) and None)
    exit_status.end_at_once(World(0, 2, 0, 1), {1}, "rank 1 is dead")
    exit_status.call_before_end(None)
    never.set()
    assert left == [exit_status.TRAINING_ERROR]


def test_a_full_disk_is_logged_once_and_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StateWriter(tmp_path, ONE_PROCESS)
    with writer.recorded():
        writer.begin()

        def full(self: RunState, folder: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(RunState, "write", full)
        writer._write()
        writer._write()
    assert caplog.text.count("the run's state cannot be written") == 1


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    RunState().write(tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "pending"
