"""Who a process is, under each launcher; and who speaks when something is wrong."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from sparse_llm_ft.distributed import exit_status, world
from sparse_llm_ft.distributed.world import World, find_world, own_cores, set_rendezvous
from sparse_llm_ft.errors import PreemptionRequested, TrainingError, UserError, describe_failure, may_pass


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for rank 0 looks at the clock, which no patched `sleep` moves on: the real time would go in a loop."""
    monkeypatch.setattr(exit_status, "_GRACE_SECONDS", 0.05)


def test_alone_it_is_a_world_of_one_with_an_address() -> None:
    environment: dict[str, str] = {}
    assert find_world(environment) == World(0, 1, 0, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


def test_deepspeed_and_torchrun_say_all() -> None:
    assert find_world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}) == World(3, 4, 1, 2)
    assert find_world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == World(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"RANK": "one"}, "RANK: 'one' in the environment; expected a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' in the environment"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: '-1' in the environment"),
        ({"LOCAL_WORLD_SIZE": "2(x2)"}, "LOCAL_WORLD_SIZE: '2(x2)' in the environment"),
        ({"RANK": "4"}, "RANK: 4, and WORLD_SIZE is 4; expected 0 to 3"),
    ],
)
def test_an_environment_that_no_launcher_sets_is_one_line(changed: dict[str, str], line: str) -> None:
    """The last one would wait for others forever."""
    with pytest.raises(UserError, match=re.escape(line)):
        find_world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | changed)


def test_a_world_that_is_completed_is_found_again() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert find_world(environment) == find_world(environment) == World(3, 4, 1, 2)


SLURM_TASK = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "15123",
    "SLURM_STEP_NODELIST": "node[7-8]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_slurm_tasks_find_the_first_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$2" = hostnames ] && { echo node7; echo node8; exit; }\n'
        '[ "$3" = node7 ] && echo "NodeName=node7 NodeAddr=10.0.0.7 State=IDLE"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    slurm = dict(SLURM_TASK)
    assert find_world(slurm) == World(3, 4, 1, 2)
    set_rendezvous(slurm)
    assert (slurm["MASTER_ADDR"], slurm["MASTER_PORT"]) == ("10.0.0.7", "23123")


@pytest.mark.parametrize("body", ["", "#!/bin/sh\necho 'error: Invalid node list' >&2; exit 1\n"])
def test_without_scontrol_ranks_need_the_address(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, whose batch script exports it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if body else str(tmp_path))
    if body:
        (tmp_path / "scontrol").write_text(body)
        (tmp_path / "scontrol").chmod(0o755)
    slurm = dict(SLURM_TASK)
    find_world(slurm)
    with pytest.raises(UserError, match="expected MASTER_ADDR, exported before srun"):
        set_rendezvous(slurm)
    slurm["MASTER_ADDR"] = "head"
    set_rendezvous(slurm)
    assert (slurm["MASTER_ADDR"], slurm["MASTER_PORT"]) == ("head", "23123")


@pytest.mark.parametrize("failures", [2, 9])
def test_a_controller_that_is_away_is_asked_again(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it stays away, the job is tried again: no setting is wrong."""
    pauses: list[float] = []
    monkeypatch.setattr(world, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho >> {calls}\nif [ "$(wc -l < {calls})" -gt {failures} ]; then echo NodeAddr=n7; exit; fi\n'
        "echo 'slurm_load_node error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    slurm = dict(SLURM_TASK)
    find_world(slurm)
    if failures == 2:
        set_rendezvous(slurm)
        assert slurm["MASTER_ADDR"] == "n7" and pauses == [0.0, 2.0, 10.0, 0.0]
        return
    with pytest.raises(TrainingError, match=r"scontrol: .*Unable to contact .*; Slurm's controller may be away"):
        set_rendezvous(slurm)
    assert pauses == [0.0, 2.0, 10.0, 30.0]


@pytest.mark.parametrize(
    ("usable", "processes", "environment", "own"),
    [
        (96, 8, {}, 12),
        (12, 8, {"SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_ON_NODE": "96"}, 12),  # srun has bound them
        (96, 8, {"SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_ON_NODE": "96"}, 12),  # it has not
        (8, 4, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_ON_NODE": "8"}, 2),  # a job of 8 cores of a larger node
        (8, 4, {"SLURM_CPUS_ON_NODE": "96"}, 2),  # torchrun's processes share their task's cores
        (1, 4, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_ON_NODE": "many"}, 1),
    ],
)
def test_processes_divide_the_cores_unless_slurm_has(
    usable: int, processes: int, environment: dict[str, str], own: int
) -> None:
    assert own_cores(usable, processes, environment) == own


def test_a_single_slurm_task_is_alone_and_so_is_the_batch_script_of_a_larger_job() -> None:
    assert find_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}) == World(0, 1, 0, 1)
    assert find_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == World(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("world", "said"),
    [
        (World(0, 4, 0, 2), "error: broken\n"),
        (World(1, 4, 1, 2), ""),
        (World(2, 4, 0, 2), "error: rank 2: broken\n"),
    ],
)
@pytest.mark.parametrize(("error", "status"), [(UserError("broken"), 2), (TrainingError("broken"), 1)])
def test_who_speaks(world, said, error, status, monkeypatch, capsys) -> None:
    waited: list[float] = []
    monkeypatch.setattr(exit_status.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stop, exit_status.one_line_errors(world):
        raise error
    assert stop.value.code == status and capsys.readouterr().err == said
    assert bool(waited) == (world.rank != 0)


@pytest.mark.parametrize(("number", "status"), [(errno.ENOENT, 2), (errno.ESTALE, 1), (errno.EIO, 1)])
def test_a_file_server_that_is_away_is_not_the_users_fault(number: int, status: int) -> None:
    with pytest.raises(SystemExit) as stop, exit_status.one_line_errors(World(0, 1, 0, 1)):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise UserError(f"train.jsonl: not readable ({error.strerror})") from None
    assert stop.value.code == status


@pytest.mark.parametrize(
    ("failure", "passes"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (TimeoutError("too late"), True),
        (socket.gaierror(socket.EAI_AGAIN, "no name server"), True),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), False),
        (FileNotFoundError(errno.ENOENT, "no such file"), False),
    ],
)
def test_a_hub_that_is_away_may_be_back_unless_the_user_has_turned_it_off(failure: Exception, passes: bool) -> None:
    try:
        try:
            raise failure
        except OSError as error:
            raise LocalEntryNotFoundError("not in the cache") from error
    except LocalEntryNotFoundError as error:
        wrong = UserError("model.name: 'me/base' cannot be loaded")
        wrong.__cause__ = error
    assert may_pass(wrong) == passes


@pytest.mark.parametrize(("number", "passes"), [(errno.ENOENT, False), (errno.ESTALE, True), (errno.EIO, True)])
def test_what_another_rank_had_with_its_file_server_is_known_from_its_text(number: int, passes: bool) -> None:
    """At stage 3 one rank of each node reads the base, and the others get its reason."""
    error = OSError(number, os.strerror(number), "model.safetensors")
    assert may_pass(OSError(f"rank 0 (node-1): {describe_failure(error)}")) == passes


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_was_asked_to_leave_says_what_is_saved(rank, name, status, monkeypatch, capsys) -> None:
    """A scheduler starts it again after 75, and not after Ctrl-C."""
    monkeypatch.setattr(exit_status.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stop, exit_status.one_line_errors(World(rank, 2, rank, 2)):
        raise PreemptionRequested(name, "saved step 3")
    assert stop.value.code == status
    assert capsys.readouterr().err == ("" if rank else f"{name}: saved step 3; the same command continues\n")


@pytest.mark.parametrize(
    ("world", "dead", "speaks"),
    [
        (World(0, 4, 0, 2), {3}, True),
        (World(1, 4, 1, 2), {3}, False),
        (World(1, 4, 1, 2), {0}, True),
        (World(2, 4, 0, 2), {0, 3}, True),
        (World(3, 4, 1, 2), {2}, True),
    ],
)
def test_one_survivor_of_each_node_names_the_dead(world, dead, speaks, monkeypatch, capsys) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(exit_status.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(exit_status.os, "_exit", statuses.append)
    exit_status.end_at_once(world, dead, "rank x is gone")
    assert statuses == [1] and capsys.readouterr().err == ("error: rank x is gone\n" if speaks else "")


def test_what_rank_0_has_said_nobody_says_again(monkeypatch, capsys) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(exit_status.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(exit_status.os, "_exit", statuses.append)
    exit_status.end_at_once(World(2, 4, 0, 2), {0}, "rank 0 (n): bad", 2, is_said=True)
    error = UserError("rank 0 (n): bad")
    error.is_shared = True
    with pytest.raises(SystemExit) as stop, exit_status.one_line_errors(World(2, 4, 0, 2)):
        raise error
    assert statuses == [2] and stop.value.code == 2 and capsys.readouterr().err == ""
    with pytest.raises(SystemExit), exit_status.one_line_errors(World(0, 4, 0, 2)):
        raise error
    assert capsys.readouterr().err == "error: rank 0 (n): bad\n"


def test_debug_shows_the_stack_before_the_line(capsys) -> None:
    with pytest.raises(SystemExit), exit_status.one_line_errors(World(0, 1, 0, 1), debug=True):
        raise UserError("a line")
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "test_world.py" in said and said.endswith("\nerror: a line\n")


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interruption_is_one_line(resumes: bool, capsys) -> None:
    with pytest.raises(SystemExit) as stop, exit_status.one_line_errors(World(0, 1, 0, 1), resumes=resumes):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert stop.value.code == 130 and said.startswith("interrupted")
    assert ("the same command continues" in said) == resumes


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_status.one_line_errors(World(0, 1, 0, 1)):
        1 / 0  # noqa: B018
