"""Shows how far transformers has come with loading weights. It draws a bar itself, on every rank and without bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
from transformers import core_model_loading, modeling_utils

from sparse_llm_ft.io.wait import Wait


@contextmanager
def reported(wait: Wait | None) -> Iterator[None]:
    """A context in which transformers' loading of weights is shown by `wait`, as bytes. None: nothing is."""
    if wait is None:
        yield
        return
    load = modeling_utils.convert_and_load_state_dict_in_model

    def loading(*, state_dict: dict[str, Any], **options: Any) -> Any:
        count = _Counter(wait, {name: _stored_bytes(tensor) for name, tensor in state_dict.items()})
        with ExitStack() as stack:
            for kind in (core_model_loading.WeightRenaming, core_model_loading.WeightConverter):
                stack.enter_context(mock.patch.object(kind, "convert", count.counting(kind.convert)))
            return load(state_dict=state_dict, **options)

    with mock.patch.object(modeling_utils, "convert_and_load_state_dict_in_model", loading):
        yield


class _Counter:
    """Counts the tensors that have been read.

    Args:
        sizes: of every tensor of the checkpoint, in bytes.
    """

    def __init__(self, wait: Wait, sizes: Mapping[str, int]) -> None:
        self._wait, self._sizes, self._total = wait, sizes, sum(sizes.values())
        self._tensors = self._bytes = 0

    def counting(self, convert: Callable[..., Any]) -> Callable[..., Any]:
        """A function that reads one parameter's tensors, as `convert` does, and counts them."""

        def counted(mapping: Any, *arguments: Any, **options: Any) -> Any:
            sources = {name for names in mapping.layer_targets.values() for name in names}
            try:
                return convert(mapping, *arguments, **options)
            finally:
                self._tensors += len(sources)
                self._bytes += sum(self._sizes[name] for name in sources)
                self._wait.at(self._bytes, self._total, f"{self._tensors}/{len(self._sizes)} tensors")

        return counted


def _stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of a slice of a safetensors file that is not read yet."""
    if isinstance(tensor, torch.Tensor):
        return tensor.nbytes
    return prod(tensor.get_shape()) * modeling_utils.str_to_torch_dtype[tensor.get_dtype()].itemsize
