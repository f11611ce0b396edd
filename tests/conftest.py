"""A tiny Llama, a tiny BERT and tiny data sets, made from scratch: no test needs anything but the repository."""

from __future__ import annotations

import os

# Before torch is imported, here or in a process that a test starts. Tests run in as many processes as there are cores:
# with a thread per core each, they would wait for each other far longer than tiny models take to compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.tiny_files import make_data, make_encoder, make_labelled, make_model
from helpers.tiny_run import run_settings

os.environ["HF_HUB_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="datasets-")  # gone with the process
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent

HEAVY = (
    "launches/test_cases.py", "training/test_every_method.py", "launches/test_run.py",
    "context/test_trained_modules.py", "model/test_layers.py", "config/test_published_memory.py",
    "planning/test_truth.py", "report/test_page.py", "training/test_encoder_decoder_runs.py",
    "launches/test_rights.py", "launches/test_faults.py", "launches/test_parity.py", "inference/test_evaluate.py",
    "export/test_push.py", "launches/test_nodes.py", "training/test_head_runs.py", "planning/test_solve.py",
    "scoring/test_derivation.py",
)  # fmt: skip
"""The files that take longest, the longest first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heavy files come first: a process that began one of them last would work on alone when the other is done."""
    place = {ROOT / "tests" / name: i for i, name in enumerate(HEAVY)}
    items.sort(key=lambda item: place.get(item.path, len(HEAVY)))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training, 8 validation and 6 test rows with the columns ``text`` and ``answer``, of varied length."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForCausalLM (2 layers of width 16) with a word-level tokenizer, in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    make_labelled(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder)
    return folder


@pytest.fixture
def settings(model_folder: Path, data_folder: Path, tmp_path: Path) -> dict:
    """A complete tree of settings for a run of 8 steps on the tiny model."""
    return run_settings(model_folder, data_folder, tmp_path / "run")


_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """The test after it could not make its own; nor may it take itself for a rank that a launcher has started."""
    before = {name: os.environ.get(name) for name in _LAUNCHED}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("a process group was left")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for what is a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
