"""Ctrl-C: all ranks save the step, leave together, and the same command continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.cluster.state import read_state


def test_ctrl_c_saves_the_step(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    def world(run: str, **more: Any) -> dict[str, Any]:
        return {"trees": run_settings(model_folder, data_folder, tmp_path / run), "world_size": 2} | more

    def run(worlds: dict[str, Any]) -> dict[str, list[int]]:
        return run_worlds(worlds, tmp_path / "logs", timeout=200)

    stopped = {"stopped": world("run", before=["helpers.watching", "interrupt", 3]), "plain": world("plain")}
    assert run(stopped) == {"stopped": [130, 130], "plain": [0, 0]}
    assert "SIGINT: saved step 4; the same command continues" in last_lines(tmp_path / "logs" / "stopped", 5000)
    state = read_state(tmp_path / "run")
    assert state is not None and (state.state, state.message) == ("preempted", "SIGINT: saved step 4")
    assert run({"resumed": world("run")}) == {"resumed": [0, 0]}
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "plain")]
    assert adapters[0] == adapters[1]
