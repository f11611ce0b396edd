"""Bytes of the tensors that torch operations make, as long as these are alive."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_PRODUCT = "bitsandbytes::gemm_4bit"
"""Dequantises its whole weight for more than a few rows, on every device (bitsandbytes 0.50)."""


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end, in forward and backward, on any device.

    Tensors that were there before the context are left out, and so are those that a kernel makes and frees within one
    operation, except the weight that bitsandbytes' 4-bit product dequantises.

    Attributes:
        now: bytes alive.
        peak: the most so far.
        recent: the most since it was last set; set it to `now` to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.recent = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call, and follow what it makes."""
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        if func._schema.name == _PRODUCT:
            x, _, (d_out, d_in), *_ = args
            self._note(self.now + made.nbytes + d_out * d_in * x.element_size())
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return

        def ended(_: object) -> None:
            self._alive.pop(address, None)
            self.now -= size

        self._alive[address] = weakref.ref(storage, ended)
        self.now += size
        self._note(self.now)

    def _note(self, alive: int) -> None:
        self.peak, self.recent = max(self.peak, alive), max(self.recent, alive)
