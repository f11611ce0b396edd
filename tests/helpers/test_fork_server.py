"""Worlds in forks end as they would under a launcher: trained, refused, or still running when time is up."""

from __future__ import annotations

from pathlib import Path

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines


def test_statuses_of_a_run_a_refusal_and_a_run_that_takes_too_long(settings: dict, tmp_path: Path) -> None:
    refused = settings | {"output_dir": str(tmp_path / "refused"), "training": settings["training"] | {"max_steps": 0}}
    behind, slow = (settings | {"output_dir": str(tmp_path / name)} for name in ("behind", "slow"))
    worlds = {
        "trained": {"trees": settings, "world_size": 2},
        "refused": {"trees": [refused, behind], "world_size": 2},
        "slow": {"trees": slow, "world_size": 2, "timeout": 0.2},
    }
    statuses = run_worlds(worlds, tmp_path / "logs")
    assert statuses["trained"] == [0, 0], last_lines(tmp_path / "logs" / "trained")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert statuses["refused"] == [2, -15]  # rank 0 says it, the launcher ends the other
    assert "error: training.max_steps" in last_lines(tmp_path / "logs" / "refused")
    assert not (tmp_path / "behind").exists()
    assert statuses["slow"] == []
    assert "in _train" in last_lines(tmp_path / "logs" / "slow")
