"""What a run leaves: an adapter that stock PEFT loads, or after full fine-tuning a model that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel

from sparse_llm_ft.adapters import save_peft_adapter
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.folders import write_folder
from sparse_llm_ft.modeling import DTYPES, load_tokenizer
from sparse_llm_ft.plan import EVERYTHING, AdapterPlan


def export(
    folder: Path, model: ModelConfig, empty: PreTrainedModel, plan: AdapterPlan, tensors: dict[str, torch.Tensor]
) -> None:
    """Write the trained parameters of `plan` into `folder`, atomically.

    Args:
        empty: the base, from `empty_model`.
        tensors: short parameter name -> value, float32.
    """

    def fill(path: Path) -> None:
        if EVERYTHING not in plan.trained:
            save_peft_adapter(path, plan, tensors, model.name, model.revision)
            return
        path.mkdir(parents=True, exist_ok=True)
        values = {name: tensor.to(DTYPES[model.dtype]).contiguous() for name, tensor in tensors.items()}
        save_torch_state_dict(values, path)
        empty.config.architectures = [type(empty).__name__]
        empty.config.save_pretrained(path)
        load_tokenizer(model, getattr(empty.config, "num_labels", None)).save_pretrained(path)

    write_folder(folder, fill)
