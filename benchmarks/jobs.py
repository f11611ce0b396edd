"""What the reproduction runs (two models, their tasks, seeds and learning rates), and a finished run's results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from systems import SYSTEMS, System, settle

HELD_OUT = 200


@dataclass(frozen=True)
class Setting:
    """One model's part of the reproduction.

    Attributes:
        model: folder below --models.
        tasks: the first one, with the first seed, chooses the learning rates for all.
        train, test: most samples of each task.
        learning_rates: the first ones of the search.
        most_rates: how many the search tries at most.
        ablation_task: the only task that ablations run on.
        brief_tasks: tasks that run with the first seed alone.
        max_length: task -> tokens of a sample, if other than in `sections`.
        settings: method name -> settings in which this model differs.
    """

    title: str
    model: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    most_rates: int
    steps: int
    train: int
    test: int
    systems: tuple[System, ...]
    sections: dict[str, Any]
    ablation_task: str = "glue/sst2"
    brief_tasks: tuple[str, ...] = ()
    max_length: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def runs_on(self, system: System, task: str) -> bool:
        """Whether the system is trained on the task."""
        return system.main or task == self.ablation_task


MINILM = Setting(
    title="all-MiniLM-L6-v2",
    model="all-minilm-l6-v2",
    tasks=("glue/sst2", "glue/cola", "glue/rte"),
    seeds=(0, 1, 2),
    learning_rates=(1e-3, 4e-3),
    most_rates=4,
    steps=40,
    train=1600,
    test=300,
    systems=SYSTEMS,
    sections={
        "model": {"dtype": "float32"},
        "task": {"max_length": 48},
        "adapter": {"target_modules": r".*encoder\.layer\..*"},
        "training": {
            "micro_batch_size": 16,
            "global_batch_size": 16,
            "warmup_steps": 2,
            "head_learning_rate": 4e-3,  # not searched: the search is for adapters
        },
        "evaluation": {"micro_batch_size": 32},
    },
    # Nothing learns them in so few steps: three seeds of chance say no more than one.
    brief_tasks=("glue/cola", "glue/rte"),
    max_length={"glue/rte": 96},
)
SMOLLM2 = Setting(
    title="SmolLM2-135M",
    model="smollm2-135m-instruct",
    tasks=("glue/sst2",),
    seeds=(0,),
    learning_rates=(2e-3,),
    most_rates=1,
    steps=20,
    train=1600,
    test=100,
    systems=tuple(system for system in SYSTEMS if system.main),
    sections={
        "model": {"dtype": "bfloat16"},
        "task": {"max_length": 96},
        "adapter": {"target_modules": ["q_proj", "v_proj"]},
        "training": {"micro_batch_size": 8, "global_batch_size": 8, "warmup_steps": 2},
        "evaluation": {"micro_batch_size": 32},
    },
    # Before training the model answers no better than chance, and forward passes are slow: D_t is 64 samples.
    settings={"partial_lora": {"shots": 32, "floor_metric": "loss"}, "lora_drop": {"pilot_epochs": 1}},
)
SETTINGS = (MINILM, SMOLLM2)


@dataclass(frozen=True)
class Job:
    """One run."""

    setting: Setting
    system: System
    task: str
    learning_rate: float
    seed: int

    def folder(self, runs: Path) -> Path:
        """Its output_dir."""
        name = "".join(c if c.isalnum() else "-" for c in self.system.name.lower().replace("+", "-plus")).strip("-")
        return runs / self.setting.model / self.task / name / f"lr-{self.learning_rate:g}-seed-{self.seed}"

    def config(self, models: Path, data: Path, runs: Path) -> dict[str, Any]:
        """Its settings."""
        setting = self.setting
        tree: dict[str, Any] = {
            "model": {"name": str(models / setting.model)},
            "task": {"name": self.task, "path": str(data)},
            "method": settle(self.system.method, setting.steps, setting.settings),
            "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
            "training": {
                "learning_rate": self.learning_rate,
                "max_steps": setting.steps,
                "schedule": "linear",
                "eval_every": setting.steps,
                "keep_checkpoints": 2,
            },
            "evaluation": {"split": "test", "samples": setting.test},
            "deepspeed": {"zero_stage": 0},
            "output_dir": str(self.folder(runs)),
            "seed": self.seed,
            "report": False,
        }
        for section, values in setting.sections.items():
            tree[section] = tree.get(section, {}) | values
        tree["adapter"] |= self.system.adapter
        if self.system.method == {"name": "full"}:  # its head is a part of the model
            tree["training"].pop("head_learning_rate", None)
        if self.task in setting.max_length:
            tree["task"]["max_length"] = setting.max_length[self.task]
        return tree


@dataclass(frozen=True)
class Result:
    """A finished run's results; `cpu_seconds` are those of its processes, from start to end."""

    metric: float
    validation_loss: float
    parameters: int
    cpu_seconds: float
    measured: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """None: the run is not finished. A run that failed (its loss is not finite) gets an infinite loss."""
        if failed_file(folder).is_file():
            return cls(float("nan"), float("inf"), 0, 0.0, ())
        if not (folder / "summary.json").is_file():
            return None
        summary = json.loads((folder / "summary.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        after = summary["metrics"]["after"]
        phases = summary["phases"]
        return cls(
            after["matthews"] if "matthews" in after else after["accuracy"],
            [line["validation_loss"] for line in lines if "validation_loss" in line][-1],
            phases[-1]["trainable_parameters"],
            float(cpu_file(folder).read_text()) if cpu_file(folder).is_file() else float("nan"),
            tuple(phase["measured"] for phase in phases if phase.get("measured")),
        )


def failed_file(folder: Path) -> Path:
    """The file that says why a run cannot be finished."""
    return folder.parent / f"{folder.name}.failed"


def cpu_file(folder: Path) -> Path:
    """The file with the sum of the CPU seconds of a run's processes."""
    return folder.parent / f"{folder.name}.cpu"


def tuning_jobs(setting: Setting, runs: Path) -> list[Job]:
    """The learning rates to try next, on the first task with the first seed.

    Every system begins with the setting's rates. While its best rate lies at an end of those tried, the next one beyond
    is tried, by the factor between the first two; at most `most_rates` of them.
    """
    return [job for system in setting.systems for job in _search(setting, system, runs)[1]]


def best_rate(setting: Setting, system: System, runs: Path) -> float | None:
    """The rate with the lowest held-out loss; None while a run of the search is missing."""
    losses, missing = _search(setting, system, runs)
    return None if missing else min(losses, key=lambda rate: losses[rate])


def _search(setting: Setting, system: System, runs: Path) -> tuple[dict[float, float], list[Job]]:
    """The losses of the rates tried so far, and the runs that the search needs next."""
    job = partial(Job, setting, system, setting.tasks[0], seed=setting.seeds[0])
    rates = list(setting.learning_rates)
    while True:
        results = {rate: Result.read(job(learning_rate=rate).folder(runs)) for rate in rates}
        losses = {rate: result.validation_loss for rate, result in results.items() if result}
        missing = [job(learning_rate=rate) for rate, result in results.items() if not result]
        following = None if missing else _beyond(losses)
        if following is None or len(rates) == setting.most_rates:
            return losses, missing
        rates.append(following)


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The next rate beyond the best one if that lies at an end; None if it does not, or is the only one."""
    if len(losses) < 2:
        return None
    low, second, *_ = sorted(losses)
    best, factor = min(losses, key=lambda rate: losses[rate]), second / low
    if best == max(losses):
        return float(f"{best * factor:.6g}")
    return float(f"{best / factor:.6g}") if best == low else None


def final_jobs(setting: Setting, runs: Path) -> Iterator[Job]:
    """Every task and seed with the system's rate, if that is known; task by task, ablations last."""
    rates = {system.name: best_rate(setting, system, runs) for system in setting.systems}
    for task in setting.tasks:
        for main in (True, False):
            for seed in setting.seeds[:1] if task in setting.brief_tasks else setting.seeds:
                for system in setting.systems:
                    rate = rates[system.name]
                    if system.main == main and setting.runs_on(system, task) and rate is not None:
                        yield Job(setting, system, task, rate, seed)
