"""What is wrong with columns is said from the first row, before anything slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny_files import write_rows
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.context.preflight import preflight
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import DataError


def test_references_that_a_user_names_must_be_there(settings: dict) -> None:
    settings["task"]["references"] = ["othr"]
    config = parse_config(settings)
    with pytest.raises(DataError, match=r"test.jsonl:1: task.references: no column 'othr'; found text, answer"):
        preflight(config, World(0, 1, 0, 1))


def test_a_column_whose_name_no_template_can_have_is_said(settings: dict, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"my col": "anna", "text": "anna", "answer": "tom"}])
    settings["task"]["path"] = str(tmp_path)
    settings["task"]["prompt"] = "{text} {my col}"
    with pytest.raises(DataError, match=r"train.jsonl:1: \{my col\} in task.prompt: expected \{column\}"):
        preflight(parse_config(settings), World(0, 1, 0, 1))
    settings["task"]["prompt"] = '{text} {"json": 1}'
    preflight(parse_config(settings), World(0, 1, 0, 1))
