"""A signal is only noted; a second Ctrl-C ends the process, whatever it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sparse_llm_ft.distributed import signals
from sparse_llm_ft.errors import PreemptionRequested


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(signals, "_caught", set())
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
    signals.catch_signals()
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("caught")
@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_waits_until_the_run_asks_for_it(number: signal.Signals) -> None:
    signals.exit_if_preempted()
    for _ in range(2):
        os.kill(os.getpid(), number)
    assert signals.preempted_by(signals.caught()) == number.name
    with pytest.raises(PreemptionRequested, match=f"{number.name}: nothing new to save"):
        signals.exit_if_preempted()


def test_nohup_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


# The main thread waits for a mutex that it holds: unlike a system call, no signal ends that, as in a collective.
STUCK = """
import ctypes, sys
from sparse_llm_ft.distributed.signals import catch_signals
catch_signals()
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_second_ctrl_c_ends_a_process_that_waits_forever(rank: str) -> None:
    environment = os.environ | {"RANK": rank}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # a terminal and a launcher both send it
    time.sleep(signals.ONE_CTRL_C + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == signals.INTERRUPTED
    assert said.count("Ctrl-C again stops at once") == (rank == "0")
