"""A run's own output: an adapter that stock PEFT loads or, after full fine-tuning, a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sparse_llm_ft.adapters import base_options, save_peft_adapter
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.export.read_back import check_adapter
from sparse_llm_ft.export.whole_model import save_values
from sparse_llm_ft.io.atomic import write_folder
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.model.loading import DTYPES
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan


def export(
    folder: Path,
    context: RunContext,
    plan: AdapterPlan,
    tensors: Mapping[str, torch.Tensor],
    untrained: Mapping[str, torch.Tensor],
) -> None:
    """Write what `plan` trained into `folder`, atomically, and read it back before it gets its name.

    Args:
        tensors: short parameter name -> float32 value.
        untrained: what else belongs to the weights of a model that is written whole (`untrained_tensors`).

    Raises:
        WrittenWrongly: the files hold something else.
    """
    model = context.config.model

    def fill(path: Path) -> None:
        if FULL_MODEL in plan.trained:
            values = {name: tensor.to(DTYPES[model.dtype]).contiguous() for name, tensor in tensors.items()}
            save_values(path, context, {**values, **untrained})
            return
        empty = context.empty
        options = base_options(empty, plan)
        written = save_peft_adapter(path, plan, tensors, model.name, model.revision, task_type(empty), options)
        check_adapter(path, *written)

    write_folder(folder, fill)
