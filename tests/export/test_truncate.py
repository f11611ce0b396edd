"""A smaller rank is the best one, and its error is that of ΔW."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.trained_runs import PLANS, SHAPES, make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.export.truncate import to_rank, truncated
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter

SIDES = [(30, 40, 12, 5), (40, 30, 25, 8), (9, 40, 12, 4), (40, 9, 12, 4), (12, 12, 12, 1)]


@pytest.mark.parametrize(("d_out", "d_in", "r", "rank"), SIDES)
def test_it_is_the_truncated_svd_of_the_whole_product(d_out: int, d_in: int, r: int, rank: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(r, d_in), torch.randn(d_out, r)
    new_a, new_b, values = truncated(a, b, rank)
    product = b.double() @ a.double()
    u, expected, v = torch.linalg.svd(product, full_matrices=False)
    assert new_a.shape == (rank, d_in) and new_b.shape == (d_out, rank)
    torch.testing.assert_close(values, expected[: len(values)])
    torch.testing.assert_close(
        new_b.double() @ new_a.double(), u[:, :rank] * expected[:rank] @ v[:rank], rtol=0, atol=1e-4
    )


def test_errors_are_those_of_the_products_and_smaller_ranks_stay() -> None:
    torch.manual_seed(1)
    ranks = {"x": 12, "y": 3, "zero": 12}
    weights = {}
    for name, r in ranks.items():
        a, b = torch.zeros(16, 20), torch.zeros(30, 16)
        a[:r], b[:, :r] = torch.randn(r, 20), torch.randn(30, r) * (name != "zero")
        weights |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    weights["base_model.model.head.weight"] = torch.randn(4, 20)
    new, truncation = to_rank(weights, ranks, 8)

    def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        return b @ a

    lost = {name: (product(weights, name) - product(new, name)).norm() for name in ranks}
    assert truncation.errors["x"] == pytest.approx(float(lost["x"] / product(weights, "x").norm()), rel=1e-5)
    assert truncation.errors["y"] == truncation.errors["zero"] == 0.0
    whole = torch.stack([product(weights, name).norm() for name in ranks]).norm()
    assert truncation.overall == pytest.approx(float(lost["x"] / whole), rel=1e-5)
    key = "base_model.model.y.lora_A.weight"
    assert torch.equal(new[key][:3], weights[key][:3]) and not new[key][3:].any()
    assert {t.shape for n, t in new.items() if "lora_A" in n} == {(8, 20)}
    assert torch.equal(new["base_model.model.head.weight"], weights["base_model.model.head.weight"])


def test_the_command_prints_and_writes_the_errors(settings: dict, capsys: Any) -> None:
    """Two layers of rank 12 become rank 8; the errors are those of the checkpoint's own tensors."""
    kind = "self_attn.q_proj"
    names = [f"model.layers.{layer}.{kind}" for layer in range(2)]
    make_run(settings, AdapterPlan({name: ModuleAdapter(12, 6.0) for name in names}))
    main(["export", settings["output_dir"], "--rank", "8"])
    printed = capsys.readouterr()
    folder = Path(json.loads(printed.out)["folder"])
    tensors = read_run(settings["output_dir"]).state.tensors
    written = json.loads((folder / "truncation.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    for name in names:
        delta = 0.5 * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
        a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape == (8, SHAPES[kind][1])
        error = float((delta - b @ a).norm() / delta.norm())
        assert 0.01 < error < 1 and written["relative_error_by_module"][name] == pytest.approx(error, rel=1e-4)
    worst = max(names, key=written["relative_error_by_module"].__getitem__)
    line = f"rank 8: relative error of ΔW {written['relative_error']:.4f} over all modules, at most "
    assert f"{line}{written['relative_error_by_module'][worst]:.4f} ({worst})" in printed.err
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)


def test_a_larger_rank_only_adds_zeros(settings: dict, tmp_path: Path) -> None:
    make_run(settings, PLANS["lora"])
    run = read_run(settings["output_dir"])
    export_run(run, tmp_path / "a", ExportOptions())
    export_run(run, tmp_path / "b", ExportOptions(rank=48))
    plain, padded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, tensor in plain.items():
        rows, columns = tensor.shape
        assert torch.equal(padded[name][:rows, :columns], tensor)
        assert float(padded[name].abs().sum()) == pytest.approx(float(tensor.abs().sum()))
    written = json.loads((tmp_path / "b" / "truncation.json").read_text())
    assert written["relative_error"] == 0.0
