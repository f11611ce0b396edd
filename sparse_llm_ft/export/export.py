"""Exports a run as stock PEFT adapter, as this package's own adapter, or as merged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from sparse_llm_ft.adapters import (
    ADAPTER_WEIGHTS,
    SparseLoraConfig,
    base_options,
    linear_modules,
    peft_adapter,
    tuner_of,
    write_peft_adapter,
)
from sparse_llm_ft.adapters.convert import is_omega, saved_name
from sparse_llm_ft.adapters.tuners import native_plan
from sparse_llm_ft.errors import UserError, reason_of
from sparse_llm_ft.export.for_server import fit
from sparse_llm_ft.export.gguf_file import GGUF_FILE, check_gguf, modelfile, write_gguf
from sparse_llm_ft.export.merge import merge_adapters
from sparse_llm_ft.export.options import SHARD_SIZE, ExportOptions, refuse_existing
from sparse_llm_ft.export.read_back import check_adapter
from sparse_llm_ft.export.truncate import to_rank
from sparse_llm_ft.export.whole_model import check_values, save_whole_model
from sparse_llm_ft.inference.trained_run import TrainedRun, load_trained
from sparse_llm_ft.io.atomic import write_new_folder
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.serving.commands import GGUF_SERVERS

TRUNCATION_FILE, MODELFILE = "truncation.json", "Modelfile"


def export_run(run: TrainedRun, output: Path, options: ExportOptions) -> list[str]:
    """Write the export into the new folder `output`, atomically. Returns lines for people about it.

    Raises:
        UserError: `output` exists or cannot be written, or the run does not have this form.
    """
    refuse_existing(output)
    check_form(run, options)
    lines: list[str] = []
    write_output(output, lambda folder: lines.extend(write_export(folder, run, options, run.config.model.name)))
    return lines


def write_output(output: Path, fill: Callable[[Path], None]) -> None:
    """`write_new_folder`, but a full disk or an unwritable place is a `UserError`."""
    try:
        write_new_folder(output, fill)
    except FileExistsError:  # since `refuse_existing` looked
        refuse_existing(output)
        raise
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
    for option, given in ((f"--rank {options.rank}", options.rank), (f"--for {options.server}", options.server)):
        if given is not None and not tuner.is_product:
            raise UserError(
                f"{option}: {where} was trained with tuner {tuner.name}, which servers do not load; use --to merged"
            )
    if options.server is not None and run.task_mode.mode != "causal_lm":
        raise UserError(
            f"--for {options.server}: {where} trained a model for {run.task_mode.mode}, and servers take adapters of "
            "causal language models alone; leave it out"
        )
    if options.server in GGUF_SERVERS:
        check_gguf(run.empty, options.server)
    if options.to != "merged" and not run.plan.active:
        raise UserError(
            f"--to {options.to}: the newest checkpoint of {where} is from phase {run.phase.name}, which has no "
            "adapters; use --to merged, or let the run continue"
        )
    off = [float(value) <= 0 for name, value in run.state.tensors.items() if is_omega(name)]
    if options.to == "peft" and len(off) == len(run.plan.active) and all(off):
        raise UserError(f"--to peft: every adapter of {where} is off (omega <= 0); use --to native")


def write_export(folder: Path, run: TrainedRun, options: ExportOptions, base: str) -> list[str]:
    """Write the files into the empty folder `folder`. Returns lines for people about what they hold.

    Args:
        base: the base model's name in the adapter's config.
    """
    if options.to == "merged":
        _write_merged(folder, run, options.max_shard_size or SHARD_SIZE)
        return []
    with Wait(run.context.console, "exporting"):
        if options.to == "peft":
            return _write_peft(folder, run, options, base)
        _write_native(folder, run, base)
        return []


def _write_peft(folder: Path, run: TrainedRun, options: ExportOptions, base: str) -> list[str]:
    """Write a stock adapter, at the rank and for the server that the options name."""
    lines = []
    settings = base_options(run.empty, run.plan)
    task, revision, tensors = task_type(run.empty), run.config.model.revision, run.state.tensors
    written, weights = peft_adapter(run.plan, tensors, base, revision, task, settings, options.patterns)
    config: dict[str, Any] = written
    if options.rank is not None:
        ranks = {name: adapter.r for name, adapter in run.plan.active.items() if name in config["target_modules"]}
        weights, truncation = to_rank(weights, ranks, options.rank)
        config |= {"r": options.rank, "lora_alpha": options.rank}
        lines = [truncation.describe(), f"each module's error: {TRUNCATION_FILE}"]
        text = json.dumps(truncation.to_dict(), indent=2)
        (folder / TRUNCATION_FILE).write_text(f"{text}\n", encoding="utf-8")
    if options.server is not None:
        layers = getattr(run.empty.config.get_text_config(), "num_hidden_layers", None)
        config, weights = fit(options.server, config, weights, linear_modules(run.empty), layers)
    if options.server in GGUF_SERVERS:
        write_gguf(folder / GGUF_FILE, run.empty, config["lora_alpha"], weights)
        if options.server == "ollama":
            (folder / MODELFILE).write_text(modelfile(base), encoding="utf-8")
        return lines
    write_peft_adapter(folder, config, weights)
    check_adapter(folder, config, weights)
    return lines


def _write_merged(folder: Path, run: TrainedRun, max_shard_size: str) -> None:
    trained = load_trained(run, dequantize=True)
    with Wait(run.context.console, "exporting"):
        try:
            model = merge_adapters(trained)
            save_whole_model(folder, model, run.context, max_shard_size)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
            name, reason = run.config.model.name, reason_of(error)
            raise UserError(f"--to merged: {name} cannot be saved as a whole model ({reason})") from error
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
