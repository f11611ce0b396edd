"""Causal attention over a batch that is padded on the right, without a mask.

No position sees one behind it, so none of a sample's tokens sees its padding: the causal kernel alone gives them what
it gives them with a mask. transformers makes one all the same, (B, 1, L, L), unless it has read from the device that
nothing is padded. Then the host waits for the GPU in every forward pass; and with a mask PyTorch takes none of its
FlashAttention kernels, and repeats keys and values for every query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_torchdynamo_compiling

from sparse_llm_ft.model.architecture import model_family

_padded_right: ContextVar[bool] = ContextVar("_padded_right", default=False)


@contextmanager
def padded_right() -> Iterator[None]:
    """A context whose forward passes get batches that are padded on the right, if at all, and a (B, L) mask of that."""
    token = _padded_right.set(True)
    try:
        yield
    finally:
        _padded_right.reset(token)


def gets_mask(model: PreTrainedModel, attention: str | None, length: int, padded: bool, packed: bool = False) -> bool:
    """Whether attention gets a mask in training.

    Args:
        model: on any device.
        attention: ``attn_implementation``; None: the model's default.
        length: tokens of a row.
        padded: whether rows are padded on the right.
        packed: whether they hold several samples.
    """
    if "flash" in (attention or ""):  # it takes lengths
        return False
    if packed or not padded:
        return packed
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if model_family(model.config) != "decoder" or attention not in (None, "sdpa"):
        return True
    return not kinds <= {"full_attention", "sliding_attention"} or (window is not None and window <= length)


def _sdpa_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """transformers' interface: the mask of its attention ``sdpa``; None: the kernel's own causal one."""
    return None if _padded_right.get() and _is_causal(options) else sdpa_mask(*args, **options)


def _is_causal(options: dict[str, Any]) -> bool:
    """Whether the mask would be the causal one, but for padding, as transformers decides it: no window that is shorter,
    no packed samples, no part that looks ahead, and no tokens in a cache.
    """
    queries, keys, window = options.get("q_length"), options.get("kv_length"), options.get("local_size")
    skips = options.get("allow_is_causal_skip", True) and not is_torchdynamo_compiling()
    return skips and queries is not None and queries == keys and (window is None or keys < window)


AttentionMaskInterface.register("sdpa", _sdpa_mask)
