"""Element-wise functions that a GPU computes in one kernel each, compiled by TorchInductor.

A GPU reads and writes its memory once for every operation of PyTorch, and that takes longer than the arithmetic. A
CPU runs these functions as they are written. They are compiled by themselves and not by torch.compile, whose checks
before every call take several times as long as the call: a step of Llama-3-8B makes 288 of them.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import nn

from sparse_llm_ft.errors import lacks_device_memory

P = ParamSpec("P")
R = TypeVar("R")

FUSED = {"cuda"}
"""Device types on which functions are compiled."""
_OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # rounds where the written function does
    "compile_threads": 1,  # these are few and small, and every rank would start a pool of processes
}
_ROWS = 8
"""Of the tensors that a function is traced with: few, and not 0 or 1, which are traced as constants."""
_MOST_VALUES = 2**31 - 1
"""Of a tensor: functions traced with few rows count its values in 32 bits."""

_LOGGER = logging.getLogger(__name__)


def compiled_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor's function of `graph`, which returns a sequence. On a GPU it needs Triton and a C compiler."""
    import torch._inductor  # this takes a second, and a run on a CPU needs none of it

    made: Callable[..., Any] = torch._inductor.compile(graph, inputs, options=_OPTIONS)
    return made


class Fused(Generic[P, R]):
    """A function of tensors (rows, ...), vectors and numbers, all of them positional. It is compiled at its first call
    on a GPU, once for any number of rows.

    Where it cannot be compiled, one line says so, and it runs as it is written: the same values up to rounding. Tensors
    that are not contiguous, or have 2^31 values or more, are computed as it is written, too.
    """

    problem: str | None = None
    """Why nothing is compiled here."""

    def __init__(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._compiled: dict[object, Callable[..., R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's value."""
        assert not kwargs, "arguments are positional"
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        fuses = tensors[0].device.type in FUSED and Fused.problem is None and not _is_watched()
        if not fuses or not all(value.is_contiguous() and value.numel() <= _MOST_VALUES for value in tensors):
            return self._function(*args, **kwargs)
        key = tuple(_kind(value) for value in args)
        if key not in self._compiled:
            try:
                self._compiled[key] = self._compile(args)
            except Exception as error:  # whatever a compiler meets
                cause = getattr(error, "inner_exception", error)
                if lacks_device_memory(cause):
                    raise cause from None  # it says nothing about the function
                Fused.problem = f"{type(cause).__name__}: {cause}".partition("\n")[0]
                _LOGGER.warning("element-wise parts are not compiled, and a step takes longer: %s", Fused.problem)
                return self._function(*args, **kwargs)
        return self._compiled[key](*args)

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., R]:
        from torch.export import Dim, export

        places = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)]
        module = _Traced(self._function, args, places)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            examples = tuple(_example(args[i]) for i in places)
            shapes = tuple({0: Dim.DYNAMIC} if value.ndim > 1 else None for value in examples)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # about torch's own code
                program = export(module, examples, dynamic_shapes=(shapes,), strict=False).run_decompositions({})
            graph = program.graph_module
            inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            run = compiled_graph(graph, inputs)
        several = len(program.graph_signature.user_outputs) > 1

        def call(*args: Any) -> Any:
            found = run(*[args[i] for i in places])
            return tuple(found) if several else found[0]

        return call


class _Traced(nn.Module):
    """A function of tensors alone."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], places: list[int]) -> None:
        super().__init__()
        self._function, self._places = function, places
        self._others = [None if i in places else value for i, value in enumerate(args)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Its value, with the other arguments as they were."""
        args = list(self._others)
        for i, value in zip(self._places, tensors, strict=True):
            args[i] = value
        return self._function(*args)


def _is_watched() -> bool:
    """Whether torch.compile traces the caller, or a mode wants to see each operation."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _kind(value: Any) -> object:
    """What a compiled function depends on, of a contiguous tensor all but the number of rows and the values."""
    if not isinstance(value, torch.Tensor):
        return type(value), repr(value)  # 1 equals 1.0, and 0.0 equals -0.0
    return value.dtype, value.device, value.ndim, value.shape[1:] if value.ndim > 1 else value.shape


def _example(value: torch.Tensor) -> torch.Tensor:
    """A tensor like `value`, of few rows."""
    shape = (_ROWS, *value.shape[1:]) if value.ndim > 1 else value.shape
    return torch.zeros(shape, dtype=value.dtype, device=value.device)
