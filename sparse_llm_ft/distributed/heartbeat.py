"""Detects dead ranks. The survivors name them and exit, whatever collective they are waiting in.

A thread of every rank writes a beat into the run's TCPStore and reads the beats of all others, over its own connection.
It adds no traffic to the training's collectives, and training never waits for it. A rank that leaves with an error of
its own writes the reason in place of a beat, so that the others end with it and need not wait for the silence.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sparse_llm_ft.distributed import exit_status, signals
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.errors import PreemptionRequested, TrainingError, UserError, describe_failure, may_pass, reason_of

_DONE, _FAILED = "done", "failed"


@dataclass(frozen=True)
class Timeouts:
    """Seconds.

    Attributes:
        beat: between two beats of a rank.
        silent: until a rank without beats counts as dead. Long, since a library may hold the interpreter for a while.
        doubted: the same after this process was asked to leave. Launchers ask the survivors when one rank dies, and
            kill them 30 s later.
        lost: the same after a collective has failed, which proves that a rank is gone.
        failed: after another rank has left with an error, until this one ends too. The same error may be on its way
            here, and then this process ends with its own.
        store: within which the store must answer.
    """

    beat: float = 2.0
    silent: float = 40.0
    doubted: float = 15.0
    lost: float = 6.0
    failed: float = 3.0
    store: float = 5.0


class Heartbeat:
    """The two threads of one rank: one exchanges beats with the store, the other judges them.

    They are separate because the exchange may block forever: a frozen host accepts a connection and never answers.
    Only time in which this process runs counts, so that a process that wakes from suspension does not blame the others.

    Args:
        connect: connects to the store; called again after a failure.
        holder: the rank to blame if the store is not reachable, and its description.
        end: called with the dead ranks and their description.
        left: called with a rank that has left with an error, its line about it, and its exit status.
    """

    def __init__(
        self,
        world: World,
        connect: Callable[[], Any],
        holder: tuple[int, str],
        end: Callable[[set[int], str], None],
        timeouts: Timeouts = Timeouts(),
        left: Callable[[int, str, int], None] = lambda rank, text, status: None,
    ) -> None:
        self.world, self.timeouts = world, timeouts
        self._connect, self._holder, self._end, self._left = connect, holder, end, left
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._last = dict.fromkeys(self._others, "")
        self._silent = dict.fromkeys(self._others, 0.0)
        self._store_silence, self._beats, self._met = 0.0, 0, False
        self._since_failure = 0.0
        self._store: Any = None
        self._heard: list[str] | None = None
        self._stopped, self._lost = threading.Event(), threading.Event()
        self._beater, self._monitor = (
            threading.Thread(target=target, name="heartbeat", daemon=True)
            for target in (self._beat_loop, self._monitor_loop)
        )
        self._beater.start()
        self._monitor.start()

    def collective_failed(self) -> None:
        """Wait until the monitor has found the dead rank and ends the process; return if none is dead."""
        self._lost.set()
        self._monitor.join(2 * (self.timeouts.lost + self.timeouts.beat + self.timeouts.store))

    def close(self, done: bool) -> None:
        """Stop; if `done`, tell the others that this rank has finished."""
        if self._stop() and done:
            self._exchange(_DONE)

    def fail(self, text: str, status: int) -> bool:
        """Stop, and tell the others that this rank leaves with an error. On another rank than 0, wait until rank 0 has
        said it: launchers end all processes when the first one does.

        Args:
            text: one line about the error.
            status: this rank's exit status.

        Returns:
            Whether rank 0 has said it, or one of its own.
        """
        beat = f"{_FAILED} {status} rank {self.world.rank} ({node_name()}): {text}"
        if not self._stop():
            return False  # the store does not answer
        if self.world.rank == 0:
            self._exchange(beat)
            return False
        times = self.timeouts
        end = time.monotonic() + times.failed + 4 * times.beat
        while time.monotonic() < end:
            heard = self._exchange(beat)
            if heard is None or any(signals.caught()):
                return self._met  # rank 0 has left, or a launcher ends this process because it has
            if heard[0].startswith(_FAILED):
                return True
            time.sleep(times.beat / 10)
        return False

    def _stop(self) -> bool:
        """End both threads; False if one still waits for the store.

        A store that has left with rank 0 takes a connection's time to say so. A launcher that has asked this process to
        leave need not wait for that: it may kill it soon.
        """
        self._stopped.set()
        self._monitor.join()
        end = time.monotonic() + 2 * self.timeouts.store
        while self._beater.is_alive() and time.monotonic() < end and not any(signals.caught()):
            self._beater.join(0.05)
        self._beater.join(0.05)  # where it waits for nothing, it ends even so
        return not self._beater.is_alive()

    def _beat_loop(self) -> None:
        while not self._stopped.is_set():
            self._beats += 1
            self._heard = self._exchange(f"{self._beats} {node_name()}")
            self._stopped.wait(self.timeouts.beat)

    def _monitor_loop(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.timeouts.beat):
            heard, self._heard = self._heard, None
            now = time.monotonic()
            self._update_silence(heard, min(now - before, 2 * self.timeouts.beat))
            before = now

    def _exchange(self, beat: str) -> list[str] | None:
        """Write this rank's beat and read those of the others; None if the store did not answer."""
        try:
            if self._store is None:
                self._store = self._connect()
            self._store.set(_key(self.world.rank), beat)
            begun = [r for r in self._others if self._last[r] or self._store.check([_key(r)])]
            beats = self._store.multi_get([_key(rank) for rank in begun]) if begun else []
            heard = dict(zip(begun, beats, strict=True))
            return [heard.get(rank, b"").decode() for rank in self._others]
        except RuntimeError:  # DistError: the store's holder is gone, or too busy
            self._store = None  # a late answer must not be taken for the next one
            return None

    def _update_silence(self, beats: list[str] | None, seconds: float) -> None:
        """Account for the beats since the last call, `seconds` ago; None: the store did not answer."""
        if beats is None:
            self._store_silence += (
                seconds if self._met else 0.0
            )  # before the first contact its holder may still be loading
        else:
            self._store_silence, self._met = 0.0, True
            for rank, beat in zip(self._others, beats, strict=True):
                starting = beat == "" and not self._lost.is_set()  # a rank in a failed collective had started
                alive = starting or beat.startswith((_DONE, _FAILED)) or beat != self._last[rank]
                self._silent[rank] = 0.0 if alive else self._silent[rank] + seconds
                self._last[rank] = beat
        self._follow_failure(seconds)
        limit = self._limit()
        dead = {rank for rank, silent in self._silent.items() if silent >= limit}
        hosts = {rank: self._last[rank].partition(" ")[2] or "host unknown" for rank in dead}
        names = [f"rank {rank} ({hosts[rank]})" for rank in sorted(dead)]
        if not dead and self._store_silence >= limit:
            dead, names = {self._holder[0]}, [self._holder[1]]
        if dead and not self._stopped.is_set():
            self._end(dead, ", ".join(names))

    def _follow_failure(self, seconds: float) -> None:
        """End as the first rank did that has left with an error, some seconds after it."""
        failed = next((rank for rank in self._others if self._last[rank].startswith(_FAILED)), None)
        if failed is None:
            return
        self._since_failure += seconds
        if self._since_failure >= self.timeouts.failed and not self._stopped.is_set():
            _, status, text = self._last[failed].split(" ", 2)
            self._left(failed, text, int(status))

    def _limit(self) -> float:
        if self._lost.is_set():
            return self.timeouts.lost
        return self.timeouts.doubted if any(signals.caught()) else self.timeouts.silent


@contextmanager
def monitor_ranks(world: World) -> Iterator[None]:
    """Monitor the other ranks while the body runs, and end the process as soon as one is dead.

    If the body raises, the others hear why and end too, unless they stop with the same error.
    """
    if world.size == 1:
        yield
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent holds the store
    holder = (-1, f"the launcher's store at {address}") if agent else (0, f"rank 0 ({address})")
    # Rank 0 opens the store before the process group does, which then shares it within this process.
    with connecting():
        server = _store(address, port, held=True) if world.rank == 0 and not agent else None

    def end(dead: set[int], names: str) -> None:
        exit_status.end_at_once(
            world,
            dead,
            f"{names} stopped answering: it died, or left with an error; the same command continues from the last "
            "checkpoint",
        )

    def left(rank: int, text: str, status: int) -> None:
        exit_status.end_at_once(world, {rank}, text, status, is_said=rank == 0)

    heartbeat = Heartbeat(world, lambda: _store(address, port), holder, end, left=left)
    try:
        yield
    except Exception as error:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            heartbeat.collective_failed()
        _leave(heartbeat, error)
        raise
    except BaseException:
        heartbeat.close(done=False)
        raise
    else:
        heartbeat.close(done=True)
    finally:
        del server


def _leave(heartbeat: Heartbeat, error: Exception) -> None:
    """Stop; if the error is this rank's own, let the others know."""
    if isinstance(error, PreemptionRequested) or (isinstance(error, UserError | TrainingError) and error.is_shared):
        heartbeat.close(done=False)  # every rank leaves by itself
        return
    wrong = isinstance(error, UserError) and not may_pass(error)
    status = exit_status.USER_ERROR if wrong else exit_status.TRAINING_ERROR
    is_said = heartbeat.fail(describe_failure(error), status)
    if isinstance(error, UserError | TrainingError):
        error.is_shared = is_said


@contextmanager
def connecting() -> Iterator[None]:
    """Turn torch's failure to open the store of MASTER_ADDR and MASTER_PORT, or to find it there, into one line.

    Raises:
        TrainingError: another program has the port, which a later attempt of a batch job may find free; or nothing
            answers there, which on another rank than 0 mostly means that rank 0 has left.
    """
    try:
        yield
    except dist.DistError as error:
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise TrainingError(
                f"MASTER_PORT: {port} is in use by another program on {socket.gethostname()}; expected a free one, as "
                f"in `deepspeed --master_port {int(port or 0) + 1}` or `torchrun --master-port {int(port or 0) + 1}`"
            ) from error
        reason = reason_of(error, 200)
        raise TrainingError(
            f"rank 0 does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT): it left with an error, or the "
            f"address is another host's ({reason})"
        ) from error


def _store(address: str, port: int, held: bool = False) -> dist.Store:
    timeout = timedelta(seconds=Timeouts().store)
    return dist.TCPStore(address, port, is_master=held, timeout=timeout, wait_for_workers=False, multi_tenant=held)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
