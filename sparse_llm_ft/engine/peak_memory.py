"""The memory that training steps really take, beside what planning/ forecast."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The highest memory of this process in the steps since the last `take`, outside which nothing counts.

    On a GPU: bytes of tensors, and of the blocks that the caching allocator holds for them. On a CPU: resident memory,
    where the system lets a process begin its peak anew, which Linux does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._found, self._resets = device, dict[str, int](), False
        self.restart()

    def restart(self) -> None:
        """Steps begin here."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._resets = _restart_resident_peak()

    def note(self) -> None:
        """A step has ended here."""
        now: dict[str, int | None] = {"peak_memory_bytes": resident_bytes("VmHWM") if self._resets else None}
        if self._device.type == "cuda":
            now = {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(self._device),
                "reserved_memory_bytes": torch.cuda.max_memory_reserved(self._device),
            }
        known = {key: size for key, size in now.items() if size is not None}
        self._found |= {key: max(size, self._found.get(key, 0)) for key, size in known.items()}

    def take(self) -> dict[str, int]:
        """Name in metrics.jsonl -> bytes; empty where nothing is known. The next steps count anew."""
        taken, self._found = self._found, {}
        return taken


def resident_bytes(field: str) -> int | None:
    """Bytes of this process: ``VmRSS``, resident memory, or ``VmHWM``, its peak; None where the system does not say."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.is_file() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _restart_resident_peak() -> bool:
    """Let ``VmHWM`` begin at what is resident now (proc(5), clear_refs). Returns whether the system can do so."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
