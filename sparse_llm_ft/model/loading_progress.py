"""Shows how far transformers has come with loading weights. It draws a bar itself, on every rank and without bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
        with begin(len(sizes), sum(sizes.values())) as bar, ExitStack() as stack:
            for kind in (core_model_loading.WeightRenaming, core_model_loading.WeightConverter):
                stack.enter_context(mock.patch.object(kind, "convert", _counted(kind.convert, sizes, bar)))
            return load(state_dict=state_dict, **options)

    with mock.patch.object(modeling_utils, "convert_and_load_state_dict_in_model", loading):
        yield


def _counted(convert: Callable[..., Any], sizes: Mapping[str, int], bar: LoadingBar) -> Callable[..., Any]:
    """A function that reads one parameter's tensors, as `convert` does, and then advances the bar."""

    def counting(mapping: Any, *arguments: Any, **options: Any) -> Any:
        sources = {name for names in mapping.layer_targets.values() for name in names}
        try:
            return convert(mapping, *arguments, **options)
        finally:
            bar.advance(len(sources), sum(sizes[name] for name in sources))

    return counting


def _stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of a slice of a safetensors file that is not read yet."""
    if isinstance(tensor, torch.Tensor):
        return tensor.nbytes
    return prod(tensor.get_shape()) * modeling_utils.str_to_torch_dtype[tensor.get_dtype()].itemsize
