"""Collectives in which one rank acts or decides for all; no rank waits for one that has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.errors import AWAY, CheckpointError, TrainingError, UserError, describe_failure, may_pass
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait

_FINE, _WORKING, _USER, _OWN = range(4)
"""States that ranks exchange; the largest wins."""


def run_on_rank_zero(world: World, action: Callable[[], None]) -> None:
    """Collective. Run `action` on rank 0 while the others wait; if it fails, all ranks stop.

    Raises:
        UserError: on every rank, with the reason (a full or read-only disk, a folder in use).
        TrainingError: on every rank if rank 0 raised one, or a file server is away. Any other exception keeps its type
            and traceback on rank 0, and becomes a TrainingError elsewhere.
    """
    _on_some(world.rank == 0, action)


def run_long_on_rank_zero(world: World, action: Callable[[], None], every: float = 30.0) -> None:
    """Collective. `run_on_rank_zero` for what a slow file server can make longer than the process group's timeout, such
    as a large checkpoint. With other ranks it runs in a thread, so `action` must not be collective.

    Args:
        every: seconds between synchronisations.
    """
    if world.size == 1:
        _on_some(True, action)
    else:
        _end(*_watched(world.rank == 0, action, every, lambda: None))


def _on_some(chosen: bool, action: Callable[[], None]) -> None:
    failure: Exception | None = None
    if chosen:
        try:
            action()
        except Exception as error:  # of any type: no rank may wait for this one
            failure = error
    failure, kind = _judged(failure)
    _end(failure, _worst(kind))


def _judged(failure: Exception | None) -> tuple[Exception | None, int]:
    if isinstance(failure, OSError | SafetensorError | UserError) and may_pass(failure):
        failure = TrainingError(f"{failure}; {AWAY}")
    if isinstance(failure, OSError | SafetensorError):  # safetensors raises its own type when a write fails
        failure = UserError(str(failure))
    return failure, _FINE if failure is None else _USER if isinstance(failure, UserError) else _OWN


def _end(failure: Exception | None, worst: int) -> None:
    """Collective. If a rank has failed, raise: there its own error, and elsewhere one with the first one's reason."""
    if worst == _FINE:
        return
    reason = first_failure(failure)
    error = (UserError if worst == _USER else TrainingError)(reason or "") if failure is None else failure
    if isinstance(error, UserError | TrainingError):
        error.is_shared = True
    raise error


def first_failure(failure: Exception | None) -> str | None:
    """Collective. Which rank has failed, on which node, and why, in one line; of several ranks the first one. None if
    none has.

    Args:
        failure: this rank's.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    first = torch.tensor([size if failure is None else rank], device=_device())
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if int(first) == size:
        return None
    own = "" if failure is None else f"rank {rank} ({node_name()}): {describe_failure(failure)}"
    return broadcast_bytes(own.encode(), int(first)).decode()


def run_on_local_leaders(world: World, action: Callable[[], None], what: str = "", every: float = 30.0) -> None:
    """Collective. Run `action` on the first rank of each node while the others wait; if one fails, all ranks stop.

    `action` must not be collective. It may take hours: the ranks synchronise every `every` seconds, so that none
    exceeds the process group's timeout.

    Args:
        what: describes the action while rank 0 shows that it takes a while; empty: it does not.
        every: seconds between synchronisations.

    Raises:
        UserError: on every rank, with the reason. An exception that is neither this nor a disk error keeps its type
            and traceback where it was raised, and becomes a TrainingError elsewhere.
        PreemptionRequested: on every rank, if one was asked to leave meanwhile. `action` stops when the process ends.
    """
    with Wait(Console(world.rank), what) if what else nullcontext():
        failure, worst = _watched(world.local_rank == 0, action, every, exit_if_preempted)
    _end(failure, worst)


def _watched(
    chosen: bool, action: Callable[[], None], every: float, meanwhile: Callable[[], None]
) -> tuple[Exception | None, int]:
    """Collective. Run `action` in a thread of the chosen ranks, and `meanwhile` on all after every `every` seconds.
    Returns this rank's failure and the worst rank's state.
    """
    raised: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:  # as in `_on_some`
            raised.append(error)

    worker = threading.Thread(target=act, name="leader", daemon=True)  # a daemon does not delay the end of the process
    if chosen:
        worker.start()
    while True:
        if chosen:
            worker.join(every)
        working = worker.is_alive()  # read first: the thread raises before it ends
        failure, kind = _judged(raised[0] if raised else None)
        worst = _worst(_WORKING if working else kind)
        if worst != _WORKING:
            return failure, worst
        meanwhile()


def run_on_every_rank(action: Callable[[], None], hint: str = "") -> None:
    """Collective. Run `action` on all ranks; if it fails on one, all stop, as in `run_on_local_leaders`.

    Args:
        hint: appended to the reason why a file is not readable.
    """
    ending = f"; {hint}" if hint else ""

    def hinted() -> None:
        try:
            action()
        except (OSError, CheckpointError) as error:
            raise UserError(f"{error}{ending}") from error

    _on_some(True, hinted)


def broadcast_int(value: int, source: int = 0) -> int:
    """Collective. The value of the rank `source`."""
    shared = torch.tensor([value], device=_device())
    dist.broadcast(shared, source)
    return int(shared)


def broadcast_bytes(data: bytes, source: int = 0) -> bytes:
    """Collective. The bytes of the rank `source`."""
    size = broadcast_int(len(data), source)
    shared = torch.zeros(size, dtype=torch.uint8, device=_device())
    if dist.get_rank() == source:
        shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else shared)
    dist.broadcast(shared, source)
    return bytes(shared.cpu().numpy())


def broadcast_text(text: str) -> str:
    """Collective. Rank 0's text."""
    return broadcast_bytes(text.encode()).decode()


@dataclass(frozen=True)
class Coordination:
    """How several ranks share work whose result all of them need; the default is a single process.

    Attributes:
        on_rank_zero: runs an action on rank 0 while the others wait.
        on_leaders: runs an action on one process of each node while the node's others wait.
        on_every_rank: runs an action on every rank. For all three, a failure on one rank stops all ranks.
        broadcast: returns rank 0's text.
    """

    on_rank_zero: Callable[[Callable[[], None]], None]
    on_leaders: Callable[[Callable[[], None]], None]
    on_every_rank: Callable[[Callable[[], None]], None]
    broadcast: Callable[[str], str]


def coordinate(world: World, what: str) -> Coordination:
    """The coordination of connected ranks.

    Args:
        what: the work of `run_on_local_leaders`, for people who wait.
    """
    return Coordination(
        partial(run_on_rank_zero, world),
        partial(run_on_local_leaders, world, what=what),
        run_on_every_rank,
        broadcast_text,
    )


def _run_alone(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(str(error)) from error


def _lead_alone(action: Callable[[], None]) -> None:
    with Wait(Console(0, stderr=True), "reading and tokenising the data"):
        _run_alone(action)


ALONE = Coordination(_run_alone, _lead_alone, _run_alone, str)
"""A single process; a file that cannot be read is a `UserError`. Commands print their results on standard output."""


def _worst(failure: int) -> int:
    flag = torch.tensor([failure], device=_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
