"""A signal is only noted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sparse_llm_ft.distributed import signals
from sparse_llm_ft.errors import PreemptionRequested


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(signals, "_caught", set())
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.catch_signals()
    yield
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
