"""What a run and its exports leave follows the umask: a colleague in the group reads it, and nobody else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparse_llm_ft.config import merge

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, sys
os.umask(int(sys.argv[1], 8))
from sparse_llm_ft.cli.main import main
run = sys.argv[3]
main(["train", "--config", sys.argv[2]])
for form in (["--to", "peft"], ["--to", "peft", "--patterns", "--output", run + "/patterns"], ["--to", "merged"]):
    main(["export", run, *form])
main(["export", run, "--to", "native"])
main(["push", run, "me/tiny", "--dry-run"])
"""


@pytest.mark.parametrize("umask", [0o027, pytest.param(0o002, marks=pytest.mark.long)])
def test_everything_that_a_run_leaves_follows_the_umask(settings: dict, tmp_path: Path, umask: int) -> None:
    training = {"max_steps": 3, "save_every": 1, "eval_every": 2}
    method = {"name": "weight_lora", "keep": 4, "steps": 2, "batch_growth": "none"}
    tree = merge(settings, {"training": training, "method": method, "report": True, "evaluation": {"samples": 2}})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    run, caches = Path(settings["output_dir"]), tmp_path / "caches"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{umask:o}", str(config), str(run)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_DATASETS_CACHE": str(caches)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    left = {path: path.stat().st_mode for folder in (run, caches) for path in (folder, *folder.rglob("*"))}
    names = {path.name for path in left}
    assert {"adapter_model.safetensors", "model.safetensors", "index.html", "tensors.safetensors"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names) and "samples.arrow" in names
    other = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(mode))
        for path, mode in left.items()
        if stat.S_IMODE(mode) != (0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask
    }
    assert not other
