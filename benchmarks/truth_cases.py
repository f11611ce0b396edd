"""The cases that `planner_truth.py` and `planner_peaks.py` plan and run: models, methods, lengths, stages, ranks.

torch is imported inside functions: `harness.start` sets the number of threads before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


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

TINY_LIMITS = {
    "stage3_max_reuse_distance": 3_000,
    "stage3_prefetch_bucket_size": 600,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_param_persistence_threshold": 100,
}
"""For the tests' model, whose weights all stay gathered otherwise."""

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
    "ranks": [Case("random", ranks=2, stage=stage, method="weight_lora", phase=1) for stage in (1, 2)]
    + [
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
    + [
        Case("random", ranks=2, stage=3, checkpointing=True, method=method, length=512)
        for method in ("lora", "weight_lora")
    ]
    + [Case("random", ranks=2, stage=3, method="weight_lora", phase=1)]
    + [Case("random", ranks=2, stage=3, method="weight_lora", phase=1, checkpointing=True, length=256)]
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


def random_base(tokenizer: str, folder: str) -> str:
    """Write a Llama of random weights, with the tokenizer of another model, and return its folder."""
    from harness import random_llama
    from transformers import AutoTokenizer

    random_llama(49152, 512, 1376, 8, 8, 2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def opened(case: Case, models: dict[str, str]) -> tuple[Any, Any]:
    """The case's run, opened, and the sizes of its samples."""
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.data.task_config import resolve_task
    from sparse_llm_ft.distributed.world import World
    from sparse_llm_ft.planning.samples import SampleSizes

    config = run_config(case, models[case.model])
    context = RunContext.open(config, World(0, case.ranks, 0, case.ranks), resolve_task(config.task))
    return context, replace(SampleSizes.assumed(case.length), count=10**6, equal=not case.padded)


def run_config(case: Case, model: str) -> Any:
    """The settings of a case's run."""
    from sparse_llm_ft.config import parse_config

    total = case.batch * case.ranks * case.accumulation
    method = METHODS[case.method]
    if case.model == "tiny" and "keep" in method:  # the tests' model has 14 adapters
        method = method | {"keep": 4}
    limits = TINY_LIMITS if case.model == "tiny" else LIMITS
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
            "deepspeed": {"zero_stage": case.stage, "zero_optimization": limits if case.limits else {}},
            "evaluation": {"samples": 0},
            "output_dir": "unused",
        }
    )


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
