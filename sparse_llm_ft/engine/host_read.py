"""Values on their way from the device to the host, which need not wait for them, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(n,) numbers on the device; without a type, int64 or float32. A CUDA driver may wait for the device before it
    copies what is not in pinned memory.
    """
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostRead:
    """Starts to copy a tensor to the host; `numbers` and `values` wait until it is there.

    Args:
        source: on any device; on a GPU what happens to it afterwards does not matter, on a CPU it must stay as it is.
    """

    def __init__(self, source: torch.Tensor) -> None:
        self._host, self._arrived = source, None
        if source.is_cuda:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[float]:
        """The numbers of a vector; ints of one of integers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()

    def values(self) -> torch.Tensor:
        """The tensor, in memory that is not pinned: it may be large, and kept for long."""
        if self._arrived is None:
            return self._host
        self._arrived.synchronize()
        return self._host.clone()
