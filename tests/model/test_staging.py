"""A node's own copy of a base: what is copied, when it is copied again, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model import staging
from sparse_llm_ft.model.base_files import stage_folder
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.model.staging import stage_base

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    """A base with files that loading does not read."""
    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py", "README.md"):
        (folder / name).write_bytes(b"x" * 10)
    return folder


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders into which files have been copied."""
    targets, copy = [], staging._copy_files

    def counting(source: Path, target: Path, *rest: object) -> None:
        targets.append(target)
        copy(source, target, *rest)

    monkeypatch.setattr(staging, "_copy_files", counting)
    return targets


def stage(base: Path, folder: Path, **settings: object) -> Path:
    model = ModelConfig(name=str(base), dtype="float32", stage_to=str(folder), **settings)
    return Path(stage_base(model, ONE_PROCESS, Console(1)).name)


def test_the_copy_has_what_loading_reads_and_is_made_once(
    base: Path, model_folder: Path, tmp_path: Path, copied: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    copy = stage(base, Path("$DISK/bases"))
    assert copy.parent == tmp_path / "disk" / "bases" and copy.name.startswith("base-")
    names = {path.name for path in model_folder.iterdir()}
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        name: (base / name).read_bytes() for name in names
    }
    assert stage(base, Path("$DISK/bases")) == copy and len(copied) == 1
    assert {path.name for path in copy.parent.iterdir()} == {copy.name, f".{copy.name}.lock"}
    config = ModelConfig(name=str(base), dtype="float32")
    mine, theirs = load_model(config), load_model(config.model_copy(update={"name": str(copy)}))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())


def test_the_models_own_code_is_copied_where_it_may_run(base: Path, tmp_path: Path) -> None:
    assert (stage(base, tmp_path / "disk", trust_remote_code=True) / "modeling_own.py").is_file()


def test_a_base_that_has_changed_is_copied_again(base: Path, tmp_path: Path, copied: list[Path]) -> None:
    first = stage(base, tmp_path / "disk")
    os.utime(base / "config.json", ns=(0, 0))
    second = stage(base, tmp_path / "disk")
    assert first != second and len(copied) == 2 and first.is_dir()


def test_a_copy_that_is_cut_short_is_made_anew(base: Path, tmp_path: Path, copied: list[Path]) -> None:
    copy = stage(base, tmp_path / "disk")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert stage(base, tmp_path / "disk") == copy and len(copied) == 2
    assert weights.read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_strangers_copy_is_not_used(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = stage(base, tmp_path / "disk")
    monkeypatch.setattr(staging.os, "getuid", lambda: 12345)
    if copy.stat().st_uid == 0:
        os.chown(copy, 54321, -1)
    monkeypatch.setattr(staging.ContentCache, "write", lambda self, key, fill, warn: self.read(self.folder / key))
    with pytest.raises(ConfigError, match=r"cannot be copied there on .* belongs to another user"):
        stage(base, tmp_path / "disk")


def test_a_disk_without_room_is_one_line_and_stays_empty(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    monkeypatch.setattr(staging, "GIB", 2**20)
    with (base / "model.safetensors").open("ab") as file:
        file.truncate(3 * 2**20)
    disk = tmp_path / "disk"
    with pytest.raises(ConfigError, match=rf"model.stage_to: '{disk}' has 1.0 GiB free on .*expected 3.0 GiB for"):
        stage(base, disk)
    assert [path.name for path in disk.iterdir() if not path.name.endswith(".lock")] == []


def test_a_copy_that_fails_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.Wait, "at", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        stage(base, tmp_path / "disk")
    assert [path.name for path in (tmp_path / "disk").iterdir() if not path.name.endswith(".lock")] == []


KILLED = """
import os, signal, sys
import torch.distributed as dist
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model import staging
staging.Wait.at = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=0, world_size=1)
staging.stage_base(ModelConfig(name=sys.argv[1], stage_to=sys.argv[2]), ONE_PROCESS, Console(1))
"""


@pytest.mark.long
def test_a_killed_copy_is_never_taken_for_a_whole_one(base: Path, tmp_path: Path, copied: list[Path]) -> None:
    disk = tmp_path / "disk"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(base), str(disk), str(tmp_path / "other-store")])
    assert killed.returncode == -signal.SIGKILL
    (left,) = disk.glob(".tmp-*")
    copy = stage(base, disk)
    assert left.name == f".tmp-{copy.name}" and not left.exists() and len(copied) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("$NO_SUCH_DISK/x", r"model.stage_to: '\$NO_SUCH_DISK/x' names a variable that is not set on .*; expected"),
        ("scratch", "model.stage_to: 'scratch' is relative; expected the absolute path"),
        ("/etc/hostname/x", "model.stage_to: '/etc/hostname/x': /etc/hostname cannot be written on .*; expected"),
    ],
)
def test_folders_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_folder(setting)
