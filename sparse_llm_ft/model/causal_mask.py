"""Causal attention over a batch that is padded on the right, without a mask.

No position sees one behind it, so none of a sample's tokens sees its padding: the causal kernel alone gives them what
it gives them with a mask. transformers makes one all the same, (B, 1, L, L), unless it has read from the device that
nothing is padded. Then the host waits for the GPU in every forward pass; and with a mask PyTorch takes none of its
FlashAttention kernels, and repeats keys and values for every query head. Under ``flash_attention_2`` and its successors
transformers takes the padding out with a (B, L) mask, for which the host waits in every layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask, sdpa_mask
from transformers.utils import is_torchdynamo_compiling

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.model.architecture import model_family

_IS_KNOWN = "q_length" in inspect.signature(sdpa_mask).parameters
"""Whether this release of transformers (5.4 and newer) asks its mask functions in the words that are read here."""
_BUILD_ON_IT = {"doge"}
"""Models that combine the mask with one of their own, and in some releases do not say that they need it."""

_padded_right: ContextVar[bool] = ContextVar("_padded_right", default=False)


@contextmanager
def padded_right() -> Iterator[None]:
    """A context whose forward passes get batches that are padded on the right, if at all, and a (B, L) mask of that."""
    token = _padded_right.set(True)
    try:
        yield
    finally:
        _padded_right.reset(token)


def gets_mask(model: PreTrainedModel, settings: ModelConfig, length: int, padded: bool, packed: bool = False) -> bool:
    """Whether attention gets a mask in training.

    Args:
        model: on any device.
        settings: those that it is loaded with.
        length: tokens of a row.
        padded: whether rows are padded on the right.
        packed: whether they hold several samples.
    """
    text: Any = model.config.get_text_config()
    attention = settings.attn_implementation or text._attn_implementation
    if "flash" in attention:  # it takes lengths
        return False
    if packed or not padded:
        return packed
    if model_family(model.config) != "decoder" or attention != "sdpa" or not _IS_KNOWN:
        return True
    if _keeps_mask(text, settings.dtype == "float32"):
        return True
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return not kinds <= {"full_attention", "sliding_attention"} or (window is not None and window <= length)


def _sdpa_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """transformers' interface: the mask of its attention ``sdpa``; None: the kernel's own causal one."""
    return None if _padded_right.get() and _is_causal(options) else sdpa_mask(*args, **options)


def _flash_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """transformers' interface: the (B, L) mask of flash attention. Its kernels are causal and have windows without."""
    causal = options.get("allow_is_causal_skip", True) and options.get("q_length") == options.get("kv_length")
    return None if _padded_right.get() and _IS_KNOWN and causal else flash_attention_mask(*args, **options)


def _is_causal(options: dict[str, Any]) -> bool:
    """Whether the mask would be the causal one, but for padding, as transformers decides it: no window that is shorter,
    no packed samples, no part that looks ahead, and no tokens in a cache.
    """
    queries, keys, window = options.get("q_length"), options.get("kv_length"), options.get("local_size")
    if not options.get("allow_is_causal_skip", True) or is_torchdynamo_compiling() or not _IS_KNOWN:
        return False
    config = options.get("config")
    if config is None or _keeps_mask(config.get_text_config(), options.get("dtype") == torch.float32):
        return False
    return queries == keys and (window is None or keys < window)


def _keeps_mask(config: Any, in_float32: bool) -> bool:
    """Whether a model of this config (of texts) needs its mask. In float32 the only kernel of a GPU that takes fewer
    heads of keys than of queries is the plain one, which keeps length² maps. With a mask, transformers repeats the
    keys.
    """
    heads = getattr(config, "num_attention_heads", None)
    grouped = getattr(config, "num_key_value_heads", heads) != heads
    return config.model_type in _BUILD_ON_IT or (grouped and in_float32)


AttentionMaskInterface.register("sdpa", _sdpa_mask)
for _version in (2, 3, 4):
    AttentionMaskInterface.register(f"flash_attention_{_version}", _flash_mask)
