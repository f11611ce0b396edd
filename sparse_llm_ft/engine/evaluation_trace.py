"""Forward passes without gradients on the meta device: the bytes of a loss, and of generation with its cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine.live_bytes import LiveBytes
from sparse_llm_ft.engine.step_trace import Batch, Inputs, on_the_gpu, traced_model
from sparse_llm_ft.model.architecture import base_of
from sparse_llm_ft.model.loading import DTYPES
from sparse_llm_ft.plan import AdapterPlan


@dataclass(frozen=True)
class Generation:
    """Texts that are generated at once.

    Attributes:
        prompt: tokens of each prompt.
        new: tokens that are generated.
        beams: width of the beam search.
    """

    prompt: int
    new: int
    beams: int


@dataclass(frozen=True)
class EvaluationBytes:
    """The most bytes of tensors.

    Attributes:
        loss: of a batch's loss.
        generation: of a batch of texts; 0 if none are generated.
        cache: of them the keys and values of all tokens.
    """

    loss: int
    generation: int
    cache: int


def evaluation_bytes(
    config: ModelConfig,
    plan: AdapterPlan,
    batch: Batch,
    task_mode: TaskMode,
    generation: Generation | None = None,
    on_gpu: bool = False,
) -> EvaluationBytes:
    """Trace the passes of an evaluation under `plan`.

    Args:
        batch: of which the loss is taken.
        generation: None: no text is generated. For a decoder alone.

    Raises:
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    model = traced_model(config, plan, task_mode).eval()
    dtype = DTYPES[config.dtype]
    inputs = Inputs.of(model, batch, dtype)
    with torch.no_grad(), on_the_gpu(on_gpu):
        loss, _ = _peak(lambda: inputs.loss(model, task_mode))
        if generation is None:
            return EvaluationBytes(loss, 0, 0)
        rows, end = batch.samples * generation.beams, generation.prompt + generation.new - 1
        prompt, _ = _peak(lambda: _pass(model, rows, generation.prompt, 0, dtype))
        cache = _cache_of(_pass(model, rows, end, 0, dtype))
        held = _bytes_of(cache)
        last, _ = _peak(lambda: _pass(model, rows, 1, end, dtype, cache))
        scores = rows * int(model.config.get_text_config().vocab_size) * 4  # float32, and as they are chosen from
        return EvaluationBytes(loss, max(prompt, held + last) + 2 * scores, _bytes_of(cache))


def _pass(model: Any, rows: int, new: int, before: int, dtype: torch.dtype, cache: Any = None) -> Any:
    """A pass over `new` tokens behind `before` cached ones, as generation makes it: the logits of the last one."""
    tokens = torch.zeros((rows, new), dtype=torch.long, device="meta")
    mask = torch.zeros((rows, 1, new, before + new), dtype=dtype, device="meta")
    positions = torch.arange(before, before + new, device="meta")[None].expand(rows, -1)
    options = {} if cache is None else {_cache_name(model): cache}
    return model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **options
    )


def _cache_name(model: Any) -> str:
    """The cache's name as an argument: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(base_of(model).forward).parameters else "past_key_values"


def _cache_of(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


def _peak(run: Callable[[], Any]) -> tuple[int, Any]:
    with LiveBytes() as live:
        made = run()
    return live.peak, made


def _bytes_of(cache: Any) -> int:
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
