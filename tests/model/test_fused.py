"""Element-wise functions compiled for a GPU, here on the CPU: same values, one compilation, a line where it fails."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._inductor.exc import InductorError
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_llm_ft.model import fused, lean
from sparse_llm_ft.model.fused import Fused
from sparse_llm_ft.model.lean import rms_norm, swiglu


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile on the CPU."""
    monkeypatch.setattr(fused, "FUSED", {"cpu"})
    monkeypatch.setattr(Fused, "problem", None)


class Counted:
    """Runs a graph as it is, and counts them."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1
        return graph


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What takes inductor's place."""
    found = Counted()
    monkeypatch.setattr(fused, "compiled_graph", found)
    return found


def test_a_function_is_compiled_once_for_any_number_of_rows(counted: Counted) -> None:
    double = Fused(lambda x, factor: x * factor)
    for rows in (5, 3, 1, 7, 0):
        x = torch.randn(rows, 4, requires_grad=rows > 4)
        assert torch.equal(double(x, 2.0), 2 * x)
    assert counted.compiled == 1


@pytest.mark.parametrize("backend", ["graph", pytest.param("inductor", marks=pytest.mark.long)])
def test_every_kind_of_arguments_has_its_own(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "graph":
        request.getfixturevalue("counted")
    scaled = Fused(lambda x, weight, factor: (x * weight * factor, x.float()))
    x, weight = torch.randn(4, 6), torch.randn(6)
    wide = torch.randn(4, 12)
    for values, vector, factor in (
        (x, weight, 2.0),
        (x, weight, 3.0),
        (x.bfloat16(), weight.bfloat16(), 2.0),
        (wide[:, ::2], weight, 2.0),
        (wide[:, :6], weight, 2.0),
        (torch.randn(6, 8).t(), torch.randn(6), 2.0),
        (wide, torch.randn(12), 2.0),
        (x[:1], weight, 2.0),
        (x, weight, -0.0),
        (x, weight, 0.0),
        (x.long(), weight.long(), 1),
        (x.long(), weight.long(), 1.0),
    ):
        product, whole = scaled(values, vector, factor)
        torch.testing.assert_close(product, values * vector * factor)
        assert torch.equal(product.signbit(), (values * vector * factor).signbit())
        assert torch.equal(whole, values.float())
    assert Fused.problem is None
    assert len(scaled._compiled) == 8  # one row is no kind of its own


def test_it_compiles_where_autograd_runs_it(counted: Counted) -> None:
    """On a GPU a backward pass runs in a thread of its own; a generation in inference mode."""
    double = Fused(lambda x: x * 2)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        assert torch.equal(pool.submit(double, torch.ones(2, 2)).result(), torch.full((2, 2), 2.0))
    with torch.inference_mode(), torch.autocast("cpu"):
        assert torch.equal(double(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert counted.compiled == 2 and Fused.problem is None


def test_a_tensor_that_is_not_contiguous_runs_as_it_is_written(counted: Counted) -> None:
    values = torch.randn(4, 3).t()
    assert torch.equal(Fused(lambda x: x * 2)(values), values * 2) and counted.compiled == 0


def test_large_tensors_run_as_they_are_written(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled function would count their values in 32 bits."""
    monkeypatch.setattr(fused, "_MOST_VALUES", 11)
    double = Fused(lambda x: x * 2)
    assert torch.equal(double(torch.ones(3, 4)), torch.full((3, 4), 2.0)) and counted.compiled == 0
    assert torch.equal(double(torch.ones(2, 4)), torch.full((2, 4), 2.0)) and counted.compiled == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lack_of_memory_is_no_lack_of_a_compiler(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lack = torch.OutOfMemoryError("none left")

    def fails(graph: Any, inputs: Any) -> Any:
        raise InductorError(lack, None) if wrapped else lack

    monkeypatch.setattr(fused, "compiled_graph", fails)
    with pytest.raises(torch.OutOfMemoryError):
        Fused(lambda x: x * 2)(torch.ones(2, 2))
    assert Fused.problem is None


def test_it_is_not_compiled_inside_of_a_compiled_one(counted: Counted) -> None:
    double = Fused(lambda x: x * 2)
    assert torch.equal(
        torch.compile(lambda x: double(x) + 1, backend="eager")(torch.ones(2, 2)), torch.full((2, 2), 3.0)
    )
    assert counted.compiled == 0


def test_a_measurement_sees_its_operations(counted: Counted) -> None:
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
    assert any("mul" in name for name in watching.seen) and counted.compiled == 0


def test_what_cannot_be_compiled_runs_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(fused, "compiled_graph", fails)
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


@pytest.mark.parametrize("backend", ["graph", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_parts_are_the_same_compiled(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if backend == "graph":
        request.getfixturevalue("counted")
    for part in (lean._norm, lean._norm_again, lean._norm_backward, lean._product, lean._product_backward):
        monkeypatch.setattr(part, "_compiled", {})
    compiled = _values(dtype)
    assert Fused.problem is None
    assert all(len(part._compiled) == 1 for part in (lean._norm, lean._norm_backward, lean._product_backward))
    monkeypatch.setattr(fused, "FUSED", set())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for own, written in zip(compiled, _values(dtype), strict=True):
        torch.testing.assert_close(own, written, **tolerance)
