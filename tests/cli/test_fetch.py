"""`fetch`: a run's model and data are in the caches afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny_run import run_settings
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.config.schema import ModelConfig
from sparse_llm_ft.data import dataset
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.base_files import fetch_model


def test_the_data_are_tokenised_once(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tree = run_settings(model_folder, data_folder, tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    main(["fetch", "--config", str(config), "--processes", "2"])
    said = capsys.readouterr().out
    assert f"model: {model_folder} (" in said and "40 training samples" in said and "HF_HUB_OFFLINE=1" in said
    assert not (tmp_path / "run").exists()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(dataset.SplitBuilder, "_encode", again)
    main(["check", "--config", str(config)])


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for trusted in (False, True):
        assert fetch_model(ModelConfig(name="owner/model", revision="abc", trust_remote_code=trusted)) == tmp_path
    for request, trusted in zip(asked, (False, True), strict=True):
        assert request["name"] == "owner/model" and request["revision"] == "abc"
        assert "*.safetensors" in request["allow_patterns"] and ("*.py" in request["allow_patterns"]) == trusted
        assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in request["allow_patterns"])


def test_a_hub_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise PermissionError("gated\nlog in")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(
        ConfigError, match=r"model.name: 'owner/model' cannot be fetched \(PermissionError: gated log in\)"
    ):
        fetch_model(ModelConfig(name="owner/model"))
