"""Who is found dead and who is not: without processes, on a store in memory."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from sparse_llm_ft.distributed import heartbeat, signals
from sparse_llm_ft.distributed.heartbeat import Heartbeat, Timeouts, connecting, monitor_ranks
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.errors import PreemptionRequested, TrainingError, UserError

QUICK = Timeouts(beat=0.05, silent=2.0, doubted=1.2, lost=0.8, failed=0.8, store=0.5)


class Ranks:
    """Watches that share a store; what each said at its end, and of whom."""

    def __init__(self, size: int) -> None:
        self.store, self.up = dist.HashStore(), True
        self.answers = threading.Event()
        self.answers.set()
        self.ends: dict[int, tuple[set[int], str]] = {}
        self.left: dict[int, tuple[int, str, int]] = {}
        self.watches = [self._watch(rank, size) for rank in range(size)]

    def __getattr__(self, name: str) -> Any:
        """A connection to the store."""
        self.answers.wait()
        if not self.up:
            raise dist.DistNetworkError("refused")
        return getattr(self.store, name)

    def _watch(self, rank: int, size: int) -> Heartbeat:
        def end(dead: set[int], text: str) -> None:
            self.ends.setdefault(rank, (dead, text))
            self.watches[rank]._stopped.set()  # as the end of the process would

        def left(other: int, text: str, status: int) -> None:
            self.left[rank] = other, text, status
            self.watches[rank]._stopped.set()

        return Heartbeat(World(rank, size, rank, size), lambda: self, (0, "rank 0 (first)"), end, QUICK, left)

    @contextmanager
    def closing(self) -> Iterator[Ranks]:
        yield self
        for one in self.watches:
            one.close(done=False)

    def die(self, rank: int) -> None:
        self.watches[rank].close(done=False)

    def wait_for(self, *ranks: int) -> None:
        """Until these have ended, 10 s at most."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not set(ranks) <= self.ends.keys():
            time.sleep(0.01)


@pytest.fixture
def three() -> Iterator[Ranks]:
    with Ranks(3).closing() as ranks:
        time.sleep(0.5)  # all have begun
        yield ranks
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_silent_rank_is_named_by_all_others(three: Ranks) -> None:
    three.die(1)
    three.wait_for(0, 2)
    assert {rank: dead for rank, (dead, _) in three.ends.items()} == {0: {1}, 2: {1}}
    assert three.ends[0][1].startswith("rank 1 (") and three.ends[0][1] != "rank 1 ()"


def test_a_rank_that_leaves_with_an_error_tells_the_others_and_waits_for_rank_0(three: Ranks) -> None:
    told: list[bool] = []
    failing = threading.Thread(target=lambda: told.append(three.watches[2].fail("a file: missing here", 2)))
    failing.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and len(three.left) < 2:
        time.sleep(0.01)
    line = f"rank 2 ({node_name()}): a file: missing here"
    assert three.left == dict.fromkeys((0, 1), (2, line, 2)) and not three.ends and not told
    three.up = False  # rank 0, which holds the store, has left
    failing.join(5)
    assert told == [True]


def test_the_same_error_on_rank_0_speaks_for_all(three: Ranks) -> None:
    """Each rank has it, and none ends before it has its own."""
    assert not three.watches[0].fail("bad", 2)
    assert three.watches[1].fail("bad", 2) and three.watches[2].fail("bad", 2)
    assert not three.left and not three.ends


def test_a_rank_0_that_hears_nothing_does_not_speak(three: Ranks) -> None:
    three.watches[0]._left = three.watches[1]._left = lambda *_: None
    started = time.monotonic()
    assert not three.watches[2].fail("bad", 1)
    assert QUICK.failed < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("error", "shared", "posted"),
    [
        (UserError("mine"), False, [("mine", 2)]),
        (TrainingError("mine"), False, [("mine", 1)]),
        (ZeroDivisionError("mine\ntoo"), False, [("ZeroDivisionError: mine too", 1)]),
        (UserError("of all"), True, []),
        (PreemptionRequested("SIGTERM", "saved"), False, []),
    ],
)
def test_what_is_told(error: Exception, shared: bool, posted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    ours = isinstance(error, UserError | TrainingError)
    if shared:
        error.is_shared = True
    with Ranks(2).closing() as ranks:
        monkeypatch.setattr(ranks.watches[1], "fail", lambda *failure: told.append(failure) or True)
        heartbeat._leave(ranks.watches[1], error)
    assert told == posted and (not ours or error.is_shared)


def test_nobody_is_named_while_all_beat_or_have_not_begun_or_are_done(three: Ranks) -> None:
    three.watches[2].close(done=True)
    alone = Heartbeat(
        World(0, 2, 0, 2), dist.HashStore, (0, ""), lambda dead, text: three.ends.update(x=(dead, text)), QUICK
    )
    time.sleep(3 * QUICK.silent)
    alone.close(done=True)
    assert not three.ends


def test_a_store_that_is_not_there_yet_is_waited_for() -> None:
    def refuse() -> dist.Store:
        raise dist.DistNetworkError("refused")

    ends: list[str] = []
    early = Heartbeat(World(1, 2, 1, 2), refuse, (0, ""), lambda dead, text: ends.append(text), QUICK)
    time.sleep(2 * QUICK.silent)
    early.close(done=False)
    assert not ends


def test_a_failed_collective_waits_for_the_name_and_only_for_it(three: Ranks) -> None:
    three.die(2)
    started = time.monotonic()
    three.watches[0].collective_failed()
    assert three.ends[0][0] == {2} and time.monotonic() - started < QUICK.silent
    started = time.monotonic()
    three.watches[1]._limit = lambda: 1e9  # nobody is found
    three.watches[1].collective_failed()
    assert 1 not in three.ends and time.monotonic() - started < 5


def test_a_rank_that_died_before_its_first_beat_is_named_once_a_collective_has_failed() -> None:
    ends: list[tuple[set[int], str]] = []
    first = Heartbeat(
        World(0, 2, 0, 2), dist.HashStore, (0, ""), lambda *end: (ends.append(end), first._stopped.set()), QUICK
    )
    time.sleep(2 * QUICK.silent)
    assert not ends
    first.collective_failed()
    first.close(done=False)
    assert ends[0] == ({1}, "rank 1 (host unknown)")


def test_who_was_asked_to_leave_doubts_sooner(three: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert three.watches[0]._limit() == QUICK.silent
    monkeypatch.setattr(signals, "_caught", {signals.SIGNALS[0]})
    assert three.watches[0]._limit() == QUICK.doubted


def test_a_store_that_is_gone_is_its_holders_fault_and_a_short_absence_nobodys(three: Ranks) -> None:
    three.up = False
    time.sleep(QUICK.silent / 4)
    three.up = True
    time.sleep(QUICK.silent)
    assert not three.ends
    three.up = False
    three.wait_for(1)
    assert three.ends[1] == ({0}, "rank 0 (first)")


def test_a_store_that_accepts_and_never_answers_is_its_holders_fault_too(three: Ranks) -> None:
    three.answers.clear()
    three.wait_for(1)
    three.answers.set()
    assert three.ends[1] == ({0}, "rank 0 (first)")


def test_who_was_asked_to_leave_does_not_wait_for_the_store(three: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to a store that has gone with rank 0 takes seconds to fail; launchers kill within seconds."""
    three.answers.clear()  # the store accepts, and does not answer
    time.sleep(0.2)
    monkeypatch.setattr(signals, "caught", lambda: [1, 0, 0, 0])
    three.watches[2].timeouts = replace(QUICK, store=60.0)
    closing = threading.Thread(target=three.watches[2].close, args=(False,))
    closing.start()
    closing.join(10)
    assert not closing.is_alive() and three.watches[2]._beater.is_alive()
    three.answers.set()


def test_processes_that_were_suspended_blame_nobody(three: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count no more than they can have been awake between two looks."""
    asleep = 0.0
    awake = time.monotonic
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: awake() + asleep))
    time.sleep(0.2)
    asleep = 1000.0
    time.sleep(0.4)
    assert not three.ends


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The store's, bound here; nothing listens there yet."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(bound.getsockname()[1]))
        yield bound


def test_a_port_in_use_is_one_line(port: socket.socket) -> None:
    """A batch job tries again, with another port."""
    port.listen()
    number = port.getsockname()[1]
    with pytest.raises(TrainingError) as raised, monitor_ranks(World(0, 2, 0, 2)):
        pass
    assert f"MASTER_PORT: {number} is in use" in str(raised.value) and f"--master_port {number + 1}" in str(
        raised.value
    )


def test_a_rank_0_that_is_not_there_is_one_line(port: socket.socket) -> None:
    number = port.getsockname()[1]
    with pytest.raises(TrainingError, match=f"rank 0 does not answer at 127.0.0.1:{number} .*left"), connecting():
        dist.TCPStore("127.0.0.1", number, is_master=False, timeout=timedelta(seconds=1))
