"""Shows how far transformers has come with loading weights. It draws a bar itself, on every rank and without bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
from transformers import core_model_loading, modeling_utils

from sparse_llm_ft.io.loading_bar import LoadingBar

Begin = Callable[[int, int], LoadingBar]
"""Begins a bar, given the number of tensors and their bytes."""


@contextmanager
def reported(begin: Begin | None) -> Iterator[None]:
    """A context in which transformers' loading of weights is shown. None: nothing is."""
    if begin is None:
        yield
        return
    load = modeling_utils.convert_and_load_state_dict_in_model

    def loading(*, state_dict: dict[str, Any], **options: Any) -> Any:
        sizes = {name: _stored_bytes(tensor) for name, tensor in state_dict.items()}
        with begin(len(sizes), sum(sizes.values())) as bar:

            def each(items: Any, **_: object) -> Iterator[Any]:
                for target, mapping in items:
                    sources = {name for names in mapping.layer_targets.values() for name in names}
                    yield target, mapping
                    bar.advance(len(sources), sum(sizes[name] for name in sources))

            with mock.patch.object(core_model_loading, "tqdm", each):
                return load(state_dict=state_dict, **options)

    with mock.patch.object(modeling_utils, "convert_and_load_state_dict_in_model", loading):
        yield


def _stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of a slice of a safetensors file that is not read yet."""
    if isinstance(tensor, torch.Tensor):
        return tensor.nbytes
    return prod(tensor.get_shape()) * modeling_utils.str_to_torch_dtype[tensor.get_dtype()].itemsize
