"""Whose folder it is, and what a resumed run does to the log."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from sparse_llm_ft import run_folder
from sparse_llm_ft.config import RunConfig, merge, parse_config
from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.run_folder import RunFolder


def test_a_new_or_empty_folder_and_the_same_run_are_fine(settings: dict, tmp_path: Path) -> None:
    config = parse_config(settings)
    folder = RunFolder(config.output_dir)
    folder.check(config)
    folder.begin(config, 0)
    folder.check(config)
    folder.check(parse_config(merge(settings, {"training": {"micro_batch_size": 4, "save_every": 2}})))


def test_another_run_is_refused_and_named(settings: dict) -> None:
    config = parse_config(settings)
    RunFolder(config.output_dir).begin(config, 0)
    other = parse_config(merge(settings, {"training": {"learning_rate": 0.5}}))
    with pytest.raises(ConfigError, match=r"holds another run \(training.learning_rate: 0.01 there, 0.5 here\)"):
        RunFolder(config.output_dir).check(other)


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, TrainingError), (errno.EISDIR, ConfigError)])
def test_settings_that_a_file_server_withholds_are_not_wrong(
    settings: dict, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    config = parse_config(settings)
    RunFolder(config.output_dir).begin(config, 0)

    def away(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(run_folder, "read_yaml", away)
    with pytest.raises(kind, match=r"config\.yaml"):
        RunFolder(config.output_dir).check(config)


def test_the_identity_of_a_run_is_what_a_resumed_one_may_not_change(settings: dict) -> None:
    config = parse_config(settings)
    RunFolder(config.output_dir).begin(config, 0)
    written = RunConfig.model_validate(yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text()))
    same = merge(
        settings,
        {
            "training": {"max_skipped_updates": 0, "prefix_cache": "disk"},
            "deepspeed": {"zero_stage": 1},
            "output_dir": "x",
        },
    )
    other = merge(settings, {"seed": 1})
    mine = RunFolder.identity(config)
    assert mine == RunFolder.identity(written) == RunFolder.identity(parse_config(same))
    assert mine != RunFolder.identity(parse_config(other))


def test_never_means_never(settings: dict) -> None:
    config = parse_config(settings)
    RunFolder(config.output_dir).begin(config, 0)
    with pytest.raises(ConfigError, match="holds a run and resume is never"):
        RunFolder(config.output_dir).check(parse_config(merge(settings, {"resume": "never"})))


def test_files_of_somebody_else_are_not_touched(settings: dict) -> None:
    config = parse_config(settings)
    path = Path(config.output_dir)
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds files but no run"):
        RunFolder(path).check(config)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(path / "thesis.tex").check(config)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(path / "thesis.tex" / "run").check(config)


def test_a_start_that_was_killed_at_once_can_be_repeated(settings: dict) -> None:
    """Nothing but the lock and a half-written config is there, and what NFS keeps while somebody reads an old state."""
    config = parse_config(settings)
    folder = RunFolder(config.output_dir)
    folder.lock()
    (folder.path / ".tmp-config.yaml").write_text("model:")
    (folder.path / ".nfs000000000001").write_text("{}")
    RunFolder(config.output_dir).check(config)


def test_a_folder_in_use_is_refused_and_free_after_the_process(settings: dict) -> None:
    folder, other = RunFolder(settings["output_dir"]), RunFolder(settings["output_dir"])
    folder.lock()
    with pytest.raises(ConfigError, match="is in use by another process"):
        other.lock()
    folder._lock.release()  # as the kernel does when the process ends
    other.lock()


def test_beginning_again_drops_lines_that_will_be_done_again(settings: dict) -> None:
    config = parse_config(settings)
    folder = RunFolder(config.output_dir)
    folder.begin(config, 0)
    for step in range(1, 6):
        folder.log({"step": step})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    folder.begin(config, 3)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
