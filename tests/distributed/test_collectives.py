"""What fails on rank 0 is one error on every rank; on disks that are really full or read-only."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import newest_valid, save_checkpoint
from sparse_llm_ft.distributed import collectives, signals
from sparse_llm_ft.distributed.collectives import run_long_on_rank_zero, run_on_local_leaders, run_on_rank_zero
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.engine import engine
from sparse_llm_ft.errors import PreemptionRequested, TrainingError, UserError
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter

ALONE = World(0, 1, 0, 1)
PHASE = Phase("train", AdapterPlan({"a": ModuleAdapter(2, 4.0)})).with_batch(2, 8)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def save(checkpoints: Path, step: int, values: int) -> None:
    tensors = {"a.lora_A": torch.ones(values)}
    state = TrainState(tensors, {}, {"adapter": step}, Progress(step, 8 * step, 0, step), PHASE.to_dict())
    run_on_rank_zero(ALONE, lambda: save_checkpoint(checkpoints, state, keep=None))


def fill(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=16k", disk], check=True)


def protect(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("values", "change", "reason"),
    [(10**6, None, "No space left on device"), (10, fill, "No space left on device"), (10, protect, "Read-only")],
)
def test_a_save_that_fails_is_one_line_and_leaves_the_last_checkpoint(
    small_disk: Path, values: int, change: Callable[[Path], None] | None, reason: str
) -> None:
    save(small_disk, 3, 10)
    if change:
        change(small_disk)
    with pytest.raises(UserError, match=reason) as failure:
        save(small_disk, 6, values)
    assert "\n" not in str(failure.value)
    newest, complaints = newest_valid(small_disk)
    assert newest is not None and newest.step == 3 and not complaints
    del newest  # its tensors are mapped from the disk, which `failure` would keep from being unmounted


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What this rank told the others; rank 2 has failed first."""
    told: list[Exception | None] = []

    def first_failure(own: Exception | None) -> str:
        told.append(own)
        return "rank 2 (n2): disk full"

    monkeypatch.setattr(collectives, "first_failure", first_failure)
    return told


@pytest.mark.parametrize(("kind", "error"), [(2, UserError), (3, TrainingError)])
def test_the_others_stop_with_the_same_exit_status_and_the_reason(
    kind: int, error: type, reasons: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "_worst", lambda own: kind)
    with pytest.raises(error, match=r"^rank 2 \(n2\): disk full$") as failure:
        run_on_rank_zero(World(1, 2, 1, 2), lambda: None)
    assert failure.value.is_shared and reasons == [None]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("error", [TrainingError("diverged"), ZeroDivisionError("ours")])
def test_what_is_not_the_users_keeps_its_type_on_rank_0(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_on_rank_zero(ALONE, fail)


def meetings(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], threading.Event]:
    """What this rank tells the others, and an event of the third time that it does."""
    told: list[int] = []
    third = threading.Event()

    def meet(own: int) -> int:
        told.append(own)
        if len(told) == 3:
            third.set()
        return own

    monkeypatch.setattr(collectives, "_worst", meet)
    return told, third


def test_ranks_meet_while_a_node_leader_works(monkeypatch: pytest.MonkeyPatch) -> None:
    told, go = meetings(monkeypatch)
    monkeypatch.setattr(collectives, "exit_if_preempted", lambda: None)
    run_on_local_leaders(World(0, 2, 0, 2), lambda: go.wait() and None, what="reading", every=0.05)
    assert told[:3] == [1, 1, 1] and told[-1] == 0


def test_ranks_meet_while_a_large_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal does not cut it off: it is what the run leaves behind."""
    told, go = meetings(monkeypatch)
    monkeypatch.setattr(signals, "_caught", {signals.SIGNALS[0]})
    run_long_on_rank_zero(World(0, 2, 0, 2), lambda: go.wait() and None, every=0.05)
    assert told[:3] == [1, 1, 1] and told[-1] == 0
    seen = iter([1, 1, 0])
    monkeypatch.setattr(collectives, "_worst", lambda own: next(seen))
    run_long_on_rank_zero(World(1, 2, 0, 1), lambda: pytest.fail("rank 0 alone does it"))


@pytest.mark.usefixtures("reasons")
def test_a_leader_that_works_ends_when_another_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(collectives, "_worst", lambda own: 2)
    with pytest.raises(UserError, match="rank 2"):
        run_on_local_leaders(World(0, 2, 0, 1), lambda: go.wait() and None, every=0.05)
    go.set()


def test_a_rank_that_is_asked_to_leave_need_not_wait_for_a_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(collectives, "_worst", lambda own: own)
    monkeypatch.setattr(signals, "_caught", {signals.SIGNALS[0]})
    with pytest.raises(PreemptionRequested, match="SIGTERM"):
        run_on_local_leaders(World(0, 2, 0, 2), lambda: go.wait() and None, every=0.05)
    go.set()


@pytest.mark.parametrize(
    ("raised", "worst", "expected", "message"),
    [
        (UserError("row 7"), 2, UserError, "row 7"),
        (OSError(28, "No space left on device"), 2, UserError, "No space left"),
        (
            OSError(116, "Stale file handle"),
            3,
            TrainingError,
            "Stale file handle; the file system or",
        ),
        (SafetensorError("I/O error: Input/output error (os error 5)"), 3, TrainingError, "the file system or"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, UserError, "No space left"),
        (ZeroDivisionError("ours"), 3, ZeroDivisionError, "ours"),
    ],
)
def test_what_fails_on_a_node_leader_ends_it_as_it_is(
    raised: Exception, worst: int, expected: type, message: str, reasons: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(collectives, "_worst", lambda own: told.append(own) or own)

    def fail() -> None:
        raise raised

    with pytest.raises(expected, match=message):
        run_on_local_leaders(World(2, 4, 0, 2), fail)
    assert told == [worst] and message in str(reasons[0])


@pytest.mark.usefixtures("reasons")
@pytest.mark.parametrize(("worst", "expected"), [(2, "UserError"), (3, "TrainingError")])
def test_what_fails_on_one_node_leader_ends_all(worst: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_worst", lambda own: worst)
    for world in (World(0, 4, 0, 2), World(1, 4, 1, 2)):
        with pytest.raises(Exception, match="rank 2") as failure:
            run_on_local_leaders(world, lambda: None)
        assert type(failure.value).__name__ == expected


REASONS = """
import sys
from datetime import timedelta
import torch.distributed as dist
from sparse_llm_ft.distributed.collectives import first_failure
from sparse_llm_ft.errors import UserError
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", timedelta(seconds=60), 2, rank)
for failures in ((None, None), (None, UserError("ours ü")), (KeyError("first"), UserError("second"))):
    print(first_failure(failures[rank]))
"""


def test_every_rank_hears_of_the_first_that_has_failed_and_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REASONS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    node = node_name()
    expected = f"None\nrank 1 ({node}): ours ü\nrank 0 ({node}): KeyError: 'first'\n"
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [expected] * 2


WORLD_OF_TWO = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.distributed.collectives import run_on_local_leaders
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", timedelta(seconds=2), 2, rank)
run_on_local_leaders(World(rank, 2, rank, 2), lambda: time.sleep(5), every=0.5)
print("met")
"""


def test_a_leader_may_work_longer_than_the_process_group_waits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORLD_OF_TWO]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["met\n"] * 2


def test_a_group_that_the_caller_joined_stays(process_group: None) -> None:
    """Several runs in one process: DeepSpeed keeps the group it first saw, and fails with another one."""
    with engine.process_group():
        pass
    assert dist.is_initialized()
