"""Settings of a short run on the tiny model."""

from __future__ import annotations

from pathlib import Path


def run_settings(model_folder: Path, data_folder: Path, output_dir: Path) -> dict:
    """8 optimizer steps of plain LoRA without pictures, which take longer; tests change what they need."""
    return {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "task": {
            "name": "custom",
            "path": str(data_folder),
            "max_length": 32,
            "prompt": "{text} ?",
            "completion": "{answer}",
        },
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "method": {"name": "lora"},
        "training": {"micro_batch_size": 2, "global_batch_size": 8, "max_steps": 8, "learning_rate": 0.01},
        "evaluation": {"samples": 5, "max_new_tokens": 4, "micro_batch_size": 2},
        "report": False,
        "output_dir": str(output_dir),
    }
