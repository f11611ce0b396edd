"""Keys of earlier versions: replaced or left out with a warning, refused where a run would be another one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from sparse_llm_ft.config import parse_config, renamed
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.run_folder import RunFolder

MINIMAL = {"model": {"name": "org/base"}, "task": {"name": "custom"}, "output_dir": "runs/a"}
OLD = {"name": "partial_lora", "candidates_per_forward": 1}


@pytest.mark.parametrize("method", [OLD, [OLD, {"name": "weight_lora", "keep": 2, "steps": 3}]])
def test_a_removed_key_that_changes_nothing_is_ignored_with_a_line(method: object) -> None:
    with pytest.warns(UserWarning, match=r"^method\.candidates_per_forward is ignored: it was removed, .*") as warned:
        config = parse_config(MINIMAL | {"method": method})
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert config.method[0] == parse_config(MINIMAL | {"method": "partial_lora"}).method[0]


@pytest.mark.parametrize("value", [3, True, None, [1]])
def test_a_removed_key_that_would_change_the_run_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"candidates_per_forward: .* is not allowed; the setting was removed"):
        parse_config(MINIMAL | {"method": OLD | {"candidates_per_forward": value}})


def test_a_renamed_key_is_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "OLD_KEYS", {"training.batch": "global_batch_size"})
    with pytest.warns(UserWarning, match=r"training\.batch is now called training\.global_batch_size"):
        config = parse_config(MINIMAL | {"method": "lora", "training": {"batch": 8}})
    assert config.training.global_batch_size == 8


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_config(MINIMAL | {"method": OLD})


def test_the_folder_of_an_earlier_run_is_read_without_a_word(tmp_path: Path) -> None:
    written = MINIMAL | {"method": OLD | {"candidates_per_forward": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunFolder(tmp_path).config().method_name == "partial_lora"
