"""`sparse-llm-ft derive`: what two ranks derive is what a later run, or one rank, finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.cli.main import main as command_line
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.planning.opening import open_for_planning
from sparse_llm_ft.planning.phases import foresee_phases
from sparse_llm_ft.planning.samples import sample_sizes

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(model_folder: Path, data_folder: Path, tmp_path: Path) -> Path:
    tree = run_settings(model_folder, data_folder, tmp_path / "run")
    tree["method"] = {"name": "partial_lora", "floor_metric": "loss", "shots": 6, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


@pytest.fixture
def encoder(encoder_folder: Path, labelled_folder: Path, tmp_path: Path) -> Path:
    """A fresh head is fitted on half of D_t; the joint search runs on the other half."""
    tree = run_settings(encoder_folder, labelled_folder, tmp_path / "run")
    labels, texts = ["no", "yes"], ["sentence"]
    tree["task"] = {"name": "custom", "path": str(labelled_folder), "labels": labels, "texts": texts, "max_length": 32}
    tree["method"] = {"name": "partial_lora", "derivation": "joint", "floor_metric": "loss", "shots": 5}
    tree["method"]["cache_dir"] = str(tmp_path / "encoder-cache")
    tree["evaluation"]["samples"] = 0
    (tmp_path / "encoder.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "encoder.yaml"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`derive` in this process makes it a world of one; later tests start worlds of their own."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)


def test_two_ranks_derive_and_one_finds_it(config: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = config.parent / "logs"
    worlds = {
        path.stem: {"trees": {"command": ["derive", "--config", str(path)]}, "world_size": 2}
        for path in (config, encoder)
    }
    statuses = run_worlds(worlds, logs)
    for path, cache, count in ((config, "cache", 14), (encoder, "encoder-cache", 13)):
        output = last_lines(logs / path.stem, 10_000)
        assert statuses[path.stem] == [0, 0], output
        assert "rows kept" in output and ("self_attn.q_proj" if path is config else "self.query") in output
        assert not (config.parent / "run").exists()
        (entry,) = (folder for folder in (config.parent / cache).iterdir() if folder.is_dir())
        found = json.loads((entry / "derivation.json").read_text())
        assert len(found["ratios"]) == count
        assert all(0 <= share <= 1 for pair in found["ratios"].values() for share in pair)
        if path is encoder:  # of five samples of each of two classes, three fit the head
            assert found["samples"] == 4 and "deriving on 4 samples beside the 6 that the head was" in output
        zeros = sum(share == 0 for pair in found["ratios"].values() for share in pair)
        assert (f"warning: {zeros} of {2 * count} ratios are 0 (" in output) == (zeros > 0)
        assert output.count("ratios are 0 (") == (zeros > 0)  # of one rank
    # One rank finds both: the decoder's in this process, the encoder's in another, as DeepSpeed starts once in each.
    capsys.readouterr()
    command_line(["derive", "--config", str(config)])
    assert f"ratios of 14 modules are in {config.parent / 'cache'}" in capsys.readouterr().out
    assert run_worlds({"again": worlds["encoder"] | {"world_size": 1}}, logs) == {"again": [0]}
    assert f"ratios of 13 modules are in {config.parent / 'encoder-cache'}" in last_lines(logs / "again", 10_000)
    for path, cache in ((config, "cache"), (encoder, "encoder-cache")):
        foreseen_from_the_cache(path, config.parent / cache)


def foreseen_from_the_cache(path: Path, cache: Path) -> None:
    """A forecast knows these ratios, and without the cache assumes that everything is kept."""
    world, tree = World(0, 1, 0, 1), yaml.safe_load(path.read_text())
    context = open_for_planning(parse_config(tree), world)
    *_, last = foresee_phases(context, 1, sample_sizes(context))
    assert last.assumption == "every module keeps what the derivation in the cache says"
    kept = [side for a in last.phase.plan.active.values() for side in (a.rows, a.cols) if side is not None]
    assert any(0 < len(side.indices) < side.size for side in kept)  # each is drawn with its ratio
    tree["method"]["cache_dir"] = str(cache / "empty")
    context = open_for_planning(parse_config(tree), world)
    *_, last = foresee_phases(context, 1, sample_sizes(context))
    assert last.assumption.endswith("the most that a derivation can leave")


def test_a_run_that_trains_rows_of_its_embeddings_finds_what_was_derived(config: Path, encoder: Path) -> None:
    """The key has their values, of these rows alone; and no others are trained with a head."""
    worlds: dict[str, dict] = {}
    for path in (config, encoder):
        tree = yaml.safe_load(path.read_text())
        tree["adapter"]["trainable_tokens"] = ["red"]
        tree["training"]["max_steps"] = 1
        tree["output_dir"] = f"{tree['output_dir']}-{path.stem}"
        path.write_text(yaml.safe_dump(tree))
        first = {"command": ["derive", "--config", str(path)]}
        worlds[path.stem] = {"trees": [first, tree], "world_size": 1}
    statuses = run_worlds(worlds, config.parent / "logs")
    for path, count in ((config, 14), (encoder, 13)):
        output = last_lines(config.parent / "logs" / path.stem, 20_000)
        assert statuses[path.stem] == [0], output
        assert output.count("deriving on ") == 1 and f"ratios of {count} modules are in " in output


def test_a_method_that_derives_nothing_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line(["derive", "--config", str(config), "method.name=lora"])
    assert error.value.code == 2
    assert "method.name: lora derives nothing before it trains" in capsys.readouterr().err
