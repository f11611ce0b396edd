"""Tries on empty (meta) models, before a run begins, whatever can fail at its end."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from sparse_llm_ft.adapters import base_options, peft_adapter, tuner_of, write_peft_adapter
from sparse_llm_ft.adapters.convert import is_omega
from sparse_llm_ft.adapters.masking import row_masks
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.errors import ConfigError, UserError, lacks_room, reason_of
from sparse_llm_ft.export.read_back import WrittenWrongly, check_adapter
from sparse_llm_ft.export.whole_model import save_without_weights
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.model.loading import empty_like_stored, load_tokenizer
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan


def try_export(context: RunContext, plan: AdapterPlan) -> None:
    """Write a run's output without its weights into a temporary folder, and read it back. Takes a second or two.

    Args:
        plan: of the run's first phase.

    Raises:
        ConfigError: the output of such a run could not be written or loaded; with the reason.
    """
    name = context.config.model.name
    try:
        temporary = tempfile.TemporaryDirectory(prefix="sparse-llm-ft-")
    except OSError as error:
        raise UserError(f"TMPDIR: no temporary folder can be made ({error}); expected a folder with room") from error
    try:
        with temporary as folder:
            if FULL_MODEL in plan.trained:
                _try_whole_model(context, Path(folder))
            else:
                _try_adapter(context, plan if plan.active else context.plan, Path(folder))
    except UserError:
        raise
    except Exception as error:  # a base may come with any code, tokenizer and config
        reason = reason_of(error)
        if lacks_room(error):
            raise UserError(f"TMPDIR: {temporary.name} has no room ({reason}); expected a folder with room") from error
        raise ConfigError(
            "model.name",
            f"what a run would make of {name!r} cannot be saved and loaded again ({type(error).__name__}: {reason})",
            "expected a model whose config, tokenizer and templates transformers can save",
        ) from error


def _try_whole_model(context: RunContext, folder: Path) -> None:
    save_without_weights(folder, context)
    stored = context.config.model.model_copy(update={"name": str(folder), "revision": None})
    _same_tensors(empty_like_stored(stored, context.task_mode), context.empty)
    tokenizer = load_tokenizer(stored, context.task_mode)
    if tokenizer.get_vocab() != context.tokenizer.get_vocab():
        raise WrittenWrongly("the saved tokenizer has another vocabulary")
    if tokenizer.chat_template != context.tokenizer.chat_template:
        raise WrittenWrongly("the saved tokenizer has another chat template")


def _same_tensors(stored: nn.Module, base: nn.Module) -> None:
    """Compare names and shapes of everything that belongs to a model's weights."""
    ours, theirs = ({name: t.shape for name, t in m.state_dict().items() if _is_tensor(t)} for m in (base, stored))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise WrittenWrongly(f"{name} has shape {ours.get(name)}, and in the saved model {theirs.get(name)}")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _try_adapter(context: RunContext, plan: AdapterPlan, folder: Path) -> None:
    model = context.config.model
    shapes = tuner_of(plan).shapes(plan, context.targets)
    tensors = {name: torch.ones(1) if is_omega(name) else torch.empty(s, device="meta") for name, s in shapes.items()}
    for module in plan.trained:
        whole = context.empty.get_submodule(module)
        tensors |= {f"{module}.{name}": parameter for name, parameter in whole.named_parameters()}
    tensors = {
        name: t[: len(rows[name].indices)] if name in (rows := row_masks(plan)) else t for name, t in tensors.items()
    }
    options = base_options(context.empty, plan)
    config, weights = peft_adapter(plan, tensors, model.name, model.revision, task_type(context.empty), options)
    write_peft_adapter(folder, config, {})
    check_adapter(folder, config, {})
    # PEFT must find in it what was trained: the same names, on the same modules.
    stored = PeftConfig.from_pretrained(str(folder))
    stored.task_type = None  # PEFT's own wrapper, which adds nothing to the names
    try:
        loaded = get_peft_model(copy.deepcopy(context.empty), stored, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            "adapter.target_modules",
            f"PEFT takes no adapters on such modules of {model.name!r} ({reason_of(error)})",
            "expected other modules",
        ) from error
    names = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    for name in sorted(names.keys() ^ weights.keys()):
        raise ConfigError(
            "adapter.target_modules",
            f"{name} would be {'missing from' if name in names else 'too much in'} the exported adapter",
            "expected modules that PEFT tells apart by name",
        )
