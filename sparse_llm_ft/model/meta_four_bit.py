"""A base in 4 bit on the meta device: bitsandbytes' own layers and states, without values.

bitsandbytes registers shapes for its operations, so its layers run there as they do on a GPU: codes, scales and
dequantised weights have their real sizes.
"""

from __future__ import annotations

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.model.four_bit import keep_unpacked, release_weights
from sparse_llm_ft.model.loading import DTYPES, head_modules
from sparse_llm_ft.model.quantization import four_bit_options, stored_quantization

BLOCK, BLOCKS = 64, 256
"""Values that share a scale, and scales that share one of their own."""


def quantize_empty(model: PreTrainedModel, config: ModelConfig) -> None:
    """Replace the linear layers of a model on the meta device by those that loading it in 4 bit would give."""
    whole = head_modules(model) or None
    options = four_bit_options(config.quantization, model.config, DTYPES[config.dtype], whole)
    found = options.get("quantization_config") or BitsAndBytesConfig.from_dict(
        dict(stored_quantization(options["config"]) or {})
    )
    kept = HfQuantizer.get_modules_to_not_convert(
        model, found.llm_int8_skip_modules, list(model._keep_in_fp32_modules or ())
    )
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=found)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _fill(module, found.bnb_4bit_use_double_quant)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    keep_unpacked(model)
    release_weights(model)


def _fill(layer: bitsandbytes.nn.Linear4bit, double: bool) -> None:
    """Give the layer codes and scales of the right sizes."""
    shape, storage = (layer.out_features, layer.in_features), layer.weight.quant_storage
    values, kind = shape[0] * shape[1], layer.weight.quant_type
    blocks = -(-values // BLOCK)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    second = None
    if double:
        second = QuantState(empty(-(-blocks // BLOCKS)), code=empty(256), blocksize=BLOCKS, dtype=torch.float32)
    state = QuantState(
        empty(blocks, dtype=torch.uint8) if double else empty(blocks),
        shape=torch.Size(shape),
        code=empty(16),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=layer.compute_dtype or torch.get_default_dtype(),
        offset=empty() if double else None,
        state2=second,
    )
    codes = empty((values + 1) // (storage.itemsize * 2), 1, dtype=storage)
    layer.weight = bitsandbytes.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state


def state_tensors(state: QuantState | None) -> list[torch.Tensor]:
    """The tensors of a quantised weight beside its codes."""
    if state is None:
        return []
    parts = [part for part in (state.absmax, state.code, state.offset) if isinstance(part, torch.Tensor)]
    return parts + state_tensors(state.state2)
