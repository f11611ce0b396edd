"""Ctrl-C, a closed terminal, a broken pipe: all ranks save the step, leave together, and the same command continues."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import yaml

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.cluster.state import read_state

LEFT = {"SIGINT": 130, "SIGHUP": 75, "SIGPIPE": 75}
"""What a run is asked to leave by, and its status."""


def test_who_is_asked_to_leave_saves_the_step(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    def world(run: str, **more: Any) -> dict[str, Any]:
        config = tmp_path / f"{run}.yaml"
        config.write_text(yaml.safe_dump(run_settings(model_folder, data_folder, tmp_path / run)))
        return {"trees": {"command": ["train", "--config", str(config)]}, "world_size": 2} | more

    def run(worlds: dict[str, Any]) -> dict[str, list[int]]:
        return run_worlds(worlds, tmp_path / "logs", timeout=400)

    asked = {name: ["helpers.watching", "interrupt", 3, int(signal.Signals[name])] for name in LEFT}
    asked["SIGPIPE"] = ["helpers.watching", "lose_output", 3]
    worlds = {name: world(name, before=before) for name, before in asked.items()}
    assert run(worlds | {"plain": world("plain")}) == {name: [n, n] for name, n in (LEFT | {"plain": 0}).items()}
    assert "SIGINT: saved step 4; the same command continues" in last_lines(tmp_path / "logs" / "SIGINT", 5000)
    for name in LEFT:
        state = read_state(tmp_path / name)
        assert state is not None and (state.state, state.message) == ("preempted", f"{name}: saved step 4")

    assert run({name: world(name) for name in LEFT}) == {name: [0, 0] for name in LEFT}
    adapters = {(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in (*LEFT, "plain")}
    assert len(adapters) == 1


VALIDATED = {
    "in-the-step-before": ["helpers.watching", "interrupt", 3, int(signal.SIGTERM)],
    "in-the-loss": ["helpers.watching", "interrupt_validation", int(signal.SIGTERM)],
    "in-the-metric": ["helpers.watching", "interrupt_validation", int(signal.SIGTERM), "predict", 3],
}
"""Where a signal comes; `predict` is called once before training."""


def test_a_validation_makes_nobody_wait_who_asks_to_leave_and_is_not_lost(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The step is saved without it, and the resumed run begins with it: same lines, same best step."""

    def world(run: str, **more: Any) -> dict[str, Any]:
        tree = run_settings(model_folder, data_folder, tmp_path / run)
        tree["training"] |= {"eval_every": 2, "keep_best": "rougeL"}
        return {"trees": tree, "world_size": 2} | more

    def run(worlds: dict[str, Any]) -> dict[str, list[int]]:
        return run_worlds(worlds, tmp_path / "logs", timeout=400)

    worlds = {name: world(name, before=before) for name, before in VALIDATED.items()}
    assert run(worlds | {"plain": world("plain")}) == {"plain": [0, 0]} | {name: [75, 75] for name in VALIDATED}
    for name in VALIDATED:
        assert "SIGTERM: saved step 4; the same command continues" in last_lines(tmp_path / "logs" / name, 5000)
        assert [line["step"] for line in lines(tmp_path / name)] == [1, 2, 3]
        state = read_state(tmp_path / name)
        assert state is not None and (state.state, state.step) == ("preempted", 4)

    assert run({name: world(name) for name in VALIDATED}) == {name: [0, 0] for name in VALIDATED}
    plain = json.loads((tmp_path / "plain" / "summary.json").read_text())
    for name in VALIDATED:
        assert lines(tmp_path / name) == lines(tmp_path / "plain")
        assert json.loads((tmp_path / name / "summary.json").read_text())["best"] == plain["best"]


def lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without times and memory."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "peak_memory_bytes", "mfu")
    return [{key: value for key, value in line.items() if key not in timed} for line in found]
