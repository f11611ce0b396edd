"""LoRA and the three methods on small models, with the tasks' own metrics: a part of docs/results.md.

    python benchmarks/tasks.py --models MODELS --data DATA --runs RUNS [--processes 2] [--only dialogsum ...]

Args:
    --models: holds smollm2-135m-instruct and all-minilm-l6-v2.
    --data: holds dialogsum, xsum, e2e_nlg and glue/{sst2,cola,rte}, each with the hub's columns.
    --runs: run folders go here; what is complete is not run again.

Sized for two processor cores: few steps and one seed. It shows that every task runs with every method and is measured;
differences of a few points between methods are noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from harness import argument_parser

from tables import write_part

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Model:
    """A model, and the settings that all of its runs share.

    Attributes:
        methods: title -> section ``method``.
        rates: learning rates by title, where they differ from that in `training`.
        about: lines for the page.
    """

    folder: str
    dtype: str
    adapter: dict[str, Any]
    training: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    about: tuple[str, ...]
    rates: dict[str, float] = field(default_factory=dict)


DERIVED = {"name": "partial_lora", "derivation": "single", "micro_batch_size": 8}
"""The paper's: Algorithm 1."""

SMOLLM = Model(
    "smollm2-135m-instruct",
    "bfloat16",
    {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    {"micro_batch_size": 2, "global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 32, "warmup_steps": 2},
    {
        "LoRA": {"name": "lora"},
        "Partial-LoRA": DERIVED | {"shots": 64, "floor_metric": "loss"},
        "LoRA-drop": {"name": "lora_drop", "sample_fraction": 0.03, "pilot_epochs": 1},
        "WeightLoRA+": {"name": "weight_lora_plus", "keep": 12, "steps": 16, "cut_after": 8, "batch_growth": "none"},
    },
    (
        "SmolLM2-135M-Instruct in bfloat16, adapters of rank 8 on the query and value projections, learning rate",
        "0.001, also of Partial-LoRA, whose masks would want several times LoRA's rate. D_t has 64 samples. One seed.",
        "The tables show that the model learns each task, and how each is measured. With so few samples, differences",
        "of a few points between methods say nothing.",
    ),
)
MINILM = Model(
    "all-minilm-l6-v2",
    "float32",
    {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    {"micro_batch_size": 32, "global_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 20},
    {
        "LoRA": {"name": "lora"},
        "Partial-LoRA": DERIVED,
        "LoRA-drop": {"name": "lora_drop", "sample_fraction": 0.05, "pilot_epochs": 1},
        "WeightLoRA+": {
            "name": "weight_lora_plus",
            "keep": 10,
            "steps": 100,
            "cut_after": 50,
            "batch_growth": "none",
        },
    },
    (
        "all-MiniLM-L6-v2 with a fresh head in float32, adapters of rank 16 on all linear layers, one seed. The",
        "learning rate is 0.001, and 0.004 for Partial-LoRA, for which the search above finds four times LoRA's rate.",
    ),
    rates={"Partial-LoRA": 4e-3},
)


@dataclass(frozen=True)
class Setting:
    """One task: its split, and its differences from the common settings."""

    model: Model
    name: str
    split: str
    task: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    shots: int | None = None

    @property
    def key(self) -> str:
        """The beginning of its run folders' names."""
        return f"{'minilm-' if self.model is MINILM else ''}{self.name}".replace("/", "-")


WHOLE = {"samples": 2000, "micro_batch_size": 64}
SETTINGS = (
    Setting(SMOLLM, "dialogsum", "test", {"max_length": 256, "max_prompt_length": 208}, {"max_new_tokens": 48}),
    Setting(SMOLLM, "xsum", "validation", {"max_length": 256, "max_prompt_length": 216}, {"max_new_tokens": 40}),
    Setting(SMOLLM, "e2e_nlg", "test", {"max_length": 160, "max_prompt_length": 96}, {"max_new_tokens": 48}),
    Setting(SMOLLM, "glue/sst2", "validation", {"max_length": 96}, {"samples": 200}, shots=32),
    Setting(MINILM, "glue/cola", "validation", {"max_length": 64}, WHOLE, {"max_steps": 600}),
    Setting(MINILM, "glue/sst2", "validation", {"max_length": 64}, WHOLE, {"max_steps": 200}),
    Setting(MINILM, "glue/rte", "validation", {"max_length": 128}, WHOLE, {"max_steps": 150}),
)


def tree(setting: Setting, method: str, models: Path, data: Path, runs: Path) -> dict[str, Any]:
    """The settings of one run."""
    model = setting.model
    chosen = dict(model.methods[method])
    if chosen["name"] == "partial_lora" and setting.shots is not None:
        chosen["shots"] = setting.shots
    rate = {"learning_rate": model.rates[method]} if method in model.rates else {}
    return {
        "model": {"name": str(models / model.folder), "dtype": model.dtype},
        "task": {"name": setting.name, "path": str(data / setting.name)} | setting.task,
        "adapter": model.adapter,
        "method": chosen,
        "training": model.training | setting.training | rate,
        "evaluation": {"split": setting.split, "samples": 40, "micro_batch_size": 20} | setting.evaluation,
        "deepspeed": {"zero_stage": 2},
        "report": False,
        "output_dir": str(folder_of(setting, method, runs)),
    }


def folder_of(setting: Setting, method: str, runs: Path) -> Path:
    """The run's folder."""
    return runs / f"{setting.key}-{method}".replace("+", "-plus").lower()


def train(setting: Setting, method: str, models: Path, data: Path, runs: Path) -> None:
    """Run it, unless it is complete."""
    folder = folder_of(setting, method, runs)
    if (folder / "summary.json").is_file():
        return
    runs.mkdir(parents=True, exist_ok=True)
    config = runs / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(tree(setting, method, models, data, runs)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (runs / f"{folder.name}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
    print(f"{folder.name}: {'done' if status == 0 else f'status {status}, see {log.name}'}", flush=True)


def page(runs: Path) -> Iterator[str]:
    """The lines of this part, from the complete runs."""
    yield from ("## Tasks with their own metrics", "")
    yield "`python benchmarks/tasks.py --models MODELS --data DATA --runs RUNS` wrote this section, on two CPU cores."
    missing = [(s, m) for s in SETTINGS for m in s.model.methods if _summary(folder_of(s, m, runs)) is None]
    if missing:
        yield from ("", f"Not run yet: {', '.join(f'{method} on {setting.key}' for setting, method in missing)}.")
    for model in (SMOLLM, MINILM):
        yield from ("", *model.about)
        yield from _beside_lora(model, runs)
        for setting in SETTINGS:
            found = {method: _summary(folder_of(setting, method, runs)) for method in model.methods}
            complete = {method: summary for method, summary in found.items() if summary is not None}
            if complete and setting.model is model:
                yield from _section(setting, complete, runs)


def _beside_lora(model: Model, runs: Path) -> Iterator[str]:
    """On how many tasks each method ends with a higher loss than LoRA, and with what share of its values."""
    lora, *others = model.methods
    for method in others:
        pairs = [
            (ours, theirs)
            for setting in SETTINGS
            if setting.model is model
            and (ours := _summary(folder_of(setting, method, runs))) is not None
            and (theirs := _summary(folder_of(setting, lora, runs))) is not None
        ]
        if pairs:
            higher = sum(a["metrics"]["after"]["loss"] > b["metrics"]["after"]["loss"] for a, b in pairs)
            shares = sorted(f"{_trained(a) / _trained(b):4.0%}" for a, b in pairs)
            span = shares[0].strip() + ("" if shares[0] == shares[-1] else f" to {shares[-1].strip()}")
            yield f"{method} trains {span} of LoRA's values, and its loss is higher on {higher} of {len(pairs)} tasks."


def _trained(summary: dict[str, Any]) -> int:
    """Trainable values of the last phase."""
    return int(summary["phases"][-1]["trainable_parameters"])


def _section(setting: Setting, found: dict[str, dict[str, Any]], runs: Path) -> Iterator[str]:
    before = next(iter(found.values()))["metrics"]["before"]
    names = list(before)
    training = setting.model.training | setting.training
    count = len(_rows(folder_of(setting, next(iter(found)), runs) / "predictions-after.jsonl"))
    yield from ("", f"### {setting.name}, {'MiniLM' if setting.model is MINILM else 'SmolLM2'}", "")
    yield f"{training['max_steps']} optimizer steps of {training['global_batch_size']} samples; {count} measured."
    yield ""
    yield f"| {' | '.join(['', 'trained values', *names])} |"
    yield "|" + "---|" * (len(names) + 2)
    yield f"| before | | {' | '.join(f'{before[name]:.2f}' for name in names)} |"
    for method, summary in found.items():
        after = summary["metrics"]["after"]
        yield f"| {method} | {_trained(summary):,} | {' | '.join(f'{after[name]:.2f}' for name in names)} |"
    yield from _samples(setting, list(found), runs)


def _samples(setting: Setting, methods: list[str], runs: Path) -> Iterator[str]:
    """Predictions of the first samples, before and after."""
    rows = {method: _rows(folder_of(setting, method, runs) / "predictions-after.jsonl") for method in methods}
    before = _rows(folder_of(setting, methods[0], runs) / "predictions-before.jsonl")
    for i in range(2):
        label = before[i].get("label")
        right = "" if label is None else f" (labelled {label}): {_short(before[i]['prompt'])}"
        yield from ("", f"Sample {i + 1} of the split{right}", "")
        yield f"- before: {_short(before[i]['prediction'])}"
        for method in methods:
            yield f"- {method}: {_short(rows[method][i]['prediction'])}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 240 else line[:237] + "..."


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argument_parser(__doc__)
    for name in ("models", "data", "runs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[setting.key for setting in SETTINGS])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    places = (options.models.resolve(), options.data.resolve(), options.runs.resolve())
    wanted = [s for s in SETTINGS if options.only is None or s.key in options.only]
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(lambda pair: train(pair[0], pair[1], *places), [(s, m) for s in wanted for m in s.model.methods]))
    write_part(options.output, "tasks", "\n".join(page(places[2])))


if __name__ == "__main__":
    main()
