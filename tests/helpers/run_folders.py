"""Folders of runs that never ran: the files that the report reads, with made-up numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparse_llm_ft.adapters import count_parameters
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, Shape

TYPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "self_attn.v_proj": (16, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (176, 64),
    "mlp.up_proj": (176, 64),
    "mlp.down_proj": (64, 176),
}

MIB = 2**20


def llama_shapes(layers: int) -> dict[str, Shape]:
    """The 7 linear layers of each Llama layer."""
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in TYPES.items()}


def wave(i: int, period: float = 7.0) -> float:
    """A number in (0, 1) that looks measured."""
    return 0.5 + 0.45 * math.sin(i * 12.9898 / period) * math.cos(i * 4.1 / period)


def write_run(
    folder: Path,
    methods: Sequence[Mapping[str, Any]],
    phases: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    omega: Sequence[Mapping[str, float]] = (),
    finished: bool = True,
    planned: bool = False,
    **settings: Any,
) -> Path:
    """Write one run.

    Args:
        planned: whether its memory was planned and measured.
        phases: what the files of ``phases/`` hold, with an `AdapterPlan` as plan and without index and start_step.
        steps: optimizer steps of each phase.
        omega: of the first phase's steps.
    """
    (folder / "phases").mkdir(parents=True)
    config = {
        "model": {"name": settings.pop("model", "models/tiny-llama")},
        "task": {"name": settings.pop("task", "dialogsum")},
        "method": [dict(method) for method in methods],
        "output_dir": str(folder),
        "adapter": {"r": 8, "target_modules": "all-linear"},
        "training": {"learning_rate": 1e-4, **settings},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    totals, lines, step = [], [], 0
    for index, (phase, count) in enumerate(zip(phases, steps, strict=True)):
        plan, shapes = phase["plan"], phase["shapes"]
        record = {"scores": None, "delta_norms": None, **phase}
        record |= {"index": index, "start_step": step, "plan": plan.to_dict()}
        name = f"{index:02d}-{phase['name']}.json"
        (folder / "phases" / name).write_text(json.dumps(record), encoding="utf-8")
        parameters, speed = count_parameters(plan, shapes), 4000.0 + 900 * index
        for i in range(count):
            step += 1
            line = {
                "step": step,
                "phase": phase["name"],
                "loss": 1.2 + 2.5 * math.exp(-step / 40) + 0.2 * wave(step, 3.0),
                "learning_rate": 1e-4,
                "grad_norm": 0.5,
                "samples": 16 * step,
                "tokens_per_second": speed,
                "trainable_parameters": parameters,
                "active_adapters": len(plan.active),
            }
            if step % 25 == 0:
                line["validation_loss"] = line["loss"] + 0.1
            if index == 0 and omega:
                line |= {"omega": omega[i], "swaps": 0}
            if planned:
                line["peak_memory_bytes"] = 900 * MIB - 100 * MIB * index + step
            lines.append(json.dumps(line) + "\n")
        totals.append(
            {
                "name": phase["name"],
                "adapters": len(plan.active),
                "trainable_parameters": parameters,
                "optimizer_bytes_per_rank": parameters * 12,
                "micro_batch_size": 2,
                "global_batch_size": 16,
                "steps": count,
                "samples": 16 * count,
                "tokens": 3000 * count,
                "seconds": 0.4 * count,
                "tokens_per_second": speed,
                **({"base_bytes_per_rank": 300 * MIB, "adapter_bytes_per_rank": 2 * parameters} if planned else {}),
            }
        )
    if planned:
        names = [phase["name"] for phase in phases]
        forecast = {"phases": [planned_phase(name) for name in names], "process_bytes": 200 * MIB}
        (folder / "forecast.json").write_text(json.dumps(forecast), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    if finished:
        summary = {
            "method": " + ".join(method["name"] for method in methods),
            "model": config["model"]["name"],
            "task": config["task"]["name"],
            "world_size": 2,
            "zero_stage": 2,
            "seed": 0,
            "phases": totals,
            "metrics": {"before": {"loss": 3.21, "rougeL": 12.4}, "after": {"loss": 1.43, "rougeL": 31.92}},
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def planned_phase(name: str) -> dict[str, Any]:
    """A phase of a forecast, with more than the report reads."""
    lines = {"base": 300 * MIB, "adapters": 2 * MIB, "optimizer": 8 * MIB, "device_overhead": 0, "gradients": MIB}
    peaks = {"load": 310 * MIB, "step": 640 * MIB, "change": 0, "save": 320 * MIB, "evaluate": 400 * MIB}
    return {"name": name, "micro_batch_size": 2, "lines": lines, "peak_bytes": 640 * MIB, "peaks": peaks}


def norms(plan: AdapterPlan) -> dict[str, float]:
    """Made-up residual norms of a plan's active modules."""
    return {name: 0.5 + 2 * wave(i, 5.0) for i, name in enumerate(plan.active)}


def weight_lora_plus_run(folder: Path, layers: int = 12, select: int = 60, train: int = 120, **settings: Any) -> Path:
    """Omega is trained and cut to a third; the survivors' ranks grow."""
    shapes = llama_shapes(layers)
    keep = len(shapes) // 3
    target = {name: 1.6 * wave(i) for i, name in enumerate(shapes)}
    kept = sorted(shapes, key=lambda name: -target[name])[:keep]
    omega = [
        {n: 0.0 if t > select // 2 and n not in kept else 1 + (target[n] - 1) * t / select for n in shapes}
        for t in range(1, select + 1)
    ]
    first = AdapterPlan({name: ModuleAdapter(8, 16, train_omega=True) for name in shapes})
    ranks = {name: 16 + 4 * (i % 4) for i, name in enumerate(kept)}
    survivors = {n: ModuleAdapter(ranks[n], 2 * ranks[n], omega=omega[-1][n]) if n in kept else None for n in shapes}
    second = AdapterPlan(survivors)
    phases = [
        {"name": "select", "plan": first, "shapes": shapes, "scores": {"kind": "omega", "omega": omega[-1]}},
        {"name": "train", "plan": second, "shapes": shapes, "delta_norms": norms(second)},
    ]
    method = {"name": "weight_lora_plus", "keep": keep, "steps": select, "cut_every": 1}
    return write_run(folder, [method], phases, [select, train], omega, **settings)


def lora_drop_run(folder: Path, layers: int = 12, **settings: Any) -> Path:
    """A pilot scores all modules; the unimportant ones of each type share one adapter."""
    shapes = llama_shapes(layers)
    g = {name: 0.05 + wave(i, 3.0) ** 2 for i, name in enumerate(shapes)}
    of_type = {name: name.rpartition(".")[2] for name in shapes}
    sums = {kind: sum(g[n] for n in shapes if of_type[n] == kind) for kind in of_type.values()}
    y = {name: g[name] / sums[of_type[name]] for name in shapes}
    kept = [name for name in shapes if y[name] > 1 / layers]
    first = AdapterPlan({name: ModuleAdapter(8, 16) for name in shapes})
    second = AdapterPlan({n: ModuleAdapter(8, 16, group=None if n in kept else of_type[n]) for n in shapes})
    phases = [
        {
            "name": "pilot",
            "plan": first,
            "shapes": shapes,
            "scores": {"kind": "lora_output", "g": g, "y": y, "kept": kept},
        },
        {"name": "train", "plan": second, "shapes": shapes, "delta_norms": norms(second)},
    ]
    return write_run(folder, [{"name": "lora_drop", "threshold": 0.9}], phases, [20, 80], **settings)


def partial_run(folder: Path, layers: int = 12, **settings: Any) -> Path:
    """Masks with derived ratios, after a measurement without training steps of note."""
    shapes = llama_shapes(layers)
    ratios = {n: (0.1 + 0.6 * wave(i), 0.05 + 0.4 * wave(i, 4.0)) for i, n in enumerate(shapes)}
    pairs = ("svd-snip", "svd-imp", "snip-imp")
    overlap = {
        pair: {name: (wave(i + 9 * k, 9.0), wave(i + 5 * k, 11.0)) for i, name in enumerate(shapes)}
        for k, pair in enumerate(pairs)
    }
    scores = {
        "kind": "partial",
        "importance": "svd",
        "mu": 0.9,
        "standard_error": 0.01,
        "majority": 0.5,
        "units": 64,
        "accuracy_floor": 0.9,
        "ratios": ratios,
        "overlap": overlap,
    }
    plain = AdapterPlan({name: ModuleAdapter(8, 16) for name in shapes})
    masked = AdapterPlan({name: ModuleAdapter(8, 16, **_masks(shapes[name], ratios[name])) for name in shapes})
    phases = [
        {"name": "head", "plan": plain, "shapes": shapes, "scores": scores},
        {"name": "train", "plan": masked, "shapes": shapes, "delta_norms": norms(masked)},
    ]
    return write_run(folder, [{"name": "partial_lora", "shots": 16}], phases, [10, 150], **settings)


def _masks(shape: Shape, ratio: tuple[float, float]) -> dict[str, IndexMask | None]:
    rows, columns = (
        IndexMask.of(size, range(max(1, round(size * part)))) for size, part in zip(shape, ratio, strict=True)
    )
    return {"rows": rows, "cols": columns}


def lora_run(folder: Path, shapes: Mapping[str, Shape], **settings: Any) -> Path:
    """One phase, one adapter everywhere."""
    plan = AdapterPlan({name: ModuleAdapter(8, 16) for name in shapes})
    phases = [{"name": "train", "plan": plan, "shapes": shapes, "delta_norms": norms(plan)}]
    return write_run(folder, [{"name": "lora"}], phases, [40], **settings)
