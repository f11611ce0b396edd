"""Element-wise functions that a GPU computes in one kernel each, made by torch.compile.

A GPU reads and writes its memory once for every operation of PyTorch, and that takes longer than the arithmetic. A
CPU runs these functions as they are written.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

FUSED = {"cuda"}
"""Device types on which functions are compiled."""
BACKEND = "inductor"
"""torch.compile's; on a GPU it needs Triton and a C compiler."""
_OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # rounds where the written function does
    "compile_threads": 1,  # these are few and small, and every rank would start a pool of processes
}

_LOGGER = logging.getLogger(__name__)


class Fused(Generic[P, R]):
    """A function of tensors (rows, ...) that is compiled at its first call on a GPU, once for any number of rows.

    Where it cannot be compiled, one line says so, and it runs as it is written: the same values up to rounding.
    """

    problem: str | None = None
    """Why nothing is compiled here."""

    def __init__(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._compiled: Callable[P, R] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's value."""
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        fuses = tensors[0].device.type in FUSED and Fused.problem is None
        if not fuses or torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        for tensor in tensors:
            if tensor.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self._compiled is None:
            options = _OPTIONS if BACKEND == "inductor" else None
            self._compiled = torch.compile(self._function, backend=BACKEND, options=options)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            Fused.problem = f"{type(cause).__name__}: {cause}".partition("\n")[0]
            _LOGGER.warning("element-wise parts are not compiled, and a step takes longer: %s", Fused.problem)
            return self._function(*args, **kwargs)
