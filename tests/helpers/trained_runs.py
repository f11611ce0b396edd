"""Runs as training leaves them, without training: a config and a checkpoint whose tensors are drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse_llm_ft.adapters import add_adapters, trained_parameters
from sparse_llm_ft.adapters.masking import clear_masked, to_compact
from sparse_llm_ft.checkpoint.record import PhaseRecord, RunRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import save_checkpoint
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.model.loading import find_model_task_mode, head_modules, load_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, IndexMask, ModuleAdapter
from sparse_llm_ft.run_folder import RunFolder

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
SHAPES = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.down_proj": (16, 24)}


def modules(adapter: Any) -> dict[str, ModuleAdapter | None]:
    """`adapter(layer, kind)` on three linear layers of both layers of the tiny Llama."""
    return {f"model.layers.{layer}.{kind}": adapter(layer, kind) for layer in range(2) for kind in LAYERS}


def masked(layer: int, kind: str) -> ModuleAdapter:
    """Every other row, and all columns but the first."""
    rows, columns = SHAPES[kind]
    return ModuleAdapter(
        3, 6.0, rows=IndexMask(rows, tuple(range(0, rows, 2))), cols=IndexMask(columns, tuple(range(1, columns)))
    )


def plain(layer: int, kind: str) -> ModuleAdapter:
    return ModuleAdapter(4, 8.0)


def ranked(layer: int, kind: str) -> ModuleAdapter | None:
    """Ranks and scalings that differ, one module without adapter, omega trained or fixed."""
    if (layer, kind) == (1, "mlp.down_proj"):
        return None
    return ModuleAdapter(2 + 2 * layer, 5.0 + layer, omega=0.5 + layer, train_omega=layer == 0)


def ranked_alike(layer: int, kind: str) -> ModuleAdapter:
    """Ranks and lora_alpha that differ from layer to layer."""
    return ModuleAdapter(2 + 2 * layer, 5.0 + layer)


def grouped(layer: int, kind: str) -> ModuleAdapter:
    return ModuleAdapter(4, 8.0, group=None if layer else kind.replace(".", "-"))


def adalora() -> dict[str, float]:
    return {"target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 8, "orth_reg_weight": 0.5}


PLANS: dict[str, AdapterPlan] = {
    "lora": AdapterPlan(modules(plain), tuner="lora"),
    "masked": AdapterPlan(modules(masked)),
    "masked_in_optimizer": AdapterPlan(modules(masked), tuner="lora", masking="optimizer"),
    "ranked": AdapterPlan(modules(ranked)),
    "grouped": AdapterPlan(modules(grouped)),
    "rslora": AdapterPlan(modules(ranked_alike), tuner="rslora"),
    "dora": AdapterPlan(modules(plain), tuner="dora"),
    "masked_dora": AdapterPlan(modules(masked), tuner="dora", masking="optimizer"),
    "vera": AdapterPlan(modules(plain), tuner="vera"),
    "adalora": AdapterPlan(modules(plain), tuner="adalora", options=adalora()),
    "full": AdapterPlan({}, trained=(FULL_MODEL,)),
}


def make_run(settings: dict, plan: AdapterPlan | None, step: int = 8) -> torch.nn.Module:
    """Write the run that `settings` describe; returns the trained model itself, in evaluation mode.

    Args:
        plan: None: that of a head and adapters on the query layers of an encoder.
    """
    config = parse_config(settings)
    task = resolve_task(config.task)
    base = load_model(config.model, find_model_task_mode(config.model, task, config.task.mode), seed=config.seed)
    if plan is None:
        queries = {name for name, _ in base.named_modules() if name.endswith("attention.self.query")}
        plan = AdapterPlan({name: ModuleAdapter(4, 8.0) for name in sorted(queries)}, trained=head_modules(base))
    model = add_adapters(base, plan)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if not name.endswith("lora_omega"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    clear_masked(model, plan)
    values = {name: p.detach().float().clone() for name, p in trained_parameters(model).items()}
    phase = Phase("train", plan).with_batch(2, 8)
    current = PhaseRecord.of(phase, None, len(values), 0).model_copy(update={"steps": step, "samples": 8 * step})
    record = RunRecord(
        run=RunFolder.identity(config), samples="", micro_batch_size=2, before={"loss": 3.0}, current=current
    )
    state = TrainState(
        to_compact(plan, values), {}, {}, Progress(step, 8 * step, 0, step), phase.to_dict(), None, record
    )
    folder = RunFolder(config.output_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.begin(config, step)
    save_checkpoint(folder.checkpoints, state, keep=None)
    return model.eval()


def run_folder(settings: dict) -> Path:
    return Path(settings["output_dir"])
