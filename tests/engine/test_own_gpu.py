"""Which GPU a process uses, and what it says where there are too few."""

from __future__ import annotations

import os

import pytest
import torch

from sparse_llm_ft.engine.engine import _use_own_gpu
from sparse_llm_ft.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that have been chosen."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    for name in (*TORCHRUN, *DEEPSPEED):
        monkeypatch.delenv(name, raising=False)
    return found


def be_on_a_node(launcher: dict[str, str], local_rank: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in (launcher | {"LOCAL_RANK": str(local_rank)}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("launcher", "local_rank", "count", "own"),
    [
        (TORCHRUN, 1, 2, 1),
        (DEEPSPEED, 1, 8, 1),
        ({}, 3, 4, 3),  # srun, whose processes see all GPUs of the node
        ({}, 3, 1, 0),  # srun --gpus-per-task=1
        ({}, 0, 1, 0),  # no launcher
    ],
)
def test_each_process_has_its_own(
    launcher: dict[str, str], local_rank: int, count: int, own: int, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_on_a_node(launcher, local_rank, count, monkeypatch)
    _use_own_gpu()
    assert chosen == [own] and os.environ["LOCAL_RANK"] == str(own)


@pytest.mark.parametrize(
    ("launcher", "local_rank", "count", "line"),
    [
        (TORCHRUN, 0, 1, "this node has 1 GPU, and at least 2 processes run here; expected one for each GPU"),
        (DEEPSPEED, 1, 1, "this node has 1 GPU, and at least 2 processes run here; expected one for each GPU"),
        ({}, 4, 2, "this node has 2 GPUs, and at least 5 processes run here; expected one for each GPU"),
    ],
)
def test_too_few_are_one_line(
    launcher: dict[str, str], local_rank: int, count: int, line: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every process of the node: which of them speaks is not known here."""
    be_on_a_node(launcher, local_rank, count, monkeypatch)
    with pytest.raises(UserError) as refused:
        _use_own_gpu()
    assert str(refused.value) == line and not chosen
