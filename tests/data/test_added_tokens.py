"""Tokens without embedding are one line before training, with how many rows have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.contexts import open_context
from helpers.tiny_files import grow_tokenizer
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.dataset import SplitBuilder
from sparse_llm_ft.data.rows import Example
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.training.run import Run


@pytest.fixture
def added(settings: dict, model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose tokenizer has two tokens more than the model has embeddings."""
    settings["model"]["name"] = str(grow_tokenizer(model_folder, tmp_path / "added"))
    settings["task"]["path"] = str(tmp_path / "data")
    (tmp_path / "data").mkdir()
    return settings


def prepare(settings: dict, texts: list[str]) -> Run:
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": "anna", "answer": text}) + "\n" for text in texts]
        (Path(settings["task"]["path"]) / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return Run.prepare(open_context(parse_config(settings), World(0, 1, 0, 1)))


def test_rows_with_tokens_beyond_the_embeddings_are_counted(added: dict) -> None:
    message = (
        r"model.name: .*has embeddings for \d+ tokens, and 2 of 4 train samples have .*, such as '<think>' \(id \d+\)"
    )
    with pytest.raises(ConfigError, match=message + "; set model.resize_embeddings: true"):
        prepare(added, ["red", "<think> red", "book", "<think> red </think>"])


def test_a_larger_tokenizer_is_no_problem_if_no_row_has_its_tokens(added: dict) -> None:
    assert len(prepare(added, ["red", "book"]).splits.train) == 2


def test_streamed_and_given_rows_are_checked_one_by_one(added: dict) -> None:
    run = prepare(added, ["red"])
    context = run.context
    parts = (context.config, context.task, context.tokenizer, context.task_mode)
    builder = SplitBuilder(*parts, embeddings=context.embeddings)
    with pytest.raises(ConfigError, match=r"a row has tokens beyond them, such as '</think>'"):
        list(builder.samples_of([Example("anna", "</think> red", ())]))
    with pytest.raises(ConfigError, match=r"a row has tokens beyond them"):
        builder._encode_checked(Example("<think>", "red", ()))
    assert len(list(SplitBuilder(*parts).samples_of([Example("anna", "</think>", ())]))) == 1
