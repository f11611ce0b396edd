"""What `method.choose: cost` costs in quality, at equal K: a part of docs/results.md.

    python benchmarks/survivors.py --models MODELS --data DATA --runs RUNS [--only dialogsum] [--output docs/results.md]

Args:
    --models: holds smollm2-135m-instruct and all-minilm-l6-v2.
    --data: holds dialogsum and glue/sst2, each with the hub's columns.
    --runs: run folders go here. After a kill the same command continues: it repeats no finished run and resumes an
        unfinished one.
    --steps: of each run, for a trial; the default is each task's own.

Every system has the same steps, learning rate and, for a seed, the same data order. Hours on two processor cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tasks
from harness import argument_parser
from reproduce import train_one

from tables import write_part

SEEDS = (0, 1, 2)
BUDGETS = (0.8, 0.7)
LOWEST = re.compile(r"the lowest survivor is in (?:\S*\.)?(\d+): a step costs ([\d.]+) of")


@dataclass(frozen=True)
class Trial:
    """One task.

    Attributes:
        setting: of benchmarks/tasks.py: model, task, evaluation.
        keep: K, a tenth of SmolLM2's adapters and a quarter of MiniLM's, which has six layers.
        metric: of the two in the table beside the loss.
        training: settings in which it differs from tasks.py.
    """

    setting: tasks.Setting
    keep: int
    metric: str
    training: dict[str, Any]


def _setting(model: tasks.Model, name: str) -> tasks.Setting:
    return next(setting for setting in tasks.SETTINGS if setting.model is model and setting.name == name)


TRIALS = (
    Trial(_setting(tasks.SMOLLM, "dialogsum"), 21, "rouge1", {"max_steps": 96}),
    Trial(_setting(tasks.MINILM, "glue/sst2"), 9, "accuracy", {"max_steps": 400}),
)
SYSTEMS: dict[str, dict[str, Any]] = {
    "omega": {"choose": "omega"},
    **{f"cost, budget {budget:g}": {"choose": "cost", "budget": budget} for budget in BUDGETS},
}


@dataclass(frozen=True)
class Run:
    """One run of a system on a task with a seed."""

    trial: Trial
    system: str
    seed: int

    def folder(self, runs: Path) -> Path:
        """Its output_dir."""
        name = re.sub(r"[^a-z0-9.]+", "-", f"{self.trial.setting.key}-{self.system}")
        return runs / f"{name}-seed-{self.seed}"

    def config(self, models: Path, data: Path, runs: Path, steps: int | None) -> dict[str, Any]:
        """Its settings: T is half of the run, and the first cut comes after half of that."""
        tree = tasks.tree(self.trial.setting, "LoRA", models, data, runs)
        training = tree["training"] | self.trial.training | ({} if steps is None else {"max_steps": steps})
        half = training["max_steps"] // 2
        method = {"name": "weight_lora", "keep": self.trial.keep, "steps": half, "cut_after": half // 2}
        return tree | {
            "model": tree["model"] | {"dtype": "float32"},
            "adapter": {key: value for key, value in tree["adapter"].items() if key != "target_modules"},
            "method": method | {"batch_growth": "none"} | SYSTEMS[self.system],
            "training": training | {"save_every": max(1, half // 4)},
            "deepspeed": {"zero_stage": 0},
            "output_dir": str(self.folder(runs)),
            "seed": self.seed,
        }

    def summary(self, runs: Path) -> dict[str, Any] | None:
        """summary.json of a finished run."""
        path = self.folder(runs) / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None


def page(runs: Path) -> Iterator[str]:
    """The lines of this part, from the finished runs."""
    yield from ("## Where survivors are", "")
    yield """`python benchmarks/survivors.py --models MODELS --data DATA --runs RUNS --output docs/results.md` wrote
this section: WeightLoRA on all linear layers in float32, with K adapters after T, which is half of the run. `lowest`
is the number of the lowest layer that keeps an adapter, for each seed. `step` is a step's arithmetic as a share of one
with all adapters. Differences are to `omega` with the same seed, with their standard deviation."""
    for trial in TRIALS:
        setting = trial.setting
        found = {
            system: {seed: summary for seed in SEEDS if (summary := Run(trial, system, seed).summary(runs)) is not None}
            for system in SYSTEMS
        }
        finished = [summary for summaries in found.values() for summary in summaries.values()]
        if not finished:
            continue
        steps = sum(phase["steps"] for phase in finished[0]["phases"])
        yield from ("", f"### {setting.name}, {setting.model.folder}: K = {trial.keep}, {steps} steps", "")
        yield f"| | lowest | step | loss | difference | {trial.metric} | difference | tokens/s after T | seeds |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for system, summaries in found.items():
            if summaries:
                yield _row(system, trial, summaries, found["omega"])


def _row(system: str, trial: Trial, summaries: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> str:
    places = [match for s in summaries.values() if (match := LOWEST.search(s["phases"][0].get("measured") or ""))]
    cells = [
        system,
        ", ".join(match[1] for match in places),
        f"{mean(float(match[2]) for match in places):.2f}" if places else "",
    ]
    for metric in ("loss", trial.metric):
        values = {seed: summary["metrics"]["after"][metric] for seed, summary in summaries.items()}
        pairs = [v - reference[seed]["metrics"]["after"][metric] for seed, v in values.items() if seed in reference]
        cells.append(_spread(list(values.values()), ""))
        cells.append("" if system == "omega" or not pairs else _spread(pairs, "+"))
    cells.append(f"{mean(s['phases'][-1]['tokens_per_second'] for s in summaries.values()):,.0f}")
    return f"| {' | '.join([*cells, str(len(summaries))])} |"


def _spread(values: list[float], sign: str) -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{deviation}"


def main() -> None:
    """Run what is missing, one run after the other, and write the page."""
    parser = argument_parser(__doc__)
    for name in ("models", "data", "runs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", choices=[trial.setting.name for trial in TRIALS])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    models, data, runs = (path.resolve() for path in (options.models, options.data, options.runs))
    wanted = [
        Run(trial, system, seed)
        for trial in TRIALS
        if options.only in (None, trial.setting.name)
        for seed in options.seeds
        for system in SYSTEMS
    ]
    for run in wanted:
        if run.summary(runs) is None:  # a process of its own: DeepSpeed leaves state behind
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(
                    pool.apply(train_one, (run.config(models, data, runs, options.steps), run.folder(runs))), flush=True
                )
        if options.output:
            write_part(options.output, "survivors", "\n".join(page(runs)))
    print("\n".join(page(runs)))
    missing = [str(run.folder(runs)) for run in wanted if run.summary(runs) is None]
    sys.exit(f"not finished, see the logs beside them: {', '.join(missing)}" if missing else 0)


if __name__ == "__main__":
    main()
