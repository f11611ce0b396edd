"""Any text as a config file or an override, any tree as settings: a config that survives its own file, or one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.inputs import VALUES, is_one_line, wounded
from sparse_llm_ft.config import dump_config, load_config, parse_config, split_arguments
from sparse_llm_ft.errors import ConfigError, UserError
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_yaml
from sparse_llm_ft.methods.partial_lora import read_table
from sparse_llm_ft.scoring.ratios import ratios_from_table

TREE = {
    "model": {"name": "org/model", "revision": "main", "dtype": "float32"},
    "task": {"name": "custom", "prompt": "{text}", "completion": "{answer}", "labels": ["no", "yes"], "path": None},
    "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    "method": [
        {"name": "partial_lora", "ratios": "derived", "cache_dir": "~/cache", "shots": 3},
        {"name": "weight_lora", "keep": 2, "steps": 3},
    ],
    "training": {"micro_batch_size": 2, "global_batch_size": 8, "max_steps": 8, "learning_rate": 0.01, "epochs": 2.0},
    "evaluation": {"samples": 5},
    "deepspeed": {"zero_stage": 1, "zero_optimization": {"overlap_comm": True}, "tensorboard": {"job_name": "x"}},
    "output_dir": "runs/x",
    "seed": 3,
}
YAML_TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="{}[]&*!<>|:?-,'\"#%@` \n\tab01.~=", max_size=60),
    VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True)),
    wounded(TREE).map(yaml.safe_dump),
)


def survives(tree: Any) -> None:
    try:
        config = parse_config(tree)
    except UserError as error:
        assert is_one_line(error)
    else:
        assert parse_config(parse_yaml(dump_config(config))) == config


def test_the_unwounded_tree_is_good() -> None:
    survives(TREE)
    assert parse_config(TREE).seed == 3


@given(wounded(TREE))
def test_settings(tree: dict) -> None:
    survives(tree)


@given(st.dictionaries(st.sampled_from([*TREE, "seed ", "Model"]), VALUES, max_size=4))
def test_sections_of_anything(tree: dict) -> None:
    survives(TREE | tree)


def bomb(kind: str) -> str:
    """Nine levels of aliases, each to ten of the level below: a billion values in 400 bytes."""
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 10):
        many = ", ".join([f"*a{i - 1}"] * 10)
        lines.append(f"a{i}: &a{i} " + (f"[{many}]" if kind == "list" else f"{{<<: [{many}], y{i}: 1}}"))
    return "\n".join(lines)


@settings(max_examples=80)
@given(YAML_TEXTS)
@example(bomb("list"))
@example(bomb("merge"))
@example("model: &m {name: *m}")
@example("model: &m [*m]")
@example("a: " + "[" * 600)
@example("{" * 600)
@example("seed: " + "9" * 5000)
@example("seed: 2001-99-99")
@example("seed: !!timestamp x")
@example("seed: !!bool x")
@example("seed: !!int {a: 1}")
@example("seed: !!python/object/apply:os.system [id]")
@example("seed: !!binary x")
@example("? [a]\n: 1")
@example("1: 2")
@example("model: {on: 1}")
@example("seed: 1e999\ntraining: {learning_rate: 1.0e+999}")
@example("\ufeffseed: 1\0")
@example("- a")
def test_config_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config([str(path)])
    except UserError as error:
        assert is_one_line(error)
    try:
        ratios_from_table(read_table(str(path)), ["h.0.q"])
    except ConfigError as error:
        assert is_one_line(error)


@given(st.binary(max_size=40))
def test_config_files_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        load_config([str(path)])
    assert is_one_line(error.value)


@given(st.text(max_size=30), YAML_TEXTS)
@example("a." * 5000 + "b", "1")
@example("task.prompt", "x" * 5000)
@example("..", "1")
@example("model.name", "~nobody_at_all/x")
def test_overrides(key: str, value: str) -> None:
    try:
        load_config(*split_arguments([f"{key}={value}"]))
    except UserError as error:
        assert is_one_line(error)


@settings(max_examples=60)
@given(VALUES)
def test_yaml_of_any_value_is_read_back_or_refused(value: Any) -> None:
    try:
        read = parse_yaml(yaml.safe_dump(value, allow_unicode=True, sort_keys=False))
    except ParseError:
        return
    assert repr(read) == repr(value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    with pytest.raises(UserError, match="larger than 1,048,576 bytes"):
        load_config([str(path)])
