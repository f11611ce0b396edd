"""`submit` and Slurm's commands, played by small scripts on PATH."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cluster import slurm
from sparse_llm_ft.cluster.batch_script import JobOptions
from sparse_llm_ft.cluster.cancel import cancel
from sparse_llm_ft.cluster.slurm import Job, find_jobs
from sparse_llm_ft.cluster.state import RunState, read_state
from sparse_llm_ft.cluster.status import view_runs
from sparse_llm_ft.cluster.submission import Submission
from sparse_llm_ft.config import load_config
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import RunFolder

OPTIONS = JobOptions(nodes=2, gpus_per_node=0, tasks_per_node=1, time="10:00")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that comes first on PATH; `sbatch` gives numbers from 100 on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    play(folder, "sbatch", f'echo "$@" >> {folder}/calls; echo $((99 + $(wc -l < {folder}/calls)))')
    play(folder, "sinfo", "echo debug*; echo gpu")
    play(folder, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    play(folder, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    return folder


def play(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def config_file(settings: dict, tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def submission(settings: dict, tmp_path: Path, options: JobOptions = OPTIONS) -> Submission:
    config = load_config([config_file(settings, tmp_path)])
    return Submission(Path(config.output_dir), [config], options, is_sweep=False)


def test_a_submitted_run_is_pending_and_its_settings_are_fixed(settings: dict, tmp_path: Path, commands: Path) -> None:
    job = submission(settings, tmp_path)
    job.check()
    assert job.submit() == ["100"]
    folder = RunFolder(job.folder)
    state = read_state(folder.path)
    assert state is not None and (state.state, state.job_id) == ("pending", "100")
    assert load_config([str(folder.job / "config.yaml")]) == job.runs[0]
    assert os.access(folder.job / "run.sbatch", os.X_OK)
    folder.check(job.runs[0])  # the job itself may begin there
    assert "sparse-llm-ft cancel" in "\n".join(job.next_steps(["100"]))


def test_a_job_does_not_inherit_the_ranks_of_the_shell_that_submits_it(
    settings: dict, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("MINE", "kept")
    play(
        commands, "sbatch", 'echo "${MASTER_ADDR:-}${RANK:-}${SLURM_CPU_BIND:-}$MINE" > ' + f"{commands}/seen; echo 100"
    )
    submission(settings, tmp_path).submit()
    assert (commands / "seen").read_text() == "kept\n"


def test_a_chain_is_jobs_after_each_other(settings: dict, tmp_path: Path, commands: Path) -> None:
    job = submission(settings, tmp_path, JobOptions(2, 0, 1, "10:00", chain=3))
    assert job.submit() == ["100", "101", "102"]
    calls = (commands / "calls").read_text().splitlines()
    assert [call.count("--dependency=afterany:") for call in calls] == [0, 1, 1]
    assert "afterany:101" in calls[2]


def test_a_chain_of_which_slurm_refuses_a_job_leaves_none(settings: dict, tmp_path: Path, commands: Path) -> None:
    """As QOSMaxSubmitJobPerUserLimit does."""
    many = f"[ $(wc -l < {commands}/calls) -le 2 ] || {{ echo 'sbatch: error: QOSMaxSubmit' >&2; exit 1; }}"
    play(commands, "sbatch", f'echo "$@" >> {commands}/calls; {many}; echo $((99 + $(wc -l < {commands}/calls)))')
    play(commands, "scancel", f'echo "$@" >> {commands}/gone')
    job = submission(settings, tmp_path, JobOptions(2, 0, 1, "10:00", chain=5))
    with pytest.raises(UserError, match=r"^sbatch: QOSMaxSubmit; the 2 jobs before it are cancelled"):
        job.submit()
    assert (commands / "gone").read_text() == "101\n100\n"
    play(commands, "sbatch", f'echo "$@" >> {commands}/more; [ $(wc -l < {commands}/more) = 1 ] && echo 200')
    play(commands, "scancel", "exit 1")
    with pytest.raises(UserError, match=r"its first jobs are left: scancel 200 \("):
        job.submit()


def test_between_the_jobs_of_a_chain_a_run_is_pending_and_can_be_cancelled(
    settings: dict, tmp_path: Path, commands: Path
) -> None:
    """Where the queue is long, that is most of the time."""
    job = submission(settings, tmp_path, JobOptions(2, 0, 1, "10:00", chain=3))
    job.submit()
    run = RunFolder(job.folder)
    state = read_state(run.path)
    assert state is not None
    state.updated_by(state="preempted", message="SIGUSR2: saved step 3", pid=1).write(run.path)
    waiting = [f"grep -q {n} {commands}/gone || echo '{n}|PENDING|Priority||N/A|'" for n in (101, 102)]
    play(commands, "squeue", "\n".join(["echo '100|FAILED|None|n1|N/A|'", f"touch {commands}/gone", *waiting]))
    play(commands, "scontrol", "echo JobId=101 BatchFlag=1")
    play(commands, "scancel", f'echo "$@" >> {commands}/gone')
    (view,) = view_runs([run])
    assert (view.word, view.is_alive, view.job_id, view.later_ids) == ("pending", True, "101", ("102",))
    with pytest.raises(UserError, match=r"is pending \(job 101\)"):
        job.check()
    cancel(run)
    assert (commands / "gone").read_text() == "102\n101\n"
    (view,) = view_runs([run])
    assert (view.word, view.is_alive) == ("failed: cancelled", False)


def test_a_second_sweep_in_a_folder_leaves_the_first_one_its_runs(
    settings: dict, tmp_path: Path, commands: Path
) -> None:
    """Tasks of the first array read their folder when they begin, which may be later."""
    (config,) = submission(settings, tmp_path).runs
    scripts = []
    for names in (["a", "b", "c"], ["d"]):
        runs = [config.model_copy(update={"output_dir": str(tmp_path / "sweep" / name)}) for name in names]
        sweep = Submission(tmp_path / "sweep", runs, OPTIONS, is_sweep=True)
        sweep.check()
        assert f"cancel:  scancel {(jobs := sweep.submit())[0]} " in "\n".join(sweep.next_steps([*jobs, "7"]))
        scripts.append((tmp_path / "sweep" / "slurm" / "run.sbatch").read_text())
    for script, task, name in ((scripts[0], 2, "c"), (scripts[1], 0, "d")):
        (line,) = [line for line in script.splitlines() if line.startswith("run=")]
        command = f'SLURM_ARRAY_TASK_ID={task}; {line}; echo "$run"'
        found = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, timeout=30)
        assert found.stdout == f"{tmp_path}/sweep/{name}\n", found.stderr


@pytest.mark.parametrize("text", ["[", "{}", ""])
def test_jobs_that_slurm_has_taken_are_told_whatever_state_json_holds(
    text: str, settings: dict, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submission(settings, tmp_path)
    job.folder.mkdir()
    (job.folder / "state.json").write_text(text)
    assert job.submit() == ["100"]
    state = read_state(job.folder)
    assert state is not None and state.job_id == "100"

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_llm_ft.cluster.submission.write_jobs", refuse)
    assert job.submit() == ["101"]
    assert "does not say yet that it is pending ([Errno 28] No space" in "\n".join(job.next_steps(["101"]))


def test_the_script_carries_its_submit_s_mark_and_that_of_a_dry_run_none(
    settings: dict, tmp_path: Path, commands: Path
) -> None:
    job = submission(settings, tmp_path)
    assert '--submission ""' in job.script()
    job.submit()
    script = (job.folder / "slurm" / "run.sbatch").read_text()
    assert f'attempt begin "$run" --submission "{job.mark}"' in script
    assert (job.folder / "slurm" / "submission").read_text() == f"{job.mark}\n"


def test_a_run_in_an_allocation_that_stays_can_be_cancelled_and_is_then_over(tmp_path: Path, commands: Path) -> None:
    """As in `salloc`: the job is its user's shell, and lives on."""
    run, began = RunFolder(tmp_path / "run"), "2026-03-04T12:00:00"
    at = datetime.fromisoformat(began).timestamp() + 600
    running = RunState(state="running", job_id="7", host="n1", pid=1, updated=at, step=3)
    running.write(run.path)
    left = tmp_path / "left.json"
    left.write_text(running.ended("preempted", "SIGTERM: saved step 3").model_dump_json())
    play(commands, "squeue", f"echo '7|RUNNING|None|n1|{began}|'")
    play(commands, "scontrol", "echo JobId=7 BatchFlag=0")
    play(commands, "scancel", f'echo "$@" > {commands}/asked; cp {left} {run.path}/state.json')
    assert cancel(run, wait=5.0).endswith("cancelled (SIGTERM: saved step 3)")
    assert (commands / "asked").read_text() == "--signal=TERM 7\n"
    (view,) = view_runs([run])
    assert (view.word, view.is_alive) == ("failed: cancelled", False)
    again = running.ended("preempted").updated_by(updated=at - 1200)  # the job has begun since: it is starting
    again.write(run.path)
    (view,) = view_runs([run])
    assert (view.word, view.is_alive) == ("running", True)


def test_a_pending_run_whose_job_slurm_has_forgotten_says_so(tmp_path: Path, commands: Path) -> None:
    run = RunFolder(tmp_path / "run")
    RunState(job_id="7").write(run.path)
    (view,) = view_runs([run])
    assert (view.word, view.is_alive) == ("pending", False)
    assert view.note == "Slurm does not know job 7 any more: it ended before the run began"


def test_submitting_counts_failures_anew(settings: dict, tmp_path: Path, commands: Path) -> None:
    job = submission(settings, tmp_path)
    RunState(state="failed", reason="killed", failed_step=5, failures=2, failed_nodes=["n1"], step=5).write(job.folder)
    job.submit()
    state = read_state(job.folder)
    assert state is not None and (state.failures, state.failed_step, state.failed_nodes, state.step) == (0, None, [], 5)


def test_a_run_that_is_in_a_job_already_is_refused(settings: dict, tmp_path: Path, commands: Path) -> None:
    job = submission(settings, tmp_path)
    RunState(job_id="7").write(job.folder)
    play(commands, "squeue", 'echo "7|PENDING|Priority||N/A|"')
    with pytest.raises(UserError, match=r"is pending \(job 7\); wait for it, or `sparse-llm-ft cancel`"):
        job.check()


def test_a_run_that_could_not_be_resumed_is_refused(settings: dict, tmp_path: Path, commands: Path) -> None:
    with pytest.raises(UserError, match="resume: never, but a job that is requeued"):
        submission(settings | {"resume": "never"}, tmp_path).check()


def test_a_complete_run_is_refused_and_left_out_of_a_sweep(settings: dict, tmp_path: Path, commands: Path) -> None:
    job = submission(settings, tmp_path)
    RunState(state="completed").write(job.folder)
    (job.folder / "adapter").mkdir()
    (job.folder / "summary.json").write_text("{}")
    other = job.runs[0].model_copy(update={"output_dir": str(tmp_path / "other")})
    sweep = Submission(tmp_path / "sweep", [*job.runs, other], OPTIONS, is_sweep=True)
    sweep.check()
    assert (sweep.runs, sweep.skipped, sweep.tasks) == ([other], [job.folder], 1)
    with pytest.raises(UserError, match="is complete"):
        job.check()


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo 'sbatch: error: invalid partition specified: x' >&2; exit 1", "sbatch: invalid partition specified: x"),
        ("echo hello", "sbatch: answered 'hello'; expected the number of a job"),
        ("exit 3", "sbatch: exit status 3"),
    ],
)
def test_what_sbatch_refuses_is_one_line_and_nothing_is_pending(
    script: str, line: str, settings: dict, tmp_path: Path, commands: Path
) -> None:
    play(commands, "sbatch", script)
    job = submission(settings, tmp_path)
    with pytest.raises(UserError) as refused:
        job.submit()
    assert str(refused.value) == line
    assert read_state(job.folder) is None


def test_a_command_that_does_not_answer_is_given_up(
    settings: dict, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "SECONDS", 0.2)
    play(commands, "sinfo", "exec sleep 60")
    with pytest.raises(UserError, match="sinfo: no answer within"):
        slurm.partitions()


def test_jobs_are_looked_for_in_the_queue_and_then_in_accounting(commands: Path) -> None:
    rows = (
        "7|RUNNING|None|n[1-2]|2026-03-04T12:00:00|",
        "8_1|PENDING|BeginTime||2026-03-04T12:02:00|",
        "8_2|RUNNING|None|n3|2026-03-04T12:00:00|",
    )
    play(commands, "squeue", "\n".join(f"echo '{row}'" for row in rows))
    play(commands, "sacct", f'echo "$@" > {commands}/asked; echo "5|CANCELLED by 0|n1"; echo "6|NODE_FAIL|n2"')
    assert find_jobs({"5", "6", "7", "8_1"}) == {
        "5": Job("CANCELLED", "", "n1"),
        "6": Job("NODE_FAIL", "", "n2"),
        "7": Job("RUNNING", "", "n[1-2]", datetime(2026, 3, 4, 12)),
        "8_1": Job("PENDING", "BeginTime", "", datetime(2026, 3, 4, 12, 2)),
    }
    assert "7" not in (commands / "asked").read_text().partition("--jobs=")[2]


def test_commands_answer_where_there_is_no_sacct(
    settings: dict, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (commands / "sacct").unlink()
    monkeypatch.setenv("PATH", str(commands))
    run = RunFolder(tmp_path / "run")
    RunState(state="running", job_id="7", host="n1", nodes="n1", pid=1, updated=1.0).write(run.path)
    (view,) = view_runs([run])
    assert view.word == "failed: killed" and view.note == ""
    with pytest.raises(UserError, match="failed: killed; expected a run that is pending or running"):
        cancel(run)
    submission(settings, tmp_path).check()


def test_where_slurm_does_not_answer_status_says_so_and_cancel_refuses(tmp_path: Path, commands: Path) -> None:
    play(commands, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    run = RunFolder(tmp_path / "run")
    RunState(state="running", job_id="7", host="elsewhere", pid=1, updated=4e9).write(run.path)
    (view,) = view_runs([run])
    assert view.note == "Slurm was not asked: squeue: slurm_load_jobs error: Unable to contact slurm controller"
    with pytest.raises(UserError, match=r"runs on elsewhere in job 7, which Slurm does not know here \(Slurm was not"):
        cancel(run)


def test_cancelling_keeps_the_next_jobs_of_a_chain_from_starting_it_again(tmp_path: Path, commands: Path) -> None:
    play(commands, "squeue", f"[ -e {commands}/gone ] || echo '7|RUNNING|None|n1|N/A|'")
    play(commands, "scontrol", "echo JobId=7 BatchFlag=1 Reboot=0")
    play(commands, "scancel", f"touch {commands}/gone")
    run = RunFolder(tmp_path / "run")
    RunState(state="running", job_id="7", host="n1", pid=1, updated=1.0).write(run.path)
    cancel(run)
    state = read_state(run.path)
    assert state is not None and (state.state, state.reason) == ("failed", "cancelled")
    assert (run.job / "stopped").read_text().startswith("cancelled; ")


def test_without_slurm_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_jobs({"7"}) == {}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--partition", "fast"], "error: --partition fast: unknown; expected one of debug, gpu"),
        (["--time", "soon"], "error: --time soon: expected HH:MM:SS"),
        (["--sweep", "method.rank=1,2"], "error: method.rank: unknown key"),
        (["--sweep", "seed=1,x"], "error: seed: "),
        (["--nodes", "two"], "error: argument --nodes"),
        (["training.steps=3"], "error: training.steps: unknown key"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_imported(
    options: list[str],
    line: str,
    settings: dict,
    tmp_path: Path,
    commands: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = ["submit", "--config", config_file(settings, tmp_path), "--gpus-per-node", "0", "--tasks-per-node", "1"]
    with pytest.raises(SystemExit) as end:
        main([*needed, "--time", "10:00", *options])
    printed = capsys.readouterr().err
    assert (end.value.code, printed.count("\n")) == (2, 1) and printed.startswith(line), printed
    assert not (commands / "calls").exists()


def test_without_slurm_a_dry_run_prints_the_script(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    needed = ["submit", "--config", config_file(settings, tmp_path), "--gpus-per-node", "1", "--time", "10:00"]
    with pytest.raises(SystemExit) as end:
        main(needed)
    assert end.value.code == 2 and "sinfo: not found" in capsys.readouterr().err
    main([*needed, "--dry-run", "--sweep", "seed=0,1"])
    printed = capsys.readouterr().out
    assert "#SBATCH --array=0-1" in printed and f"{settings['output_dir']}/seed-1: 40 training samples" in printed
    assert not Path(settings["output_dir"]).exists()


def test_a_prompt_that_begins_like_a_path_is_none(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings["task"]["prompt"] = f"/no_think {'think little ' * 30} {{text}}"
    needed = ["submit", "--config", config_file(settings, tmp_path), "--gpus-per-node", "1", "--time", "10:00"]
    for container in ([], ["--container", "org/image"]):
        main([*needed, "--dry-run", *container])
        assert "#SBATCH" in capsys.readouterr().out


def test_a_run_whose_plan_does_not_fit_is_not_submitted(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    needed = ["submit", "--config", config_file(settings, tmp_path), "--gpus-per-node", "1", "--time", "10:00"]
    with pytest.raises(SystemExit) as end:
        main([*needed, "--gpu-memory", "1MiB"])
    printed = capsys.readouterr().err
    # A line before it may say that imports take a while.
    assert end.value.code == 2 and "error: --gpu-memory 1.0 MiB: phase train needs" in printed.splitlines()[-1], printed
    assert not (commands / "calls").exists()
    main([*needed, "--gpu-memory", "80GiB", "--dry-run"])
    assert "planned memory of each GPU: phase train " in capsys.readouterr().out
