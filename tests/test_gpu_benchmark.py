"""benchmarks/gpu on the CPU, with a tiny Llama: the same code, so that it works where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GPU / script), "--device", "cpu", "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_flops_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 operations for each weight and token forward, 2 backward; Llama-3-8B is known: 33.4 GFLOP a token with LoRA on
    all layers at length 4096, 33.3 of them where the survivors reach the lowest layer.
    """
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.syspath_prepend(str(GPU.parent))
    import base
    import bases

    config = bases.llama_3_8b()
    whole = base.step_flops(config, tokens=1, length=4096, supervised=1.0, lowest=0)
    top = base.step_flops(config, tokens=1, length=4096, supervised=1.0, lowest=29)
    assert whole == pytest.approx(33.3e9, rel=0.01) and top == pytest.approx(18.8e9, rel=0.02)


def test_one_system() -> None:
    result = run("speed.py", "--system", "weight_lora after T, top tenth", "--quantization", "nf4")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["step_ms"] > 0 and found["losses"][0] == pytest.approx(6.25, abs=0.2)  # log 512
    assert any("aten::mm" in row["name"] for row in found["profile"])


@pytest.mark.long
def test_all_of_it(tmp_path: Path) -> None:
    result = run("run.py", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert "0 failed" in found["correctness"] and len(found["speed"]) == 4
    assert "| none | lora |" in (tmp_path / "results.md").read_text()
