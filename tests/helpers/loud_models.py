"""Models whose every layer shows in the logits: those of the other tests have weights that are nearly zero."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.tiny_run import run_settings


@pytest.fixture(scope="session")
def loud_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its weights times 10."""
    folder = tmp_path_factory.mktemp("loud") / "tiny-llama"
    shutil.copytree(model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(loud_folder: Path, data_folder: Path, tmp_path: Path) -> dict:
    """A complete tree of settings for a run on it."""
    return run_settings(loud_folder, data_folder, tmp_path / "run")
