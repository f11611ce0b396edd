"""A run's records: phases/*.json, summary.json, and the table at the end of a run."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from statistics import mean
from typing import Any

import torch
from rich.table import Table

from sparse_llm_ft import __version__
from sparse_llm_ft.adapters import count_parameters, is_omega, residual_norms
from sparse_llm_ft.adapters.left_out import LeftOut
from sparse_llm_ft.adapters.masking import row_masks
from sparse_llm_ft.checkpoint.record import PhaseRecord, RunRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.config.schema import AdapterConfig
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.dataset import Splits
from sparse_llm_ft.data.subset import LEAST
from sparse_llm_ft.data.training_set import TrainingSet
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.doctor.findings import Level
from sparse_llm_ft.doctor.machine import cpu_bf16
from sparse_llm_ft.errors import ConfigError, reason_of
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.buffers import fixed_parameters
from sparse_llm_ft.model.flops import StepFlops
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, Shape, module_kind
from sparse_llm_ft.planning.devices import planned_device
from sparse_llm_ft.planning.forecast import forecast
from sparse_llm_ft.planning.tables import phases_to_json
from sparse_llm_ft.report.data import MFU, PHASE_NUMBERS
from sparse_llm_ft.run_folder import FORECAST_FILE, RunFolder
from sparse_llm_ft.scoring import Derivation, importance_by_type
from sparse_llm_ft.scoring.scores import EntryScores, Scores
from sparse_llm_ft.serving.commands import run_lines
from sparse_llm_ft.training.loop import Loop, Step

_LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "accelerate", "datasets")
_ROWS = {key: label for key, label in PHASE_NUMBERS.items() if key not in ("samples", "seconds")}


def step_line(record: PhaseRecord, step: Step, loop: Loop, flops: StepFlops | None = None) -> dict[str, object]:
    """A step as one object of metrics.jsonl. A skipped step has neither loss nor gradient norm.

    Args:
        flops: the phase's; None: a step has no ``mfu``.
    """
    done = (step.tokens, step.squares, step.units, step.seconds, cached_share(step, loop))
    return {
        "step": loop.progress.step,
        "phase": record.name,
        "loss": None if step.skipped else step.loss,
        "learning_rate": step.learning_rate,
        **(
            {}
            if (factor := loop.engine.settings.head_lr_factor) == 1.0
            else {"head_learning_rate": step.learning_rate * factor}
        ),
        "grad_norm": None if step.skipped else step.grad_norm,
        "samples": loop.progress.samples,
        "tokens_per_second": step.tokens / step.seconds,
        **({} if flops is None else {"mfu": flops.mfu(*done)}),
        "trainable_parameters": record.trainable_parameters,
        "active_adapters": step.active_adapters,
        **({} if step.cached_samples is None else {"cached_samples": step.cached_samples}),
        **({"skipped": True} if step.skipped else {}),
        **({"out_of_memory": record.out_of_memory} if record.out_of_memory else {}),
        **step.callback,
    }


def cached_share(step: Step, loop: Loop) -> float:
    """The share of a step's samples whose lower layers were not run, 0 to 1."""
    return (step.cached_samples or 0) / loop.phase.global_batch_size


def remarks(context: RunContext, splits: Splits, data: TrainingSet, first: Phase) -> list[str]:
    """Log lines about settings and data that a run can have and its user may not expect.

    Args:
        first: the run's first phase.
    """
    config, scoring = context.config, first.scoring
    lines = [*context.remarks(), *splits.remarks(config.task)]
    if data.size:  # unknown for a stream
        epoch = math.ceil(data.size / config.training.global_batch_size)
        lines += [line for method in config.method for line in method.remarks(epoch)]
    derives = scoring is not None and scoring.kind == "derivation" and scoring.search
    scored = first.subset
    if scored is not None and scored.part == "half":  # the head is fitted on it, and the other half is scored
        scored = replace(scored, part="other_half")
    if derives and (count := len(data.subset(scored))) < LEAST:
        lines.append(
            f"D_t has only {count} samples to score: accuracies on them have standard errors of up to "
            f"{50 / count**0.5:.0f} points, and ratios come from them; by default, without method.shots and "
            f"method.sample_fraction, it has {LEAST} where the training set is large enough"
        )
    return lines


def summarize(
    config: RunConfig,
    world: World,
    record: RunRecord,
    after: Mapping[str, float] | None,
    samples: Mapping[str, int],
    left_out: LeftOut | None = None,
    exported_step: int = 0,
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        record: that of the last state; its current phase is the run's last one.
        samples: split -> number of samples used; 0 for a stream, whose number is unknown.
        left_out: weights that no adapter of the run could go on.
        exported_step: the step whose values were measured after training and exported.
    """
    assert record.current is not None, "the last phase was trained"
    finished = [_totals(phase) | {"measured": phase.measured} for phase in record.phases]
    return {
        "method": config.method_name,
        "model": config.model.name,
        "task": config.task.name,
        "world_size": world.size,
        "zero_stage": config.deepspeed.zero_stage,
        "quantization": config.model.quantization,
        "dtype": config.model.dtype,
        "seed": config.seed,
        "versions": {"python": sys.version.split()[0], "sparse-llm-ft": __version__}
        | {name: _version(name) for name in _LIBRARIES},
        "samples": dict(samples),
        "without_adapters": None if left_out is None or not left_out.kinds else asdict(left_out),
        "phases": [*finished, _totals(record.current)],
        "exported_step": exported_step,
        "best": None if record.best is None else record.best.model_dump(),
        "metrics": {"before": record.before, "after": after},
    }


def _version(name: str) -> str | None:
    """A library's version; None if it was installed without saying so, which must not end a run."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _totals(phase: PhaseRecord) -> dict[str, object]:
    """A phase's entry in the summary."""
    numbers = phase.model_dump(exclude={"measured", "flops", "possible_flops"})
    return numbers | {"tokens_per_second": phase.tokens_per_second, "mfu": phase.mfu}


def show_summary(summary: Mapping[str, Any], folder: RunFolder, console: Console) -> None:
    """Print the tables at the end of a run, on rank 0."""
    if not console.enabled:
        return
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    if before and after:
        table = Table(title=f"{summary['method']} on {summary['task']}")
        for column in ("metric", "before", "after"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for name in after:
            table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
        console.rich.print(table)
    processes = f"{summary['world_size']} process{'es' if summary['world_size'] > 1 else ''}"
    table = Table(title=f"phases, {processes}, ZeRO-{summary['zero_stage']}")
    table.add_column("")
    for phase in summary["phases"]:  # a column per phase, so that the table fits a narrow terminal
        table.add_column(phase["name"], justify="right")
    for key, label in _ROWS.items():
        table.add_row(label, *(f"{phase[key]:,.0f}" for phase in summary["phases"]))
    if any(phase.get("mfu") is not None for phase in summary["phases"]):
        table.add_row(MFU, *("" if (m := phase.get("mfu")) is None else f"{m:.1%}" for phase in summary["phases"]))
    console.rich.print(table)
    for phase in summary["phases"]:
        if count := phase.get("out_of_memory"):
            console.log(
                f"phase {phase['name']} ran out of memory {count} time{'s' if count > 1 else ''} and ended with "
                f"micro-batch {phase['micro_batch_size']}"
            )
        if phase.get("measured"):
            console.log(f"phase {phase['name']} measured: {phase['measured']}")
    if left_out := summary.get("without_adapters"):
        console.log(f"without adapters: {LeftOut(**left_out).describe()}")
    of_step = f", of step {summary['exported_step']}" if summary.get("best") else ""
    if folder.model.is_dir():
        console.log(f"model: {folder.model}{of_step}")
    else:
        console.log(f"adapter (stock PEFT): {folder.adapter}{of_step}")
        for line in run_lines(folder.adapter) if folder.adapter.is_dir() else ():
            console.log(line)
    if folder.report.is_dir():
        console.log(f"pictures: {folder.report / 'index.html'}")


def phase_file(phase: Phase, progress: Progress, targets: Mapping[str, Shape]) -> tuple[str, dict[str, object]]:
    """Name and content of a phase's file when the phase begins."""
    content: dict[str, object] = {
        "index": progress.phase,
        "name": phase.name,
        "start_step": progress.step - progress.phase_step,
        "plan": phase.plan.to_dict(),
        "shapes": {name: list(shape) for name, shape in targets.items()},
        "scores": None,
        "delta_norms": None,
    }
    return f"phases/{progress.phase:02d}-{phase.name}.json", content


def finished_phase_file(
    phase: Phase, state: TrainState, scores: Scores, following: AdapterPlan | None, targets: Mapping[str, Shape]
) -> tuple[str, dict[str, object]]:
    """Name and content of a phase's file when the phase has ended.

    Args:
        following: the next phase's plan, if any.
    """
    name, content = phase_file(phase, state.progress, targets)
    content["scores"] = describe_scores(phase, state, scores, following)
    content["delta_norms"] = residual_norms(phase.plan, state.tensors) or None
    return name, content


def machine_remarks(config: RunConfig) -> list[str]:
    """A log line if the processor on which this run trains multiplies its numbers slowly."""
    found = cpu_bf16() if config.model.dtype == "bfloat16" else ()
    return [
        f"warning: model.dtype is bfloat16, and {slow.found}: {slow.advice}"
        for slow in found
        if slow.level is Level.WARNING
    ]


def check_samples(record: RunRecord, key: str) -> None:
    """Refuse to resume with other samples. The run's place in its data is a number, which would mean other samples,
    and the metrics after training would not be comparable with those before.

    Raises:
        ConfigError: rows, tokenizer or package differ from those that the run began with.
    """
    if record.samples != key:
        raise ConfigError(
            "task",
            "the samples are not those that the run began with: rows or tokenizer have changed",
            "expected the same ones, or another output_dir",
        )


def describe_phase(context: RunContext, phase: Phase) -> list[str]:
    """Lines for people: a phase's adapters by kind, what has none, and how many parameters are trained."""
    plan = phase.plan
    kinds = Counter(module_kind(name).rpartition(".")[2] for name in plan.active)
    adapters = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
    rows, fixed = row_masks(plan), fixed_parameters(context.empty)
    whole = sum(
        len(rows[full].indices) * parameter.shape[1] if (full := f"{name}.{own}") in rows else parameter.numel()
        for name in plan.trained
        for own, parameter in context.empty.get_submodule(name).named_parameters()
        if f"{name}.{own}".removeprefix(".") not in fixed
    )
    left_out = context.left_out
    return [
        f"phase {phase.name}: {plan.describe()}{adapters}",
        *([f"trained beside them: {plan.describe_trained()}"] if plan.trained and plan.active else []),
        *([f"without adapters: {left_out.describe()}"] if left_out.kinds and plan.active else []),
        f"{count_parameters(plan, context.targets) + whole:,} trainable parameters",
        *mask_remarks(plan, context.targets, context.config.adapter),
    ]


def mask_remarks(plan: AdapterPlan, targets: Mapping[str, Shape], adapter: AdapterConfig) -> list[str]:
    """A line about the learning rate that masks want; none for a plan that keeps nearly all.

    Adam moves every kept entry of B by about the learning rate, whatever its gradient. To first order a step changes
    the loss by the sum over the kept rows of that times A x, whose size falls with the root of the kept columns: by
    p_row sqrt(p_col) of what it does without masks, times the plan's scaling over ``lora_alpha / r``
    (``method.mask_scaling``). Its inverse makes up for this. More than 4 is not suggested (ours): on MiniLM/SST-2 this
    factor was the best one where the inverse is 20, and 16 diverged (docs/results.md).
    """
    shares = []
    for name, a in plan.active.items():
        rows, cols = a.shape(targets[name])
        shares.append((rows / targets[name][0], cols / targets[name][1], a.scaling * adapter.r / adapter.lora_alpha))
    effect = mean(p_row * p_col**0.5 * scale for p_row, p_col, scale in shares) if shares else 1.0
    if effect > 0.5 or not any(a.rows or a.cols for a in plan.active.values()):
        return []
    p_row, p_col, _ = (mean(values) for values in zip(*shares, strict=True))
    return [
        f"masks keep p_row {p_row:.3f} and p_col {p_col:.3f} on average; Adam's first-order step is {effect:.3f} of "
        f"LoRA's (p_row sqrt(p_col), times the scaling): consider up to {min(4.0, 1 / effect):.2g} times LoRA's "
        "training.learning_rate"
    ]


def describe_scores(
    phase: Phase, state: TrainState, scores: Scores, following: AdapterPlan | None
) -> dict[str, object] | None:
    """The phase's scores as JSON values; None without scores."""
    if isinstance(scores, Derivation):
        return scores.summary() | {"head_fitted": phase.target_plan is not None}
    if isinstance(scores, EntryScores):
        return {"kind": "entries", "samples": scores.samples}
    if scores is not None:
        own = [name for name, a in following.active.items() if a.group is None] if following else []
        return {"kind": "lora_output", "g": scores, "y": importance_by_type(scores, module_kind), "kept": own}
    omega = {n.rpartition(".")[0]: float(t) for n, t in state.tensors.items() if is_omega(n)}
    return {"kind": "omega", "omega": omega} if omega else None


def describe_measurement(scores: Scores, phase: Phase) -> str | None:
    """The phase's scores in a line for the summary; None without scores."""
    if isinstance(scores, Derivation):
        how = "the head fitted on the other half of D_t" if phase.target_plan is not None else "no head fitted"
        return f"{scores.describe()}, {how}"
    if isinstance(scores, EntryScores):
        count = sum(map(torch.numel, scores.values.values()))
        return f"gradient times value of {count:,} entries on {scores.samples} samples"
    return None if scores is None else f"LoRA outputs of {len(scores)} modules"


def record_forecast(context: RunContext, process_bytes: int | None) -> None:
    """Write what the settings and samples let expect, beside which the report draws what the run took; not if the
    folder has a forecast. Nothing is written for a model that cannot be traced on the meta device.

    It is made at the run's end, because tracing the steps of an 8B model takes 10 to 20 s.

    Args:
        process_bytes: what the process held before it loaded the base; None: a GPU's memory counts, or not known.
    """
    folder, console = context.folder, context.console
    if (folder.path / FORECAST_FILE).is_file():
        return
    device = planned_device(context.config)
    try:
        found = forecast(context, on_gpu=device.is_gpu)
    except Exception as error:  # a model may fail on the meta device in any way
        console.log(f"planned memory: not known for this model ({type(error).__name__}: {reason_of(error, 200)})")
        return
    process = None if device.is_gpu else process_bytes
    folder.write_json(FORECAST_FILE, {"phases": phases_to_json(found), "process_bytes": process})
