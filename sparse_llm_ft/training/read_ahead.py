"""Reading in a thread what the next micro-batch will need, while the present one runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sparse_llm_ft.training.batches import use_device


class ReadAhead:
    """Calls `read` in one thread, so no two calls run at a time.

    Args:
        read: of the samples that are asked for.
        device: the GPU, if any, for which `read` pins memory.
    """

    def __init__(self, read: Callable[[Sequence[int]], torch.Tensor], device: torch.device) -> None:
        self._read = read
        self._begun: dict[tuple[int, ...], Future[torch.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead", initializer=use_device, initargs=(device,))

    def begin(self, *wanted: Sequence[int]) -> None:
        """Begin to read what will be asked for next, in place of what was begun before."""
        for future in self._begun.values():
            future.cancel()
        self._begun = {tuple(samples): self._thread.submit(self._read, samples) for samples in wanted if samples}

    def take(self, samples: Sequence[int]) -> torch.Tensor:
        """What `read` returns of them.

        Raises:
            Exception: whatever it raises.
        """
        begun = self._begun.pop(tuple(samples), None)
        return (begun or self._thread.submit(self._read, samples)).result()

    def settle(self) -> None:
        """Wait until nothing is being read."""
        self._thread.submit(int).result()  # one thread does one thing after the other

    def close(self) -> None:
        """End the thread, after the samples that it is reading."""
        self._thread.shutdown(cancel_futures=True)
        self._begun.clear()
