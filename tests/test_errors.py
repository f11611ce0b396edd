"""Bad input through the command itself: one line, exit status 2, nothing written, no rank left hanging."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from helpers.fork_server import run_script
from helpers.launching import TRAIN, launch


def edited(settings: dict, changes: dict) -> dict:
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            settings[section][name] = value
        else:
            settings[section] = value
    return settings


def run(settings: dict, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what is refused before torch is imported takes no longer than that."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return subprocess.run(
        [sys.executable, str(TRAIN), "--config", str(config), *arguments], capture_output=True, text=True, timeout=120
    )


def assert_one_line(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr[-2000:]
    assert "Traceback" not in result.stderr and result.stdout == ""


def assert_one_line_after_imports(settings: dict, tmp_path: Path, message: str) -> None:
    """In a fork of a process that has imported everything."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    status, output = run_script(TRAIN, ["--config", str(config)], tmp_path / f"logs-{uuid4()}")
    assert status == 2, output
    header, *lines = output.splitlines()
    assert header == "rank-0.log:" and len(lines) == 1, output
    assert lines[0].startswith("error: ") and message in lines[0], output


WEIGHT = {"name": "weight_lora", "keep": 2, "steps": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.learning_rat": 1}, "training.learning_rat: unknown key; did you mean learning_rate?"),
        ({"adapter.r": "four"}, "adapter.r: 'four' is not allowed"),
        ({"training.micro_batch_size": 3}, "training.global_batch_size: 8 is not a multiple of"),
        ({"method": WEIGHT | {"steps": 8}}, "method.steps: 8 is not before the run's end at step 8"),
        ({"task.path": "nowhere"}, "task.path: 'nowhere' is not a folder"),
        ({"model.name": "./nowhere"}, "model.name: './nowhere' has no config.json"),
        ({"training.eval_every": 1, "task.name": "dialogsun"}, "did you mean dialogsum?"),
    ],
)
def test_before_torch_is_imported(settings: dict, tmp_path: Path, changes: dict, message: str) -> None:
    started = time.monotonic()
    assert_one_line(run(edited(settings, changes), tmp_path), message)
    assert time.monotonic() - started < 60  # a hang, not a speed limit: torch and peft alone take ten seconds
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize("command", ["train", "check", "plan", "derive", "fetch"])
def test_a_wrong_setting_is_told_by_every_command_without_torch(command: str, settings: dict, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(edited(settings, {"training.learning_rat": 1})))
    code = "import sys; sys.modules.update(torch=None, transformers=None, peft=None, deepspeed=None); "
    code += f"from sparse_llm_ft.cli.main import main; main(['{command}', '--config', 'run.yaml'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "training.learning_rat: unknown key" in result.stderr, result.stderr[-2000:]


def test_settings_data_and_folder_are_checked_without_torch(settings: dict) -> None:
    code = (
        "import sys, json\n"
        "from sparse_llm_ft.config import parse_config\n"
        "from sparse_llm_ft.distributed.world import find_world\n"
        "from sparse_llm_ft.context.preflight import preflight\n"
        "import sparse_llm_ft.cli.main\n"
        "preflight(parse_config(json.loads(sys.argv[1])), find_world())\n"
        "slow = {'torch', 'transformers', 'peft', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)\n"
    )
    import json

    result = subprocess.run([sys.executable, "-c", code, json.dumps(settings)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": WEIGHT | {"keep": 15}}, "method.keep: 15 is more than the 14 adapters"),
        pytest.param(
            {"adapter.target_modules": ["query"]},
            "adapter.target_modules: 'query' matches no linear layer",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"model.attn_implementation": "sdpaa"},
            "model.attn_implementation: 'sdpaa' cannot be used",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"deepspeed": {"zero_optimization": {"overlap_com": True}}},
            "deepspeed.zero_optimization.overlap_com: unknown key; did you mean overlap_comm?",
            marks=pytest.mark.long,
        ),
        (
            {"deepspeed": {"zero_optimization": {"reduce_bucket_size": "big"}}},
            "deepspeed.zero_optimization.reduce_bucket_size: 'big' is not allowed",
        ),
    ],
)
def test_what_only_the_architecture_shows_is_said_before_weights_are_loaded(
    settings: dict, tmp_path: Path, changes: dict, message: str
) -> None:
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for path in Path(settings["model"]["name"]).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    assert_one_line_after_imports(edited(settings, changes | {"model.name": str(folder)}), tmp_path, message)
    assert not Path(settings["output_dir"]).exists()


def test_an_encoder_and_a_folder_without_weights_are_refused(settings: dict, tmp_path: Path) -> None:
    from transformers import BertConfig

    for name, message in (("encoder", "is an encoder (bert)"), ("empty", "has no weights")):
        folder = tmp_path / name
        folder.mkdir()
        for path in Path(settings["model"]["name"]).iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        if name == "encoder":
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            BertConfig(architectures=["BertForMaskedLM"], **sizes).save_pretrained(folder)
        assert_one_line_after_imports(edited(settings, {"model.name": str(folder)}), tmp_path, message)
    assert not Path(settings["output_dir"]).exists()


def test_a_bad_row_is_named_with_file_and_line(settings: dict, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in Path(settings["task"]["path"]).iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    with (data / "train.jsonl").open("a") as file:
        file.write('{"text": \n')
    assert_one_line_after_imports(edited(settings, {"task.path": str(data)}), tmp_path, "train.jsonl:41: not JSON")


def test_wrong_arguments_are_one_line_too(settings: dict, tmp_path: Path) -> None:
    assert_one_line(run(settings, tmp_path, "--confg", "x"), "unrecognized arguments: --confg")
    assert_one_line(run(settings, tmp_path, "training.max_steps"), "no such file")
    assert_one_line(run(settings, tmp_path, "training.max_stps=3"), "did you mean max_steps?")


def test_another_run_in_the_folder_is_refused_and_untouched(settings: dict, tmp_path: Path) -> None:
    output = Path(settings["output_dir"])
    output.mkdir()
    (output / "config.yaml").write_text(yaml.safe_dump(edited(settings, {"seed": 5})))
    assert_one_line(run(settings, tmp_path), "holds another run")
    assert [path.name for path in output.iterdir()] == ["config.yaml"]


@pytest.mark.distributed
def test_two_ranks_say_it_once_and_leave(settings: dict, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(edited(settings, {"training.learning_rat": 1})))
    result = launch(TRAIN, "--config", str(config), timeout=90)
    assert result.returncode == 2
    assert result.stdout.count("error: ") == 1, result.stdout[-2000:]
    assert "training.learning_rat: unknown key" in result.stdout
