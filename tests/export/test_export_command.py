"""`export` as it is typed: where it writes, and what it refuses in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.cli.main import main


@pytest.mark.parametrize("to", ["peft", "merged", "native"])
def test_it_writes_beside_the_run_and_never_over_anything(to: str, settings: dict, capsys) -> None:
    make_run(settings, PLANS["lora"])
    run = Path(settings["output_dir"])
    before = set(run.rglob("*"))
    main(["export", str(run), "--to", to])
    folder = run / f"export-{to}"
    assert json.loads(capsys.readouterr().out) == {"to": to, "folder": str(folder), "step": 8}
    assert set(run.rglob("*")) - before == {folder, *folder.iterdir()}
    weights = next(folder.glob("*.safetensors"))
    written = weights.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--to", to])
    assert stop.value.code == 2 and weights.read_bytes() == written
    assert capsys.readouterr().err == f"error: --output {folder}: exists; choose a new folder\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf"], "--to gguf: expected peft, merged, native"),
        (["--to", "merged", "--patterns"], "--patterns: --to merged writes no stock adapter; expected --to peft"),
        (["--to", "native", "--rank", "8"], "--rank 8: --to native writes no stock adapter; expected --to peft"),
        (["--patterns", "--for", "vllm"], "--patterns: --for vllm gives all modules one rank; expected one of the two"),
        (["--rank", "20"], "--rank 20: expected 8 or a multiple of 16, up to 512"),
        (["--rank", "528"], "--rank 528: expected 8 or a multiple of 16, up to 512"),
        (["--for", "onnx"], "--for onnx: expected vllm, sglang, llama.cpp, ollama, tgi"),
        (["--to", "merged", "--max-shard-size", "big"], "--max-shard-size big: expected a size such as 5GB"),
        (["--max-shard-size", "1GB"], "--max-shard-size 1GB: --to peft writes one file; expected --to merged"),
        (["--output", "x" * 300], f"{'x' * 300}: too long for a path"),
        (["--output", "."], "--output .: exists"),
        (["--output", "/dev/null/export"], "--output /dev/null/export: cannot be written"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, settings: dict, capsys) -> None:
    make_run(settings, PLANS["lora"])
    with pytest.raises(SystemExit) as stop:
        main(["export", settings["output_dir"], *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith(f"error: {message}")


def test_what_is_no_run_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    """So that it comes within a second: the commands are called with torch made unimportable."""
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.yaml").write_text("model: {name: x}\n")
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from sparse_llm_ft.cli.run_commands import add_commands
from sparse_llm_ft.errors import UserError
import argparse
parser = argparse.ArgumentParser()
add_commands(parser.add_subparsers())
for arguments in (line.split() for line in sys.argv[1:]):
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(error)
"""
    calls = [f"{name} {tmp_path / run}{rest}" for name, rest in (("export", ""), ("generate", " x"), ("push", " a/b"))
             for run in ("none", "fresh")]  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code, *calls], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    none = f"{tmp_path / 'none'}: no config.yaml; expected a run's output_dir"
    assert result.stdout.splitlines() == [none, f"{tmp_path / 'fresh'}: no checkpoint yet"] * 3
