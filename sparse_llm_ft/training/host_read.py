"""A few numbers on their way from the device to the host, which need not wait for them."""

from __future__ import annotations

import torch


class HostRead:
    """Starts to copy a small vector to the host; `numbers` waits until it is there.

    Args:
        vector: 1-D, on any device; what happens to it afterwards does not matter.
    """

    def __init__(self, vector: torch.Tensor) -> None:
        self._host, self._arrived = vector, None
        if vector.is_cuda:
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._host.copy_(vector, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[float]:
        """The numbers; ints of a vector of integers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
