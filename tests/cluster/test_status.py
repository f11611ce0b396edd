"""What a run is doing, from its own word, Slurm's and this host's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cluster.slurm import Job
from sparse_llm_ft.cluster.state import RunState
from sparse_llm_ft.cluster.status import find_runs, judge
from sparse_llm_ft.distributed.world import node_name
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import RunFolder

NOW = 1_000_000.0
FRESH = RunState(state="running", updated=NOW - 5, host="elsewhere", pid=1, step=3)
STALE = FRESH.updated_by(updated=NOW - 500)
LEFT = FRESH.ended("preempted", "SIGUSR2: saved step 3")


@pytest.mark.parametrize(
    ("state", "job", "word", "alive"),
    [
        (FRESH, None, "running", True),
        (STALE, None, "failed: killed", False),
        (STALE, Job("RUNNING"), "running", True),  # it loads, or Slurm has not seen yet that it is dead
        (STALE, Job("PENDING", "BeginTime"), "pending", True),  # requeued after its node had failed
        (STALE, Job("NODE_FAIL"), "failed: node failure", False),
        (STALE, Job("TIMEOUT"), "failed: timeout", False),
        (STALE, Job("OUT_OF_MEMORY"), "failed: out of memory", False),
        (FRESH, Job("CANCELLED by 1000"), "failed: cancelled", False),
        (FRESH, Job("FAILED"), "failed: killed", False),
        (LEFT, None, "preempted", False),
        (LEFT, Job("PENDING", "BeginTime"), "pending", True),
        (LEFT, Job("RUNNING"), "running", True),
        (LEFT, Job("COMPLETING"), "preempted", True),
        (LEFT, Job("CANCELLED"), "failed: cancelled", False),
        (LEFT, Job("COMPLETED"), "preempted", False),
        (RunState(), Job("PENDING", "Priority"), "pending", True),
        (RunState(), None, "pending", False),
        (FRESH.failed("diverged", "loss nan"), Job("FAILED"), "failed: diverged", False),
    ],
)
def test_a_run_is(state: RunState, job: Job | None, word: str, alive: bool, tmp_path: Path) -> None:
    view = judge(RunFolder(tmp_path), state, job, NOW)
    assert (view.word, view.is_alive) == (word, alive)


def test_a_pending_run_says_what_it_waits_for_and_until_when(tmp_path: Path) -> None:
    noon = datetime(2026, 3, 4, 12, 0, 0)

    def note(reason: str, start: datetime | None) -> str:
        return judge(RunFolder(tmp_path), LEFT, Job("PENDING", reason, "", start), noon.timestamp()).note

    held = "waits for BeginTime (Slurm holds a requeued job back for some two minutes)"
    assert note("BeginTime", noon + timedelta(minutes=2)) == f"{held}, not before 12:02:00"
    tomorrow = noon + timedelta(days=1)
    assert note("Resources", tomorrow) == (
        "waits for Resources (no free nodes yet), expected to begin at 2026-03-05 12:00"
    )
    assert note("QOSMaxJobsPerUserLimit", None) == "waits for QOSMaxJobsPerUserLimit"
    assert note("ReqNodeNotAvail, UnavailableNodes:n2", None).endswith(
        "UnavailableNodes:n2 (its nodes are down or reserved)"
    )
    assert note("", None) == "waits for its turn"


def test_a_run_that_is_requeued_after_its_node_says_so(tmp_path: Path) -> None:
    """Its batch script died with the node, so the file still says that it runs."""
    view = judge(RunFolder(tmp_path), FRESH.updated_by(nodes="n[1-2]"), Job("PENDING", "BeginTime"), NOW)
    assert view.state is not None
    assert view.state.message == "its last attempt died on n[1-2]: a node failed, or it was killed"


def test_slurms_out_of_memory_says_what_would_be_right(tmp_path: Path) -> None:
    view = judge(RunFolder(tmp_path), STALE, Job("OUT_OF_MEMORY", "", "n2"), NOW)
    assert view.state is not None
    assert view.state.message.startswith("Slurm says OUT_OF_MEMORY on n2; expected more memory for the job")


def test_a_process_of_this_host_that_is_gone_is_dead_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    mine = FRESH.updated_by(host=node_name(), pid=process.pid)
    assert judge(RunFolder(tmp_path), mine, None, NOW).word == "failed: killed"
    assert judge(RunFolder(tmp_path), mine.updated_by(pid=os.getpid()), None, NOW).word == "running"


def test_a_complete_folder_is_complete_whatever_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "summary.json").write_text("{}")
    assert judge(RunFolder(tmp_path), STALE, Job("TIMEOUT"), NOW).word == "completed"


def test_runs_are_found_at_any_depth_and_not_within_runs(tmp_path: Path) -> None:
    for name in ("b", "a/deep", "a/deep/slurm/inner", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        RunState().write(tmp_path / name)
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)  # of an earlier release
    (tmp_path / "old" / "config.yaml").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = [folder.path.relative_to(tmp_path).as_posix() for folder in find_runs(tmp_path)]
    assert found == ["a/deep", "b", "old"]
    with pytest.raises(UserError, match="no such folder"):
        list(find_runs(tmp_path / "nowhere"))


def test_the_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    running = {"total_steps": 240, "loss": 2.5, "tokens_per_second": 1234.0, "seconds_left": 75.0, "gpu_hours": 1.5}
    FRESH.updated_by(updated=time.time(), **running).write(tmp_path / "one")
    FRESH.failed("out_of_memory", "CUDA out of memory").write(tmp_path / "two")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "state.json").write_text("[")
    main(["status", "."])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "state", "step", "loss", "tokens/s", "left", "GPU-hours"]
    assert lines[1] == ["one", "running", "3/240", "2.5000", "1,234", "1:15", "1.50"]
    assert lines[2] == ["three", "unknown"]
    assert lines[3] == ["two", "failed:", "out", "of", "memory"]
    assert ["two:", "CUDA", "out", "of", "memory"] in lines


@pytest.mark.parametrize("arguments", [["status", "nowhere"], ["status", "."], ["cancel", "nowhere"], ["cancel", "."]])
def test_what_is_no_run_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_has_ended_cannot_be_cancelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LEFT.write(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["cancel", str(tmp_path)])
    assert end.value.code == 2
    assert "expected a run that is pending or running" in capsys.readouterr().err
