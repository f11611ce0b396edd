"""The model card of an upload: README.md with metadata for the hub, written from what the run's folder says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.export.sanitize import is_local, public_name, public_settings
from sparse_llm_ft.inference.trained_run import TrainedRun
from sparse_llm_ft.model.architecture import ARCHITECTURES
from sparse_llm_ft.plan import ModuleAdapter
from sparse_llm_ft.report.grid import module_grid
from sparse_llm_ft.run_folder import SUMMARY_FILE

_VERSIONS = ("python", "sparse-llm-ft", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")


def model_card(run: TrainedRun, repo_id: str, options: ExportOptions) -> str:
    """The card's text. It names no folder of this machine, and leaves license and language to its reader."""
    summary = run.folder.summary() if (run.folder.path / SUMMARY_FILE).is_file() else {}
    parts = [
        f"# {repo_id.partition('/')[2]}",
        _opening(run, options),
        "## How to load it",
        _loading(run, repo_id, options),
        "## Method",
        _method(run),
        *(["## Adapters", _plan_map(run)] if run.plan.active else []),
        "## Data",
        _data(run, summary),
        "## Results",
        _results(run, summary),
        "## Making it again",
        _again(run, summary),
    ]
    return str(ModelCard(f"---\n{metadata_of(run, options).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def metadata_of(run: TrainedRun, options: ExportOptions) -> ModelCardData:
    """What the hub reads: base and data set where they are the hub's, library, tags."""
    config, task = run.config, run.task
    methods = [method.name.replace("_", "-") for method in config.method]
    return ModelCardData(
        base_model=None if is_local(config.model.name) else config.model.name,
        library_name="transformers" if options.to == "merged" else "peft",
        tags=list(dict.fromkeys(["sparse-llm-ft", *methods])),
        datasets=[task.hub_id] if config.task.path is None and task.hub_id is not None else None,
    )


def _opening(run: TrainedRun, options: ExportOptions) -> str:
    config = run.config
    what = {
        "peft": "A stock PEFT adapter for",
        "native": "An adapter of sparse-llm-ft's own tuner for",
        "merged": "Whole weights:",
    }[options.to]
    base = public_name(config.model.name) + (" (a local model)" if is_local(config.model.name) else "")
    bits = ""
    if config.model.quantization != "none":
        merged = ", which were dequantised and merged with the adapter" if options.to == "merged" else ""
        bits = f" Training saw the base's weights in 4 bit ({config.model.quantization}){merged}."
    return f"{what} {base}, fine-tuned on {config.task.name} with {config.method_name}.{bits}"


def _loading(run: TrainedRun, repo_id: str, options: ExportOptions) -> str:
    auto = ARCHITECTURES[run.task_mode.mode].auto.__name__
    base = public_name(run.config.model.name)
    outputs = f", num_labels={run.task_mode.outputs}" if run.task_mode.outputs else ""
    if options.to == "merged":
        lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{repo_id}")']
    else:
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            *(["", "import sparse_llm_ft.adapters  # makes PEFT know the tuner"] if options.to == "native" else []),
            "",
            f'base = {auto}.from_pretrained("{base}"{outputs})',
            f'model = PeftModel.from_pretrained(base, "{repo_id}")',
        ]
    return "\n".join(["```python", *lines, "```"])


def _method(run: TrainedRun) -> str:
    tree = public_settings(run.config)
    shown = yaml.safe_dump({key: tree[key] for key in ("method", "adapter", "training")}, sort_keys=False)
    state = run.state.progress
    return (
        f"{run.config.method_name}: {run.plan.describe()} after {state.step:,} optimizer steps "
        f"(phase {run.phase.name}); all settings are in config.yaml.\n\n```yaml\n{shown}```"
    )


def _plan_map(run: TrainedRun) -> str:
    """A row for each layer, a column for each type of module."""
    grid = module_grid(run.plan.modules)
    cells = [["–"] * len(grid.kinds) for _ in grid.layers]
    for name, adapter in run.plan.active.items():
        row, column = grid.places[name]
        cells[row][column] = _cell(adapter)
    table = _table(["layer", *grid.kinds], [[layer, *row] for layer, row in zip(grid.layers, cells, strict=True)])
    return (
        "The rank of every module's adapter; – has none. Shared ones are one A and B for all that are marked so in a "
        "column; after the colon stands the kept part of rows (outputs) and columns (inputs), where masks leave some "
        f"out.\n\n{table}"
    )


def _cell(adapter: ModuleAdapter) -> str:
    text = str(adapter.r) + (" shared" if adapter.group is not None else "")
    if adapter.rows is None and adapter.cols is None:
        return text
    kept = [1.0 if mask is None else len(mask.indices) / mask.size for mask in (adapter.rows, adapter.cols)]
    return f"{text}: {kept[0]:.0%} × {kept[1]:.0%}"


def _data(run: TrainedRun, summary: dict[str, Any]) -> str:
    config, task = run.config, run.task
    if config.task.path is None:
        parts = [part for part in (task.hub_id, task.hub_config) if part]
        text = f"Task {task.name}: {' / '.join(parts)} on the Hugging Face hub."
    else:
        text = f"Task {task.name}, from a local folder."
    sizes = [[split, f"{count:,}"] for split, count in summary.get("samples", {}).items() if count]
    return f"{text}\n\n{_table(['split', 'samples used'], sizes)}" if sizes else text


def _results(run: TrainedRun, summary: dict[str, Any]) -> str:
    evaluation = run.config.evaluation
    metrics = summary.get("metrics", {})
    before, after = metrics.get("before") or run.state.record.before, metrics.get("after")
    if not before:
        return "Nothing was measured."
    names = list(after or before)
    rows = [[name, _number(before.get(name)), _number((after or {}).get(name))] for name in names]
    note = "" if after else "\n\nTraining had not ended when this was uploaded."
    return (
        f"On the first {evaluation.samples:,} samples of the {evaluation.split} split, before and after training:\n\n"
        f"{_table(['metric', 'before', 'after'], rows)}{note}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _again(run: TrainedRun, summary: dict[str, Any]) -> str:
    processes = summary.get("world_size")
    start = "deepspeed" if processes is None else f"deepspeed --num_gpus {processes}"
    text = (
        "With [config.yaml](config.yaml) of this repository, in which local folders are shortened to their last "
        f"names, and a checkout of sparse-llm-ft:\n\n```\n{start} launch/train.py --config config.yaml\n```"
    )
    versions = summary.get("versions", {})
    rows = [[name, str(versions[name])] for name in _VERSIONS if name in versions]
    return f"{text}\n\n{_table(['package', 'version'], rows)}" if rows else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
