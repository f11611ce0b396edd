"""What follows the end of an attempt: try again, or stop for good and name the node."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_llm_ft.cli import cluster_commands
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cluster import attempts
from sparse_llm_ft.cluster.job_folder import allow_attempts, forbid_attempts
from sparse_llm_ft.cluster.slurm import Job
from sparse_llm_ft.cluster.state import RunState, read_state
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import RunFolder

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}
DEAD = "srun: error: n2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
LEFT_TASK = "srun: error: n1: task 0: Exited with exit code 75\nsrun: launch/slurm: Terminating StepId=7.0\n"
ENDED_BY_SRUN = "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n4: task 3: Terminated\n"

LOST = {"state": "failed", "reason": "node_failure", "message": "rank 1 (n2) stopped answering"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def state(folder: RunFolder) -> RunState:
    found = read_state(folder.path)
    assert found is not None
    return found


def run_to(folder: RunFolder, step: int, **changes: object) -> None:
    """An attempt that has begun in the job, and whose run has come to `step`."""
    assert attempts.begin(folder, JOB).status == 0
    state(folder).updated_by(step=step, pid=1, **changes).write(folder.path)


def log(folder: RunFolder, text: str) -> Path:
    path = folder.job / "7.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{DEAD.replace('n2', 'n9')}{attempts.MARK}2 of the run\n{text}")
    return path


def complete(folder: RunFolder) -> None:
    folder.adapter.mkdir(parents=True)
    (folder.path / "summary.json").write_text("{}")


def test_an_attempt_begins(folder: RunFolder) -> None:
    verdict = attempts.begin(folder, JOB)
    assert verdict.line == f"{attempts.MARK}1 of {folder.path}, job 7 on n[1-2]"
    now = state(folder)
    assert (now.state, now.job_id, now.nodes, now.host, now.attempt) == ("running", "7", "n[1-2]", "n1", 1)


def test_a_run_that_left_is_tried_again_whatever_the_launcher_says(folder: RunFolder) -> None:
    for _ in range(5):  # as often as it takes
        run_to(folder, 3, state="preempted", message="SIGUSR2: saved step 3")
        assert attempts.end(folder, 143).status == 75


def test_a_run_that_left_before_it_trained_is_tried_again(folder: RunFolder) -> None:
    assert attempts.begin(folder, JOB).status == 0
    assert attempts.end(folder, 75).status == 75
    assert state(folder).state == "preempted"


def test_failures_before_and_after_a_save_are_not_in_a_row(folder: RunFolder) -> None:
    run_to(folder, 900, **LOST)
    assert attempts.end(folder, 1).status == 75
    run_to(folder, 700, state="preempted", message="SIGUSR2: saved step 700")
    assert attempts.end(folder, 75).status == 75
    run_to(folder, 880, **LOST)
    assert attempts.end(folder, 1).status == 75
    run_to(folder, 700, state="preempted", message="SIGTERM: nothing new to save")  # it did not get on
    assert attempts.end(folder, 75).status == 75
    run_to(folder, 880, **LOST)
    assert attempts.end(folder, 1).status == 1


@pytest.mark.parametrize("slurm_says", ["RUNNING", "COMPLETING", "COMPLETED", None, "no answer"])
def test_a_second_job_leaves_a_running_one_alone(
    slurm_says: str | None, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_jobs(ids: list[str]) -> dict[str, Job]:
        if slurm_says == "no answer":
            raise UserError("squeue: no answer")
        return {} if slurm_says is None else {ids[0]: Job(slurm_says)}

    monkeypatch.setattr(attempts, "find_jobs", find_jobs)
    run_to(folder, 500)
    before = (folder.path / "state.json").read_text()
    verdict = attempts.begin(folder, JOB | {"SLURM_JOB_ID": "8"})
    if slurm_says != "RUNNING":  # that job is gone: its attempt counts as a failure
        assert verdict.status == 0 and state(folder).failures == 1
        return
    assert (verdict.status, verdict.line) == (
        2,
        f"{folder.path} is trained by job 7; expected its end, or `cancel`",
    )
    assert (folder.path / "state.json").read_text() == before and not (folder.job / "stopped").exists()
    monkeypatch.setattr(attempts, "find_jobs", lambda ids: pytest.fail("it is the same job, requeued"))
    assert attempts.begin(folder, JOB).status == 0


def test_a_file_server_that_is_away_is_asked_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a verdict the job would end for good, though its run may have saved everything."""
    pauses: list[float] = []
    monkeypatch.setattr(cluster_commands, "time", SimpleNamespace(sleep=pauses.append))
    replies = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    begin = attempts.begin

    def away(*args: Any, **options: Any) -> attempts.Verdict:
        if replies:
            raise replies.pop(0)
        return begin(*args, **options)

    monkeypatch.setattr(attempts, "begin", away)
    with pytest.raises(SystemExit) as left:
        main(["attempt", "begin", str(folder.path)])
    assert left.value.code == 0 and pauses == [5.0, 20.0]
    assert "Stale file handle; asking again in 5 s" in capsys.readouterr().out
    replies[:] = [OSError(errno.ENOSPC, "No space left on device")]
    with pytest.raises(SystemExit) as left:
        main(["attempt", "begin", str(folder.path)])
    assert left.value.code == 2 and len(pauses) == 2


@pytest.mark.parametrize("prefix", ["", "[default0]:", "n1: "])
def test_a_run_that_left_while_it_loaded_is_no_failure_under_any_launcher(prefix: str, folder: RunFolder) -> None:
    """torchrun and deepspeed end with 1, srun with the status of the tasks that it killed."""
    for _ in range(3):
        assert attempts.begin(folder, JOB).status == 0
        said = f"{prefix}SIGTERM: nothing new to save; the same command continues\n"
        assert attempts.end(folder, 143, log(folder, said + LEFT_TASK + DEAD)).status == 75
    assert (state(folder).state, state(folder).failures) == ("preempted", 0)
    assert attempts.begin(folder, JOB).status == 0
    assert attempts.end(folder, 137, log(folder, said + DEAD)).status == 75
    assert (state(folder).reason, state(folder).failures) == ("killed", 1)  # srun asked because a task was killed


def test_a_complete_run_is_complete(folder: RunFolder) -> None:
    run_to(folder, 3)
    complete(folder)
    assert attempts.end(folder, 1).status == 0
    assert state(folder).state == "completed"


@pytest.mark.parametrize("reason", ["bad_setting", "diverged", "out_of_memory"])
def test_what_would_end_the_same_way_is_not_tried_again(reason: str, folder: RunFolder) -> None:
    run_to(folder, 3, state="failed", reason=reason, message="because")
    assert attempts.end(folder, 1).status not in (0, 75)
    assert (folder.job / "stopped").read_text().startswith(f"failed ({reason}): because")
    assert attempts.begin(folder, JOB).status == 2


def test_two_deaths_at_one_step_stop_the_job_and_name_the_nodes(folder: RunFolder) -> None:
    run_to(folder, 5)
    first = attempts.end(folder, 137, log(folder, DEAD + ENDED_BY_SRUN))
    assert first.status == 75 and "after step 5 on n2" in first.line
    assert (state(folder).reason, state(folder).failed_nodes) == ("killed", ["n2"])
    run_to(folder, 4)  # it did not get past step 5
    second = attempts.end(folder, 137, log(folder, DEAD.replace("n2", "n3")))
    assert second.status == 1
    assert second.line.startswith("stopped: 2 attempts in a row failed after step 4, on n2 and n3; ")
    assert attempts.begin(folder, JOB).status == 2


def test_progress_between_two_deaths_lets_the_run_go_on(folder: RunFolder) -> None:
    for step in (5, 6, 7):
        run_to(folder, step)
        assert attempts.end(folder, 137, log(folder, DEAD)).status == 75
    assert state(folder).failures == 1


def test_a_node_that_fails_with_the_batch_script_is_counted_when_the_next_attempt_begins(folder: RunFolder) -> None:
    run_to(folder, 5)
    run_to(folder, 5)
    assert (state(folder).failures, state(folder).failed_nodes) == (1, ["n[1-2]"])
    assert attempts.begin(folder, JOB).status == 2
    assert "stopped: 2 attempts in a row failed after step 5, on n[1-2]; its node failed" in state(folder).message


def test_a_failure_that_the_batch_script_did_not_live_to_count_is_counted_once(folder: RunFolder) -> None:
    """Rank 0 names the dead rank; then Slurm finds that the node is down, and requeues the job."""
    run_to(folder, 5, **LOST)
    assert attempts.begin(folder, JOB).status == 0
    assert (state(folder).failures, state(folder).attempt) == (1, 2)
    state(folder).updated_by(step=5, pid=1, **LOST).write(folder.path)
    assert attempts.end(folder, 1).status == 1  # the second one at that step
    assert attempts.begin(folder, JOB).status == 2
    assert state(folder).failures == 2


def test_jobs_that_are_requeued_while_they_load_are_no_failures(folder: RunFolder) -> None:
    for _ in range(4):
        assert attempts.begin(folder, JOB).status == 0
    assert (state(folder).failures, state(folder).attempt) == (0, 4)


def test_a_bad_setting_takes_its_line_from_the_log(folder: RunFolder) -> None:
    assert attempts.begin(folder, JOB).status == 0
    text = "loading\nerror: model.name: '/gone' is no folder; expected one\nsrun: error: n1: task 0: Exited\n"
    attempts.end(folder, 2, log(folder, text))
    assert (state(folder).reason, state(folder).message) == (
        "bad_setting",
        "model.name: '/gone' is no folder; expected one",
    )


CGROUP = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
POLLED = "slurmstepd: error: StepId=7.0 exceeded memory limit (2101198848 > 2097152000), being killed\n"


@pytest.mark.parametrize(
    ("text", "before", "message"),
    [
        (f"{CGROUP}srun: error: n2: task 1: Out Of Memory\n", {}, "a process on n2 used more memory than"),
        (f"{POLLED}srun: error: n2: task 1: Killed\n", LOST, "a process on n2 used more memory than"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: 8 bytes\n", LOST, "a process used more memory"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", LOST, "a GPU had too little memory; expected a smaller"),
    ],
)
def test_out_of_memory_is_read_from_the_log(text: str, before: dict[str, str], message: str, folder: RunFolder) -> None:
    run_to(folder, 3, **before)
    assert attempts.end(folder, 1, log(folder, text)).status == 1
    assert state(folder).reason == "out_of_memory"
    assert state(folder).message.startswith(message) and "`sparse-llm-ft plan` says what" in state(folder).message


def test_a_step_that_was_made_again_in_less_memory_is_not_why_a_node_failed(folder: RunFolder) -> None:
    run_to(folder, 9, **LOST)
    text = "step 4 ran out of memory and is made again: micro-batch 2\n"
    assert attempts.end(folder, 1, log(folder, text)).status == 75
    assert state(folder).reason == "node_failure"


def test_a_cancelled_run_is_not_tried_again_by_this_job_nor_by_the_next_of_a_chain(folder: RunFolder) -> None:
    run_to(folder, 3, state="preempted", message="SIGTERM: saved step 3")
    forbid_attempts(folder, "cancelled")
    assert attempts.end(folder, 143).status == 2
    assert attempts.begin(folder, JOB).line == "cancelled; `sparse-llm-ft submit` starts it again"


def test_submitting_again_lets_attempts_begin(folder: RunFolder) -> None:
    run_to(folder, 3, state="failed", reason="diverged")
    attempts.end(folder, 1)
    allow_attempts(folder, "second")
    assert attempts.begin(folder, JOB, "second").status == 0


def test_what_an_earlier_submit_left_in_the_queue_does_not_start_the_run_again(folder: RunFolder) -> None:
    """The rest of a chain, whose run was cancelled and then submitted again."""
    allow_attempts(folder, "first")
    assert attempts.begin(folder, JOB, "first").status == 0
    allow_attempts(folder, "second")
    assert attempts.begin(folder, JOB | {"SLURM_JOB_ID": "9"}, "second").status == 0
    before = state(folder)
    verdict = attempts.begin(folder, JOB | {"SLURM_JOB_ID": "8"}, "first")
    assert verdict.status == 2 and verdict.line.endswith("was submitted again; job 8, of an earlier `submit`, ends")
    assert state(folder) == before
    assert attempts.begin(folder, JOB).status == 0  # a script that somebody has made by hand carries no mark


@pytest.mark.parametrize("text", ["", "[", "{}[", "[]", '{"state": "asleep"}'])
def test_a_damaged_state_is_written_anew(text: str, folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "state.json").write_text(text)
    assert attempts.begin(folder, JOB).status == 0
    (folder.path / "state.json").write_text(text)
    assert attempts.end(folder, 1).status == 75
    assert (state(folder).state, state(folder).reason) == ("failed", "error")


def test_a_line_about_hundreds_of_nodes_or_of_any_length_can_be_recorded(folder: RunFolder) -> None:
    nodes = "".join(f"srun: error: node{i:04}: tasks {i}: Out Of Memory\n" for i in range(400))
    run_to(folder, 5, state="failed", reason="error", message="because")
    assert attempts.end(folder, 1, log(folder, nodes)).status == 1
    assert state(folder).reason == "out_of_memory"
    run = RunFolder(folder.path.parent / "other")
    assert attempts.begin(run, JOB | {"SLURM_JOB_NODELIST": "n" * 5000}).status == 0
    dead = nodes.replace("Out Of Memory", "Killed")
    assert attempts.end(run, 1, log(run, f"error: {'x' * 3000} the end\n{dead}")).status == 75
    assert len(state(run).message) <= 1010 and len(state(run).failed_nodes[0]) <= 2000


@pytest.mark.parametrize("text", ["x" * 5000, "\u2028" * 2000])
def test_a_message_of_any_length_fits(text: str) -> None:
    """A line may name hundreds of dead ranks; escaped characters are longer than they were."""
    for told in (RunState().failed("error", text), RunState().ended("preempted", text)):
        assert RunState.model_validate(told.model_dump()).message == told.message


@pytest.mark.parametrize(
    ("run", "line"),
    [("", "error: attempt: no run folder; expected"), ("file/run", "error: file/run: its state cannot be kept (")],
)
def test_an_attempt_that_cannot_be_recorded_is_one_line(
    run: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for moment in ("begin", "end"):
        with pytest.raises(SystemExit) as end:
            main(["attempt", moment, run])
        printed = capsys.readouterr().err
        assert (end.value.code, printed.count("\n")) == (2, 1) and printed.startswith(line), printed
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
