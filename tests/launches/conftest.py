"""One finished two-rank run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.launching import TRAIN, last_lines, launch
from helpers.made_once import made_once
from helpers.tiny_run import run_settings


@pytest.fixture(scope="session")
def plus_settings(model_folder: Path, data_folder: Path) -> dict:
    """weight_lora_plus in 14 steps: 14 adapters, 4 kept after step 6, a checkpoint every 4 steps, dropout on."""
    settings = run_settings(model_folder, data_folder, Path("to be set"))
    settings["method"] = {"name": "weight_lora_plus", "keep": 4, "steps": 6, "cut_after": 2, "omega_lr": 0.5}
    settings["report"] = True
    settings["training"] |= {"max_steps": 14, "save_every": 4, "eval_every": 7, "warmup_steps": 2}
    return settings


@pytest.fixture(scope="session")
def finished_run(plus_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run of `plus_settings` on two ranks with ZeRO-2, under the real launcher."""

    def make(folder: Path) -> None:
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(plus_settings | {"output_dir": str(folder / "run")}))
        result = launch(TRAIN, "--config", str(config))
        assert result.returncode == 0, last_lines(result)

    return made_once(tmp_path_factory, "finished", make) / "run"
