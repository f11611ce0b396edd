"""A run's own output: an adapter that stock PEFT loads or, after full fine-tuning, a transformers model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, try_to_load_from_cache
from transformers import PreTrainedModel

from sparse_llm_ft.adapters import save_peft_adapter
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.io.atomic import write_folder
from sparse_llm_ft.model.architecture import mode_of, task_type
from sparse_llm_ft.model.loading import DTYPES, load_tokenizer
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan


def export(
    folder: Path, model: ModelConfig, empty: PreTrainedModel, plan: AdapterPlan, tensors: dict[str, torch.Tensor]
) -> None:
    """Write the trained parameters of `plan` into `folder`, atomically.

    Args:
        empty: the base, from `empty_model`.
        tensors: short parameter name -> float32 value.
    """

    def fill(path: Path) -> None:
        if FULL_MODEL not in plan.trained:
            save_peft_adapter(path, plan, tensors, model.name, model.revision, task_type(empty))
            return
        path.mkdir(parents=True, exist_ok=True)
        values = {name: tensor.to(DTYPES[model.dtype]).contiguous() for name, tensor in tensors.items()}
        save_torch_state_dict(values, path)
        empty.config.architectures = [type(empty).__name__]
        empty.config.save_pretrained(path)
        if (generation := _generation_settings(model)) is not None:
            shutil.copyfile(generation, path / generation.name)
        load_tokenizer(model, TaskMode(mode_of(empty))).save_pretrained(path)

    write_folder(folder, fill)


def _generation_settings(model: ModelConfig) -> Path | None:
    """The base's generation config, which decides how texts begin (BART) and end."""
    name = "generation_config.json"
    if Path(model.name).is_dir():
        path = Path(model.name) / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(model.name, name, revision=model.revision)  # cached when the base was loaded
    return Path(cached) if isinstance(cached, str) else None
