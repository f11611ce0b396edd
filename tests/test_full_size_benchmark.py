"""The full-size benchmark's settings are a run, and its shortened model is the first layers of the given one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from full_size import KILLED_AT, STEPS, T, shortened, show, write_settings  # noqa: E402

from sparse_llm_ft.config import ModelConfig, check_steps, parse_config  # noqa: E402
from sparse_llm_ft.model.loading import empty_model  # noqa: E402


@pytest.mark.parametrize(("layers", "keep"), [(32, 22), (8, 5), (1, 1)])
def test_its_settings_are_a_run_across_a_change_of_phase(tmp_path: Path, layers: int, keep: int) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    options = argparse.Namespace(dtype="bfloat16", checkpointing=False, ranks=2)
    config = parse_config(json.loads(write_settings(tmp_path, model, options).read_text()))
    check_steps(config, STEPS)
    assert config.method[0].keep == keep and 7 * layers >= keep
    assert T < KILLED_AT < STEPS  # killed in the second phase, with a step left for the resumed run


def test_a_shortened_model_has_the_first_layers_files_alone(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in model_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    names = ["model.embed_tokens.weight", "lm_head.weight", *(f"model.layers.{i}.x.weight" for i in range(3))]
    weights = {name: f"{name}.safetensors" for name in names}
    for file in weights.values():
        (source / file).write_bytes(b"")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    folder = shortened(source, 1, tmp_path / "short")
    kept = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert kept == {name: weights[name] for name in names[:3]}
    assert {file.name for file in folder.glob("*.safetensors")} == set(kept.values())

    assert empty_model(ModelConfig(name=str(folder))).config.num_hidden_layers == 1
    assert shortened(source, 1, folder) == folder  # a second call finds its links


def test_the_table_has_each_stretch_of_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"peak": 2 * 2**30, "stays": 2**30, "cpu": 1.0}
    lines = [
        sizes | {"rank": rank, "stretch": stretch, "seconds": 1.5 + rank, "peak": (2 + rank) * 2**30}
        for stretch in ("the rest", "load", "the rest", "forward")
        for rank in (1, 0)
    ]
    (tmp_path / "marks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| load | 2.00 (1.00) | 3.00 (1.00) | 1.5 (1.0) |",
        "| forward | 2.00 (1.00) | 3.00 (1.00) | 1.5 (1.0) |",
    ]
