"""Two ranks, of one node or of two: a base that is staged, and the reason when one of them fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from sparse_llm_ft.cli.run_commands import _with_settings
from sparse_llm_ft.config import merge

pytestmark = pytest.mark.distributed
APART = "helpers.ranks_apart"


def logs(folder: Path, name: str) -> list[str]:
    return [(folder / name / f"rank-{rank}.log").read_text() for rank in (0, 1)]


def errors(texts: list[str]) -> list[list[str]]:
    """The error lines of each rank."""
    return [[line for line in text.splitlines() if line.startswith("error: ")] for text in texts]


def copies(disk: Path) -> list[Path]:
    return [path for path in disk.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_the_first_rank_copies_the_base_and_all_read_the_copy(
    stage: int, settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    disk, run = tmp_path / "disk", Path(settings["output_dir"])
    staged = merge(settings, {"model": {"stage_to": str(disk)}, "deepspeed": {"zero_stage": stage}})
    staged = merge(staged, {"training": {"max_steps": 2}, "evaluation": {"samples": 2}})
    worlds = {
        "run": {"trees": staged, "world_size": 2, "before": [APART, "opened_files", str(tmp_path)]},
        "again": {"trees": merge(staged, {"model": {"stage_to": None}}), "world_size": 2},
        "evaluate": {
            "trees": {"command": ["evaluate", str(run), f"model.stage_to={disk}"]},
            "world_size": 2,
            "before": [APART, "opened_files", str(tmp_path)],
        },
    }
    statuses = run_worlds(dict(list(worlds.items())[:2]), tmp_path / "logs")
    assert statuses == {"run": [0, 0], "again": [0, 0]}, last_lines(tmp_path / "logs" / "run")
    assert "is complete; nothing to do" in logs(tmp_path / "logs", "again")[0]  # the setting is free to change

    (copy,) = copies(disk)
    source, target = str(model_folder / "model.safetensors"), str(copy / "model.safetensors")
    first, second = ((tmp_path / f"opened-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first.count(source) == 1 and source not in second  # rank 0 copies it
    assert target in first and (target in second) == (stage == 2)  # at stage 3 one rank reads for the node

    # The run knows nothing of the copy.
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(model_folder)
    assert json.loads((run / "summary.json").read_text())["model"] == str(model_folder)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["stage_to"] == str(disk)
    written = [path for path in run.rglob("*") if path.is_file()]
    assert written and not [path for path in written if copy.name.encode() in path.read_bytes()]
    assert _with_settings(run / "config.yaml", []).model.stage_to is None  # a folder does not say where to write

    for rank in (0, 1):
        (tmp_path / f"opened-{rank}").unlink()
    statuses = run_worlds({"evaluate": worlds["evaluate"]}, tmp_path / "logs")
    assert statuses["evaluate"] == [0, 0], last_lines(tmp_path / "logs" / "evaluate")
    opened = [(tmp_path / f"opened-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert target in opened[0] and not any(source in names for names in opened) and copies(disk) == [copy]


def test_one_line_names_the_rank_that_failed_and_why(settings: dict, tmp_path: Path) -> None:
    """In a collective, on another node; and outside of one, where the others wait in the next."""
    disk = tmp_path / "disk"
    short = merge(settings, {"training": {"max_steps": 1}, "evaluation": {"samples": 0}})
    staged = merge(short, {"model": {"stage_to": "$DISK"}})

    def world(name: str, tree: dict, before: list) -> dict:
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree | {"output_dir": str(tmp_path / name)}))
        command = {"command": ["train", "--config", str(config)]}
        return {"trees": command, "world_size": 2, "before": [APART, *before]}

    worlds = {
        "both": world("both", staged, ["nodes_of_one_rank", str(disk), str(disk)]),
        "second": world("second", staged, ["nodes_of_one_rank", str(disk), "/proc/staged"]),
        "load": world("load", short, ["failing_load", "UserError", "weights: cut short"]),
        "ours": world("ours", short, ["failing_load", "RuntimeError", "out of memory\nreally"]),
    }
    statuses = run_worlds(worlds, tmp_path / "logs")
    assert statuses == {"both": [0, 0], "second": [2, 2], "load": [2, 2], "ours": [1, 1]}, statuses
    assert len(copies(disk)) == 1  # two nodes that share a disk, at the same time

    for name, said in (
        ("second", ["model.stage_to: '$DISK': ", "cannot be copied there on "]),
        ("load", ["weights: cut short"]),
        ("ours", ["RuntimeError: out of memory really"]),
    ):
        texts = logs(tmp_path / "logs", name)
        ((line,), silent) = errors(texts)
        assert line.startswith("error: rank 1 (") and all(part in line for part in said), line
        assert not silent and "Traceback" not in texts[0], (name, texts)
        assert ("Traceback" in texts[1]) == (name == "ours")
