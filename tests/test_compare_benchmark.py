"""benchmarks/compare.py: its counts against counts by hand, its tables, and all of it on a narrow Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLES, INNER, OUTER, RANK = 6, 20, 12, 8
FLOAT = 4  # bytes


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def stock_layer(dropout: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(INNER, OUTER, bias=False))
    return get_peft_model(layer, LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["0"])).train()


def kept(model: nn.Module, x: torch.Tensor) -> int:
    from watching import KeptBytes

    counted = KeptBytes(model)
    with counted.watch():
        loss = model(x).sum()
    assert loss.requires_grad
    return counted.total


def test_a_lora_layer_keeps_its_input_and_the_output_of_a() -> None:
    """y = W x + s B A x: A's gradient needs x, B's needs A x; W is frozen, and weights are the model's own."""
    assert kept(stock_layer(0.0), torch.randn(SAMPLES, INNER)) == SAMPLES * (INNER + RANK) * FLOAT


def test_dropout_keeps_a_mask_more() -> None:
    """A's gradient needs the dropped x, dropout's the mask (a byte each, or a float); not x itself."""
    x = torch.randn(SAMPLES, INNER)
    assert kept(stock_layer(0.5), x) == SAMPLES * (INNER + RANK) * FLOAT  # x needs no gradient, and so no mask
    mask = kept(stock_layer(0.5), x.requires_grad_(True)) - SAMPLES * (INNER + RANK) * FLOAT
    assert mask in (SAMPLES * INNER, SAMPLES * INNER * FLOAT)


def test_a_storage_counts_once_and_what_is_freed_does_not_count() -> None:
    class Freed(torch.autograd.Function):
        """Makes a gradient in its forward pass, from a graph that is gone afterwards, and keeps nothing."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                inner = x.detach().requires_grad_(True)
                torch.autograd.grad(inner.exp().square().sum(), inner)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = Freed.apply(x)
            return x[:3] * x[3:] + x[:3] * x[:3]  # four views of one storage

    assert kept(Model(), torch.randn(SAMPLES, INNER, requires_grad=True)) == SAMPLES * INNER * FLOAT


def test_live_bytes_of_a_step() -> None:
    """exp keeps its result (n floats) and the loss is one float, which the step frees; backward adds two gradients."""
    from watching import FORWARD, Meter, step_memory

    meter, n = Meter(), 10_000
    x = torch.randn(n, requires_grad=True)

    def step() -> None:
        with meter.part(FORWARD):
            loss = x.exp().sum()
        temporary = torch.ones(5 * n)
        del temporary
        loss.backward()

    found = step_memory(step)
    assert found.after_forward == pytest.approx(n * FLOAT, abs=64)
    assert found.peak == pytest.approx(6 * n * FLOAT, abs=64)
    assert found.after == pytest.approx(n * FLOAT, abs=64)  # x.grad
    assert step_memory(step).after == pytest.approx(0, abs=64)  # it exists already


def test_bytes_of_collectives(tmp_path: Path) -> None:
    from watching import Communicated

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        values = torch.zeros(5, dtype=torch.float64)
        with Communicated() as counted:
            dist.all_reduce(values)
            dist.all_reduce(values[:2])
            dist.all_gather_into_tensor(torch.zeros(5, dtype=torch.float64), values)
            values + 1
    finally:
        dist.destroy_process_group()
    assert sum(counted.bytes.values()) == (5 + 2 + 5) * 8 and counted.bytes["allreduce"] == 7 * 8
    assert sum(counted.calls.values()) == 3 and counted.calls["allreduce"] == 2


def test_plans_of_the_cases() -> None:
    from compare_cases import CASES, lowest_layer

    from sparse_llm_ft.adapters import count_parameters

    shapes = {f"model.layers.{i}.{name}": (40, 100) for i in range(30) for name in ("q_proj", "v_proj")}
    plans = {name: case.plan(shapes) for name, case in CASES.items()}
    whole = 60 * 8 * (40 + 100)
    sizes = {name: count_parameters(plan, shapes) for name, plan in plans.items()}
    assert sizes["lora"] == sizes["lora, dropout .05"] == whole
    assert sizes["partial_lora, 13 % kept"] == 60 * 8 * (5 + 13) and sizes["partial_lora, 1 % kept"] == 60 * 8 * (1 + 1)
    assert sizes["lora_drop, half the layers shared"] == whole * 32 // 60  # 30 of their own, and one per type
    assert sizes["weight_lora before T"] == whole + 60
    assert sizes["weight_lora after T, top tenth"] == whole // 10
    assert sizes["weight_lora after T, 20 % spread"] == whole // 5
    lowest = {name: lowest_layer(plan) for name, plan in plans.items()}
    above = ("weight_lora after T, top tenth", "weight_lora after T, top tenth, with prefix cache")
    assert [lowest.pop(name) for name in above] == [27, 27] and set(lowest.values()) == {0}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """The second round is slow for both, the third for one: neither shows."""
    from compare_tables import ratio

    def rounds(*steps: float) -> dict[str, Any]:
        return {"rounds": [{"step": [step], "parts": [{}]} for step in steps]}

    row = {"systems": {"toolkit": rounds(1.0, 10.0, 9.0), "stock PEFT": rounds(2.0, 20.0, 2.0)}}
    assert ratio(row, "toolkit", "stock PEFT") == 0.5


def test_tables_go_between_the_markers(tmp_path: Path) -> None:
    from compare_tables import BEGIN, END, write_between_markers

    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
    page.write_text("before")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_between_markers(page, "new")


@pytest.mark.long
def test_all_systems_on_a_narrow_llama(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    stock, tuned, ours, bare = (row["systems"][name] for name in ("stock PEFT", "PEFT tuned", "toolkit", "bare base"))
    # Four layers of hidden size 64, one of two heads for keys and values, inner size 128; rank 8.
    sides = [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64]
    trained = 4 * 8 * sum(sides)
    for system in (stock, tuned, ours):
        assert system["bytes"]["gradients"] == trained * FLOAT
    counts = 2 * 4 * len(sides) * FLOAT  # a step count for each A and B
    assert stock["bytes"]["optimizer"] == tuned["bytes"]["optimizer"] == 2 * trained * FLOAT + counts
    assert bare["bytes"]["optimizer"] == bare["bytes"]["gradients"] == 0
    # The same model and the same loss, with more logits in stock PEFT's; the toolkit recomputes what is element-wise.
    assert ours["bytes"]["kept"] < bare["bytes"]["kept"] < tuned["bytes"]["kept"] < stock["bytes"]["kept"]
    for system in (stock, tuned, ours, bare):
        found = system["bytes"]
        batch = 0.001 if system is ours else 0  # the loop has made it before the step begins
        assert found["kept"] <= (1 + batch) * found["after_forward"] < found["peak"]
        assert len(system["rounds"]) == 3 and all(len(answer["step"]) == 1 for answer in system["rounds"])
        first = system["rounds"][0]["losses"][0]
        assert first == pytest.approx(stock["rounds"][0]["losses"][0], abs=0.05)
        assert {"forward", "backward"} <= system["profile"].keys()
    for part in ("forward", "backward"):
        assert stock["profile"][part]["products of rank r"] > bare["profile"][part]["products of rank r"] == 0
    table = (tmp_path / "results.md").read_text()
    assert "(≤ 0.75)" in table and "| lora | stock PEFT |" in table and "| backward | products of rank r | 0 |" in table
