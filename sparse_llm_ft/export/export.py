"""Exports a run as stock PEFT adapter, as this package's own adapter, or as merged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_llm_ft.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SparseLoraConfig,
    base_options,
    save_peft_adapter,
    tuner_of,
)
from sparse_llm_ft.adapters.convert import is_omega, saved_name
from sparse_llm_ft.adapters.tuners import native_plan
from sparse_llm_ft.errors import UserError, reason_of
from sparse_llm_ft.export.merge import merge_adapters
from sparse_llm_ft.export.options import ExportOptions, refuse_existing
from sparse_llm_ft.export.read_back import check_adapter
from sparse_llm_ft.export.uniform_rank import to_uniform_rank
from sparse_llm_ft.export.whole_model import check_values, save_whole_model
from sparse_llm_ft.inference.trained_run import TrainedRun, load_trained
from sparse_llm_ft.io.atomic import write_folder
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.plan import AdapterPlan


def export_run(run: TrainedRun, output: Path, options: ExportOptions) -> None:
    """Write the export into the new folder `output`, atomically.

    Raises:
        UserError: `output` exists or cannot be written, or the run does not have this form.
    """
    refuse_existing(output)
    check_form(run, options)
    write_new_folder(output, lambda folder: write_export(folder, run, options, run.config.model.name))


def write_new_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """`write_folder`, but a full disk or an unwritable place is a `UserError`."""
    try:
        write_folder(output, fill)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {output}: cannot be written ({reason})") from error


def check_form(run: TrainedRun, options: ExportOptions) -> None:
    """Refuse a form that this run does not have, before anything is written.

    Raises:
        UserError: the run does not have this form; the message says why.
    """
    tuner, where = tuner_of(run.plan), run.folder.path
    if run.full and options.to != "merged":
        raise UserError(f"--to {options.to}: {where} trained the whole model, so there is no adapter; use --to merged")
    if options.to == "native" and not tuner.is_product:
        raise UserError(f"--to native: {where} was trained with PEFT's own tuner {tuner.name}; use --to peft")
    if options.to == "native" and run.plan.rows:
        raise UserError(
            f"--to native: {where} trained rows of its embeddings (adapter.trainable_tokens); use --to peft"
        )
    if options.uniform_rank and not tuner.is_product:
        raise UserError(f"--uniform-rank: {where} was trained with tuner {tuner.name}; expected a LoRA")
    if options.to != "merged" and not run.plan.active:
        raise UserError(
            f"--to {options.to}: the newest checkpoint of {where} is from phase {run.phase.name}, which has no "
            "adapters; use --to merged, or let the run continue"
        )
    off = [float(value) <= 0 for name, value in run.state.tensors.items() if is_omega(name)]
    if options.to == "peft" and len(off) == len(run.plan.active) and all(off):
        raise UserError(f"--to peft: every adapter of {where} is off (omega <= 0); use --to native")


def write_export(folder: Path, run: TrainedRun, options: ExportOptions, base: str) -> None:
    """Write the files into the empty folder `folder`.

    Args:
        base: the base model's name in the adapter's config.
    """
    if options.to == "merged":
        _write_merged(folder, run, options.max_shard_size)
    elif options.to == "native":
        _write_native(folder, run, base)
    else:
        written = save_peft_adapter(
            folder,
            run.plan,
            run.state.tensors,
            base,
            run.config.model.revision,
            task_type(run.empty),
            base_options(run.empty, run.plan),
        )
        check_adapter(folder, *written)
        if options.uniform_rank:
            _rewrite_uniform(folder, run.plan)


def _write_merged(folder: Path, run: TrainedRun, max_shard_size: str) -> None:
    trained = load_trained(run, dequantize=True)
    try:
        model = merge_adapters(trained)
        save_whole_model(folder, model, run.context, max_shard_size)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        reason = reason_of(error)
        raise UserError(f"--to merged: {run.config.model.name} cannot be saved as a whole model ({reason})") from error
    check_values(folder, run.context, model.state_dict())


def _write_native(folder: Path, run: TrainedRun, base: str) -> None:
    """Write kept rows and columns only, each group once, and ω if it is trained."""
    plan = native_plan(run.plan)
    config = SparseLoraConfig(
        plan=plan,
        target_modules=sorted(plan.active),
        base_model_name_or_path=base,
        revision=run.config.model.revision,
        task_type=None if plan.trained else task_type(run.empty),
        inference_mode=True,
    )
    config.save_pretrained(folder)
    weights = {saved_name(name, plan): tensor.contiguous() for name, tensor in run.state.tensors.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _rewrite_uniform(folder: Path, plan: AdapterPlan) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config, weights = to_uniform_rank(config, load_file(folder / ADAPTER_WEIGHTS), plan)
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
