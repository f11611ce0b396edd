"""Element-wise functions compiled for a GPU, here on the CPU: same values, one compilation, a line where it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_llm_ft.model import fused
from sparse_llm_ft.model.fused import Fused
from sparse_llm_ft.model.lean import rms_norm, swiglu


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile on the CPU."""
    monkeypatch.setattr(fused, "FUSED", {"cpu"})
    monkeypatch.setattr(Fused, "problem", None)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counted:
    """A backend that runs what it is given, and counts it."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1
        return graph.forward


def test_a_function_is_compiled_once_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counted()
    monkeypatch.setattr(fused, "BACKEND", backend)
    double = Fused(lambda x, factor: x * factor)
    for rows in (5, 3, 7):
        x = torch.randn(rows, 4)
        assert torch.equal(double(x, 2.0), 2 * x)
    assert backend.compiled == 1


def test_it_is_not_compiled_inside_of_a_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counted()
    monkeypatch.setattr(fused, "BACKEND", backend)
    double = Fused(lambda x: x * 2)
    assert torch.equal(
        torch.compile(lambda x: double(x) + 1, backend="eager")(torch.ones(2, 2)), torch.full((2, 2), 3.0)
    )
    assert backend.compiled == 0


def test_a_measurement_sees_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BACKEND", Counted())

    class Watching(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    double = Fused(lambda x: x * 2)
    with Watching() as watching:
        assert torch.equal(double(torch.ones(2, 2)), torch.full((2, 2), 2.0))
    assert any("mul" in name for name in watching.seen)


def test_what_cannot_be_compiled_runs_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(fused, "BACKEND", fails)
    double = Fused(lambda x: x * 2)
    with caplog.at_level(logging.WARNING, logger=fused.__name__):
        for _ in range(2):
            assert torch.equal(double(torch.ones(2, 2)), torch.full((2, 2), 2.0))
    (record,) = caplog.records
    assert "no compiler" in record.getMessage()


def _values(dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of both lean parts, at two numbers of rows."""
    torch.manual_seed(0)
    found = []
    for rows in (6, 4):
        x, gate, up, outer = (torch.randn(2, rows, 16, dtype=dtype, requires_grad=True) for _ in range(4))
        weight = torch.randn(16, dtype=dtype)
        normalised, product = rms_norm(x, weight, 1e-5), swiglu(gate, up)
        found += [normalised, product]
        found += torch.autograd.grad([normalised, product], [x, gate, up], [outer, outer])
    return found


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_parts_are_the_same_compiled(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BACKEND", backend)
    compiled = _values(dtype)
    assert Fused.problem is None
    monkeypatch.setattr(fused, "FUSED", set())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for own, written in zip(compiled, _values(dtype), strict=True):
        torch.testing.assert_close(own, written, **tolerance)
