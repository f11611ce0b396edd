"""Compares what was written with what was trained, before a run calls itself complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparse_llm_ft.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sparse_llm_ft.errors import TrainingError


class WrittenWrongly(TrainingError):
    """Files that were just written hold something else than the trained model. The last checkpoint is intact."""


def check_adapter(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Read an adapter's two files and compare them, bit for bit, with what they should hold.

    Raises:
        WrittenWrongly: a file holds something else.
    """
    if json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) != json.loads(json.dumps(config, default=str)):
        raise WrittenWrongly(f"{folder / ADAPTER_CONFIG}: differs from what was written")
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        if set(file.keys()) != set(weights):
            name = sorted(set(file.keys()) ^ set(weights))[0]
            raise WrittenWrongly(f"{folder / ADAPTER_WEIGHTS}: {name} is missing or too much")
        for name, tensor in weights.items():
            _compare(name, file.get_tensor(name), tensor)


def compare(loaded: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> None:
    """Compare a loaded model's tensors with those that were written.

    Args:
        loaded: the model's `state_dict`.
        values: what was written; names of tied tensors may be missing.

    Raises:
        WrittenWrongly: naming the first tensor that is missing or differs.
    """
    for name, tensor in values.items():
        if name not in loaded:
            raise WrittenWrongly(f"{name} is not in the written model")
        _compare(name, loaded[name], tensor)
    known = {_place(loaded[name]) for name in values}
    for name, tensor in loaded.items():
        if name not in values and isinstance(tensor, torch.Tensor) and tensor.numel() and _place(tensor) not in known:
            raise WrittenWrongly(f"{name} of the written model was not written")


def _compare(name: str, read: torch.Tensor, written: torch.Tensor) -> None:
    """Equal values; a type that holds more digits, as some modules are loaded with, may differ."""
    if read.shape != written.shape or not torch.equal(read, written.to(device=read.device, dtype=read.dtype)):
        raise WrittenWrongly(f"{name} was written with other values than were trained")


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()
