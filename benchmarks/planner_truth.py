"""The planner's forecast beside the bytes of real steps: every line, and the peak, with signed errors.

    python benchmarks/planner_truth.py --model FOLDER --store FILE [--suites NAME ...] [--only-plan]

FOLDER is SmolLM2-135M-Instruct. Each case opens a run, builds the engine of one of its phases, makes steps of the run's
own loop, and counts the bytes of all tensors in one of them: `LiveBytes` in both passes and the update, and what was
there before by Python's own list of objects. Two and four ranks run under torchrun, over gloo. What a case measured is
kept in FILE; --only-plan makes no new steps, and plans those in FILE anew. The phases are the planner's, after T too.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import argument_parser, print_table, start

MARK = "truth: "


@dataclass(frozen=True)
class Case:
    """A step that is planned and made.

    Attributes:
        model: ``smollm2``, or ``random``: a Llama of random weights with 8 layers, untied embeddings and grouped heads.
        ranks: processes.
        phase: number of the run's phase.
        method: settings of the method.
        padded: whether the samples of a micro-batch differ in length.
        limits: whether ZeRO-3 may gather and keep only as much of this small base as of a large one.
    """

    model: str = "smollm2"
    ranks: int = 1
    stage: int = 0
    method: str = "lora"
    phase: int = 0
    length: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    quantization: str = "none"
    checkpointing: bool = False
    packing: bool = False
    padded: bool = False
    accumulation: int = 1
    limits: bool = False

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.model, f"{self.method}", f"phase {self.phase}", f"ZeRO-{self.stage} x{self.ranks}"]
        parts += [f"{self.batch}x{self.length}", "nf4" if self.quantization == "nf4" else self.dtype]
        parts += [word for word in ("checkpointing", "packing", "padded", "limits") if getattr(self, word)]
        parts += [f"{self.accumulation} micro-steps"] if self.accumulation > 1 else []
        return ", ".join(parts)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "weight_lora": {"name": "weight_lora", "keep": 21, "steps": 100, "batch_growth": "none"},
    "weight_lora_plus": {"name": "weight_lora_plus", "keep": 21, "steps": 100, "batch_growth": "none"},
    "lora_drop": {"name": "lora_drop"},
    "partial_lora": {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5},
    "partial_lora compact": {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5, "masking": "compact"},
    "random_masking": {"name": "random_masking", "ratio": 0.2},
    "tied_lora": {"name": "tied_lora"},
    "dora": {"name": "dora"},
    "vera": {"name": "vera"},
    "lora_plus": {"name": "lora_plus"},
}
"""Method sections by the names of cases. K is a tenth of SmolLM2's 210 adapters."""

LIMITS = {
    "stage3_max_reuse_distance": 5_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_max_live_parameters": 6_000_000,
    "stage3_param_persistence_threshold": 5_000,
}
"""DeepSpeed's defaults divided by about 100, as the base is smaller than Llama-3-8B."""

SUITES: dict[str, list[Case]] = {
    "length": [Case(length=length) for length in (32, 128, 256)],
    "batch": [Case(batch=2), Case(batch=3, padded=True, length=96), Case(batch=2, accumulation=2, length=64)],
    "random": [
        Case("random", length=length, batch=batch, checkpointing=checkpointing, quantization=kind)
        for length, batch, checkpointing, kind in (
            (64, 1, False, "none"),
            (512, 1, False, "none"),
            (256, 4, False, "nf4"),
            (512, 2, True, "none"),
            (512, 2, True, "nf4"),
        )
    ],
    "method": [Case("random", method=name, batch=2) for name in METHODS if name != "lora"]
    + [Case("random", method=name, phase=1, batch=2) for name in ("weight_lora", "weight_lora_plus", "lora_drop")],
    "survivors": [Case(method="weight_lora", phase=phase, length=128) for phase in (0, 1)],
    "type": [Case(quantization="nf4"), Case(dtype="float32"), Case(quantization="nf4", length=32)],
    "checkpointing": [
        Case(checkpointing=True),
        Case(checkpointing=True, quantization="nf4", method="weight_lora"),
        Case(checkpointing=True, method="weight_lora", phase=1, length=256),
    ],
    "packing": [Case(packing=True), Case("random", packing=True, batch=2, quantization="nf4", length=256)],
    "stage": [Case("random", stage=stage, method="weight_lora") for stage in (1, 2, 3)]
    + [Case("random", stage=2, method="partial_lora", quantization="nf4")],
    "ranks": [
        Case("random", ranks=2, stage=stage, method=method, quantization=kind, phase=phase, accumulation=steps)
        for stage, method, kind, phase, steps in (
            (0, "lora", "none", 0, 1),
            (1, "lora", "none", 0, 2),
            (2, "lora", "none", 0, 1),
            (2, "weight_lora_plus", "nf4", 1, 2),
            (2, "partial_lora", "none", 0, 1),
            (3, "lora", "none", 0, 1),
            (3, "lora", "nf4", 0, 2),
            (3, "weight_lora", "none", 0, 1),
            (3, "weight_lora", "nf4", 1, 1),
        )
    ]
    + [Case("random", ranks=2, stage=3, checkpointing=True, method="weight_lora", length=512)]
    + [Case(ranks=2, stage=3, length=64), Case(ranks=2, stage=3, length=64, quantization="nf4")],
    "limits": [
        Case(
            "random", ranks=2, stage=3, method=method, phase=phase, quantization=kind, checkpointing=again, limits=True
        )
        for method, phase, kind, again in (
            ("lora", 0, "none", False),
            ("weight_lora", 1, "nf4", False),
            ("weight_lora", 0, "nf4", True),
        )
    ],
    "four ranks": [
        Case("random", ranks=4, stage=stage, method="weight_lora", length=32, quantization="nf4") for stage in (2, 3)
    ],
}


def main() -> None:
    """Run the cases in processes of their own, and print the tables."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", required=True, metavar="FILE", type=Path)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--only-plan", action="store_true")
    options = parser.parse_args()
    cases = [case for name in options.suites for case in SUITES[name]]
    kept: dict[str, Any] = json.loads(options.store.read_text()) if options.store.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"smollm2": options.model, "random": random_base(options.model, folder)}
        for ranks in sorted({case.ranks for case in cases}):
            new = [case for case in cases if case.ranks == ranks and case.name not in kept]
            if not options.only_plan and new:
                for case, real in launch(models, new, ranks):
                    kept[case.name] = real
                    options.store.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        show([(case, plan(case, models), kept[case.name]) for case in cases if case.name in kept])


def random_base(tokenizer: str, folder: str) -> str:
    """Write a Llama of random weights, with the tokenizer of another model, and return its folder."""
    from harness import random_llama
    from transformers import AutoTokenizer

    random_llama(49152, 512, 1376, 8, 8, 2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def launch(models: dict[str, str], cases: Sequence[Case], ranks: int) -> Iterator[tuple[Case, dict[str, int]]]:
    """Start the processes of these cases, which all have as many ranks, and yield what rank 0 has measured."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(ranks), "--standalone"]
    arguments = [__file__, "--child", json.dumps(models), json.dumps([asdict(case) for case in cases])]
    # Freed memory goes back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with subprocess.Popen(
        [*command, *arguments], env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        done = 0
        for line in running.stdout:
            if MARK in line:
                yield cases[done], json.loads(line.partition(MARK)[2])
                done += 1
    if running.returncode or done != len(cases):
        sys.exit(f"{cases[done].name} failed" if done < len(cases) else "failed at the end")


def show(results: Sequence[tuple[Case, dict[str, int], dict[str, int]]]) -> None:
    """One line of a table for each case: signed errors of the lines that exist there, and of the peak."""
    keys = list(dict.fromkeys(key for _, planned, _ in results for key in planned))

    def cell(planned: int, real: int) -> str:
        if not real:
            return f"{planned:,} for 0" if planned else ""
        return f"{(planned - real) / real:+.2%}" if planned != real else "0"

    rows = [
        [case.name, f"{real['peak'] / 2**20:.1f}", *(cell(planned[key], real.get(key, 0)) for key in keys)]
        for case, planned, real in results
    ]
    print_table(["case", "real peak, MiB", *keys], rows)


def child(models: dict[str, str], cases: Sequence[Case]) -> None:
    """Run the cases on this rank; rank 0 prints. Collective."""
    world = start()
    from sparse_llm_ft.engine.engine import init_distributed

    init_distributed()
    for case in cases:
        context, sizes = opened(case, models)
        from sparse_llm_ft.planning.phases import foresee_phases

        phase = foresee_phases(context, world.size, sizes)[case.phase].phase
        result = real_step(case, context, phase, world)
        gc.collect()
        if world.rank == 0:
            print(MARK + json.dumps(result), flush=True)


def opened(case: Case, models: dict[str, str]) -> tuple[Any, Any]:
    """The case's run, opened, and the sizes of its samples."""
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.data.task_config import resolve_task
    from sparse_llm_ft.distributed.world import World
    from sparse_llm_ft.planning.samples import SampleSizes

    config = run_config(case, models[case.model])
    context = RunContext.open(config, World(0, case.ranks, 0, case.ranks), resolve_task(config.task))
    return context, replace(SampleSizes.assumed(case.length), count=10**6, equal=not case.padded)


def plan(case: Case, models: dict[str, str]) -> dict[str, int]:
    """What the planner says of the case, by the names of what is measured."""
    from sparse_llm_ft.planning.forecast import forecast

    context, sizes = opened(case, models)
    planned = forecast(context, case.ranks, sizes, on_gpu=False).phases[case.phase]
    lines = {key: planned.lines[key] for key in LINES}
    return {"peak": planned.peaks["step"], **lines, "communicated": planned.communicated_bytes_per_step}


LINES = ("base", "adapters", "gradients", "optimizer", "kept_for_backward", "logits_and_loss", "gathered_weights")


def run_config(case: Case, model: str) -> Any:
    """The settings of a case's run."""
    from sparse_llm_ft.config import parse_config

    total = case.batch * case.ranks * case.accumulation
    method = METHODS[case.method]
    if case.model == "tiny" and "keep" in method:  # the tests' model has 14 adapters
        method = method | {"keep": 4}
    return parse_config(
        {
            "model": {
                "name": model,
                "dtype": case.dtype,
                "quantization": case.quantization,
                "gradient_checkpointing": case.checkpointing,
            },
            "task": {
                "name": "custom",
                "path": ".",
                "prompt": "{a}",
                "completion": "{b}",
                "max_length": case.length,
                "packing": case.packing,
            },
            "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
            "method": method,
            "training": {"micro_batch_size": case.batch, "global_batch_size": total, "max_steps": 1000},
            "deepspeed": {"zero_stage": case.stage, "zero_optimization": LIMITS if case.limits else {}},
            "evaluation": {"samples": 0},
            "output_dir": "unused",
        }
    )


def real_step(case: Case, context: Any, phase: Any, world: Any) -> dict[str, int]:
    """The bytes of a real step. Collective."""
    from sparse_llm_ft.engine.build import build_model, engine_settings

    settings = engine_settings(context.config, phase, world.size)
    gc.collect()
    before = tensors()
    model = build_model(context.config, context.task_mode, phase.plan, settings.to_deepspeed(), world, context.console)
    return stepped(case, context, phase, world, settings, model, set(before))


def stepped(
    case: Case, context: Any, phase: Any, world: Any, settings: Any, model: Any, before: set[int]
) -> dict[str, int]:
    """Make steps, the last one under watch. Collective."""
    from toolkit_step import loop_step
    from watching import Communicated, Meter

    from sparse_llm_ft.config import TrainingConfig
    from sparse_llm_ft.engine.live_bytes import LiveBytes

    meter = Meter()
    training = TrainingConfig(max_steps=10**6, schedule="constant")
    system = loop_step(model, phase, samples_of(case), settings, training, world, meter)
    for _ in range(3):  # ZeRO-3 knows the order of weights from the second step on
        system.step()
    gc.collect()
    static = {key: size for key, size in tensors().items() if key not in before}
    real = {"base": held(model, False), "adapters": held(model, True), "optimizer": system.optimizer_bytes()}
    found: dict[str, int] = {}

    @contextmanager
    def forward() -> Iterator[None]:
        there = live.now  # gradients of earlier micro-steps
        yield
        found["kept_for_backward"] = live.now - there - gathered(model) + resident
        found["gathered_weights"] = gathered(model) - resident

    def backward() -> None:
        found["gradients"] = sum({t.untyped_storage()._cdata: nbytes(t) for t in system.gradients()}.values())

    meter.around_forward, meter.after_backward = forward, backward
    resident = gathered(model)
    with Communicated() as counted, LiveBytes() as live, head_watched(model, live, found):
        system.step()
    real |= {
        **found,
        "communicated": sum(counted.bytes.values()) if world.size > 1 else 0,
        "peak": sum(static.values()) + live.peak,
        "rest": sum(static.values()) - sum(real.values()),
    }
    return real


@contextmanager
def head_watched(model: Any, live: Any, found: dict[str, int]) -> Iterator[None]:
    """A context in which the output head tells by how much it lets the bytes rise."""
    from sparse_llm_ft.model.architecture import base_of

    base: Any = base_of(model)
    head = base.get_output_embeddings()
    began = [0]

    def before(*_: Any) -> None:
        began[0] = live.now
        live.recent = live.now

    def after(*_: Any) -> None:
        found["logits_and_loss"] = live.recent - began[0]

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def samples_of(case: Case) -> list[Any]:
    """Sequences of random tokens, of which all have a loss."""
    import random

    from sparse_llm_ft.data.samples import Pack, Sample

    draw = random.Random(0)

    def sample(length: int) -> Sample:
        ids = [draw.randrange(3, 20) for _ in range(length)]
        return Sample(tuple(ids[:1]), tuple(ids[1:]))

    count = case.batch * case.ranks * case.accumulation
    if case.packing:
        return [Pack((sample(case.length // 2), sample(case.length - case.length // 2))) for _ in range(count)]
    return [sample(case.length - (5 if case.padded and i % case.batch else 0)) for i in range(count)]


def tensors() -> dict[int, int]:
    """Bytes of every storage of a tensor that Python knows, by address."""
    import torch
    from bitsandbytes.nn import Params4bit

    kinds = (torch.Tensor, torch.nn.Parameter, Params4bit)
    return {
        t.untyped_storage()._cdata: nbytes(t)
        for t in (o for o in gc.get_objects() if type(o) in kinds)
        if t.device.type != "meta"
    }


def nbytes(tensor: Any) -> int:
    """Of its whole storage."""
    return int(tensor.untyped_storage().nbytes())


def held(model: Any, trained: bool) -> int:
    """Bytes of the trained or of the frozen parameters on this rank, parts and gathered ones; of the frozen ones with
    buffers and the states of 4-bit weights.
    """
    from watching import _tensors_of

    found: list[Any] = [] if trained else list(model.buffers())
    for parameter in model.parameters():
        if parameter.requires_grad == trained:
            found += [parameter.data] + ([parameter.ds_tensor] if hasattr(parameter, "ds_id") else [])
            if not trained:
                found += _tensors_of(getattr(parameter, "quant_state", None))
    return sum({t.untyped_storage()._cdata: nbytes(t) for t in found}.values())


def gathered(model: Any) -> int:
    """Bytes of what is gathered of sharded parameters at this moment."""
    whole = [p.data for p in model.parameters() if hasattr(p, "ds_id") and p.numel()]
    return sum({t.untyped_storage()._cdata: nbytes(t) for t in whole}.values())


if __name__ == "__main__":
    if "--child" in sys.argv:
        where = sys.argv.index("--child")
        child(json.loads(sys.argv[where + 1]), [Case(**case) for case in json.loads(sys.argv[where + 2])])
    else:
        main()
