"""What one rank does or decides and all must follow: nobody waits for a rank that has failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import CheckpointError, TrainingError, UserError
from sparse_llm_ft.io.console import Console

_FINE, _WORKING, _USER, _OWN = range(4)
"""What a rank says of itself; the greatest counts."""


def run_on_rank_zero(world: World, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait; if it fails, all ranks stop.

    Raises:
        UserError: on every rank, with the reason on rank 0 (a full or read-only disk, a folder in use).
        TrainingError: on every rank where rank 0 raised one. What is neither keeps its type and traceback on rank 0,
            and is one elsewhere.
    """
    _on_some(world.rank == 0, action, "rank 0 failed")


def _on_some(chosen: bool, action: Callable[[], None], elsewhere: str) -> None:
    failure: Exception | None = None
    if chosen:
        try:
            action()
        except Exception as error:  # whatever it is, nobody may wait for this rank
            failure = error
    failure, kind = _judged(failure)
    _end(failure, _worst(kind), elsewhere)


def _judged(failure: Exception | None) -> tuple[Exception | None, int]:
    if isinstance(failure, OSError | SafetensorError):  # what safetensors writes fails with an error of its own
        failure = UserError(str(failure))
    return failure, _FINE if failure is None else _USER if isinstance(failure, UserError) else _OWN


def _end(failure: Exception | None, worst: int, elsewhere: str) -> None:
    if failure is not None:
        raise failure
    if worst:
        raise (UserError if worst == _USER else TrainingError)(elsewhere)


def run_on_local_leaders(world: World, action: Callable[[], None], what: str = "", every: float = 30.0) -> None:
    """Run `action`, which must not be collective, on the first rank of each node while the others wait; if it fails on
    one, all ranks stop.

    It may take hours: the ranks meet every now and then, so that none waits longer than a process group lets it.

    Args:
        what: it does, for a line on rank 0 now and then; without, there is none.
        every: seconds between two meetings.

    Raises:
        UserError: on every rank, with the reason where it failed. What is neither that nor an error of a disk keeps its
            type and traceback there, and is a TrainingError elsewhere.
        PreemptionRequested: on every rank, where one was asked to leave meanwhile. What `action` does is then cut off
            when the process ends.
    """
    raised: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:  # as in `_on_some`
            raised.append(error)

    worker = threading.Thread(target=act, name="leader", daemon=True)  # a daemon does not keep a process that leaves
    if world.local_rank == 0:
        worker.start()
    began, console = time.monotonic(), Console(world.rank)
    while True:
        if world.local_rank == 0:
            worker.join(every)
        working = worker.is_alive()  # asked first: what it raises comes before its end
        failure, kind = _judged(raised[0] if raised else None)
        worst = _worst(_WORKING if working else kind)
        if worst != _WORKING:
            break
        exit_if_preempted()
        if what:
            console.log(f"{what}: {time.monotonic() - began:.0f} s so far")
    _end(failure, worst, "the first rank of another node failed")


def run_on_every_rank(action: Callable[[], None], hint: str = "") -> None:
    """Run `action` on all ranks; if it fails on one, all stop, as by `run_on_local_leaders`.

    Args:
        hint: follows the reason of a file that cannot be read.
    """
    ending = f"; {hint}" if hint else ""

    def hinted() -> None:
        try:
            action()
        except (OSError, CheckpointError) as error:
            raise UserError(f"{error}{ending}") from error

    _on_some(True, hinted, f"another process failed{ending}")


def broadcast_int(value: int) -> int:
    """Rank 0's value, on every rank."""
    shared = torch.tensor([value], device=_device())
    dist.broadcast(shared, 0)
    return int(shared)


def broadcast_bytes(data: bytes) -> bytes:
    """Rank 0's bytes, on every rank."""
    size = broadcast_int(len(data))
    shared = torch.zeros(size, dtype=torch.uint8, device=_device())
    if dist.get_rank() == 0:
        shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else shared)
    dist.broadcast(shared, 0)
    return bytes(shared.cpu().numpy())


def broadcast_text(text: str) -> str:
    """Rank 0's text, on every rank."""
    return broadcast_bytes(text.encode()).decode()


@dataclass(frozen=True)
class Coordination:
    """How several ranks share work whose result all of them need; the default is a single process.

    Attributes:
        on_leaders: runs an action on one process of each node while the node's others wait.
        on_every_rank: runs an action on every rank. For both, a failure on one rank stops all ranks.
        broadcast: returns rank 0's text.
    """

    on_leaders: Callable[[Callable[[], None]], None]
    on_every_rank: Callable[[Callable[[], None]], None]
    broadcast: Callable[[str], str]


def coordinate(world: World, what: str) -> Coordination:
    """The coordination of connected ranks.

    Args:
        what: the work, for the progress lines of `run_on_local_leaders`.
    """
    return Coordination(partial(run_on_local_leaders, world, what=what), run_on_every_rank, broadcast_text)


def _run_alone(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(str(error)) from error


ALONE = Coordination(_run_alone, _run_alone, str)
"""A single process; a file that cannot be read is a `UserError`."""


def _worst(failure: int) -> int:
    flag = torch.tensor([failure], device=_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
