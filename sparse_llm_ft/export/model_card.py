"""The model card of an upload: README.md with the hub's metadata, filled in from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.export.sanitize import is_local, public_name, public_settings
from sparse_llm_ft.inference.trained_run import TrainedRun
from sparse_llm_ft.model.architecture import auto_class
from sparse_llm_ft.model.resizing import new_rows
from sparse_llm_ft.plan import ModuleAdapter
from sparse_llm_ft.report.grid import module_grid
from sparse_llm_ft.run_folder import SUMMARY_FILE
from sparse_llm_ft.serving.commands import GGUF_SERVERS

_CARD = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))

_ADAPTERS = """
## Adapters

The rank of each module's adapter; – means that the module has none. All modules marked as shared in a column use one A
and B. After the colon of a masked adapter: its kept rows (outputs) and columns (inputs).
"""

_FORMS = {
    "peft": "A stock PEFT adapter for",
    "native": "An adapter of sparse-llm-ft's own tuner for",
    "merged": "Merged weights of",
}

_VERSIONS = ("python", "sparse-llm-ft", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")


def model_card(
    run: TrainedRun, repo_id: str, options: ExportOptions, remarks: Sequence[str] = (), commands: Sequence[str] = ()
) -> str:
    """The card's text. It names no local folder, and leaves license and language to the uploader.

    Args:
        remarks: lines about the export, such as what a smaller rank has cost.
        commands: lines of `serve_lines`, with public names.
    """
    config, task, progress = run.config, run.task, run.state.progress
    summary = run.folder.summary() if (run.folder.path / SUMMARY_FILE).is_file() else {}
    base = public_name(config.model.name)

    # Parts that depend on the form or on where things are from.
    quantization = ""
    if config.model.quantization != "none":
        merged = ", which were dequantised and merged with the adapter" if options.to == "merged" else ""
        quantization = f" Training saw the base's weights in 4 bit ({config.model.quantization}){merged}."
    hub = " / ".join(part for part in (task.hub_id, task.hub_config) if part)
    tree = public_settings(config)
    sizes, versions, processes = summary.get("samples", {}), summary.get("versions", {}), summary.get("world_size")

    # The card.
    card = _CARD.substitute(
        metadata=metadata_of(run, options).to_yaml(),
        title=repo_id.partition("/")[2],
        form="A LoRA in GGUF for" if options.server in GGUF_SERVERS else _FORMS[options.to],
        base=base + (" (a local model)" if is_local(config.model.name) else ""),
        task=config.task.name,
        method=config.method_name,
        quantization=quantization,
        language="sh" if options.server in GGUF_SERVERS else "python",
        loading=_loading(run, base, repo_id, options),
        remarks="".join(f"\nThis is the adapter at {remark}.\n" for remark in remarks),
        serving=_serving(commands),
        plan=run.plan.describe(),
        steps=f"{progress.step:,}",
        phase=run.phase.name,
        settings=yaml.safe_dump(
            {key: tree[key] for key in ("method", "adapter", "training")}, sort_keys=False
        ).rstrip(),
        adapters=_ADAPTERS + _adapter_table(run) if run.plan.active else "",
        source=f": {hub} on the Hugging Face hub" if config.task.path is None else ", from a local folder",
        sizes=_table(("split", "samples used"), [[split, f"{count:,}"] for split, count in sizes.items() if count]),
        results=_results(run, summary.get("metrics", {})),
        launcher="deepspeed" if processes is None else f"deepspeed --num_gpus {processes}",
        versions=_table(
            ("package", "version"), [[name, str(versions[name])] for name in _VERSIONS if name in versions]
        ),
    )
    return str(ModelCard(card))


def metadata_of(run: TrainedRun, options: ExportOptions) -> ModelCardData:
    """The hub's metadata: library, tags, and base and data set if they are from the hub."""
    config, task = run.config, run.task
    methods = [method.name.replace("_", "-") for method in config.method]
    return ModelCardData(
        base_model=None if is_local(config.model.name) else config.model.name,
        library_name=_library(options),
        tags=list(dict.fromkeys(["sparse-llm-ft", *methods])),
        datasets=[task.hub_id] if config.task.path is None and task.hub_id is not None else None,
    )


def _library(options: ExportOptions) -> str:
    if options.server in GGUF_SERVERS:
        return "gguf"
    return "transformers" if options.to == "merged" else "peft"


def _loading(run: TrainedRun, base: str, repo_id: str, options: ExportOptions) -> str:
    """The lines that load the uploaded model: Python, or a shell's for GGUF."""
    if options.server in GGUF_SERVERS:
        return f"hf download {repo_id} --local-dir {repo_id.partition('/')[2]}"
    auto = auto_class(run.empty.config, run.task_mode.mode).__name__
    if options.to == "merged":
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{repo_id}")'
    native = "\nimport sparse_llm_ft.adapters  # registers the tuner with PEFT\n" if options.to == "native" else ""
    arguments = f'"{base}"'
    if run.config.model.revision is not None:
        arguments += f', revision="{run.config.model.revision}"'
    if run.task_mode.outputs:
        arguments += f", num_labels={run.task_mode.outputs}"
    torch, resize = "", ""
    if added := new_rows(run.empty):
        torch = "import torch\n"
        resize = (
            f"torch.manual_seed({run.config.seed})  # the base has had {len(added)} rows less\n"
            f"base.resize_token_embeddings({added.stop})\n"
        )
    return f"""\
{torch}from peft import PeftModel
from transformers import {auto}
{native}
base = {auto}.from_pretrained({arguments})
{resize}model = PeftModel.from_pretrained(base, "{repo_id}")"""


def _serving(commands: Sequence[str]) -> str:
    """The section with the servers' commands; nothing without one."""
    return f"\n## How to serve it\n\n```\n{chr(10).join(commands)}\n```\n" if commands else ""


def _adapter_table(run: TrainedRun) -> str:
    """A row for each layer, a column for each type of module."""
    grid = module_grid(run.plan.modules)
    cells = [["–"] * len(grid.kinds) for _ in grid.layers]
    for name, adapter in run.plan.active.items():
        row, column = grid.places[name]
        cells[row][column] = _cell(adapter)
    return _table(("layer", *grid.kinds), [[layer, *row] for layer, row in zip(grid.layers, cells, strict=True)])


def _cell(adapter: ModuleAdapter) -> str:
    text = str(adapter.r) + (" shared" if adapter.group is not None else "")
    if adapter.rows is None and adapter.cols is None:
        return text
    kept = [1.0 if mask is None else len(mask.indices) / mask.size for mask in (adapter.rows, adapter.cols)]
    return f"{text}: {kept[0]:.0%} × {kept[1]:.0%}"


def _results(run: TrainedRun, metrics: Mapping[str, Any]) -> str:
    evaluation = run.config.evaluation
    before, after = metrics.get("before") or run.state.record.before, metrics.get("after") or {}
    if not before:
        return "The model was not evaluated.\n"
    rows = [[name, _number(before.get(name)), _number(after.get(name))] for name in after or before]
    note = "" if after else "\nTraining had not ended when this was uploaded.\n"
    table = _table(("metric", "before", "after"), rows)
    return (
        f"Before and after training, on the first {evaluation.samples:,} samples of the {evaluation.split} split:\n"
        f"{table}{note}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table between newlines, or nothing without rows."""
    lines = [head, ["---"] * len(head), *rows]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return f"\n{text}" if rows else ""
