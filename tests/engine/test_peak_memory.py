"""The peak of steps: what is made and freed within one counts, what comes between them does not."""

from __future__ import annotations

import pytest
import torch

from sparse_llm_ft.engine import peak_memory
from sparse_llm_ft.engine.peak_memory import PeakMemory, resident_bytes

CPU, SIZE = torch.device("cpu"), 256 * 2**20


def touch() -> None:
    torch.ones(SIZE // 4)


def test_steps_count_and_what_comes_between_them_does_not() -> None:
    memory = PeakMemory(CPU)
    if not memory._resets:
        pytest.skip("this system does not let a process begin its peak anew")
    resident = resident_bytes("VmRSS")
    assert resident is not None
    touch()  # a validation
    memory.restart()
    memory.note()
    low = memory.take()["peak_memory_bytes"]
    memory.restart()
    touch()
    memory.note()
    memory.restart()
    memory.note()  # the larger of two steps stays
    high = memory.take()["peak_memory_bytes"]
    assert abs(low - resident) < SIZE // 4 and high - low > SIZE // 2
    assert memory.take() == {}


def test_nothing_is_known_where_the_system_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("_CLEAR", "_STATUS"):
        monkeypatch.setattr(peak_memory, name, tmp_path / "nowhere" / name)
    memory = PeakMemory(CPU)
    memory.note()
    assert memory.take() == {} and resident_bytes("VmRSS") is None


def test_a_gpu_has_tensors_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played: torch.cuda is asked, and the larger of two steps stays."""
    said = iter([(10, 30), (20, 25)])
    now = [0, 0]

    def reset(_: object) -> None:
        now[:] = next(said)

    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _: now[0])
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda _: now[1])
    memory = PeakMemory(torch.device("cuda"))
    memory.note()
    memory.restart()
    memory.note()
    assert memory.take() == {"peak_memory_bytes": 20, "reserved_memory_bytes": 30}
