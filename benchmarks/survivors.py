r"""What `method.choose: cost` costs in quality, at equal K: a part of docs/results.md.

    python benchmarks/survivors.py --models MODELS --data DATA --runs RUNS [--results FILE] [--processes 1] \
        [--only dialogsum] [--output docs/results.md]

Args:
    --models: holds smollm2-135m-instruct and all-minilm-l6-v2.
    --data: holds dialogsum and glue/sst2, each with the hub's columns.
    --runs: run folders go here. After a kill the same command continues: it repeats no finished run and resumes an
        unfinished one.
    --results: one line of JSON per finished run; default: results.jsonl in --runs. With a file that was kept, only the
        runs that it lacks are made.

Every system has the same steps, learning rate and, for a seed, the same data order. Hours on two processor cores.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tasks
from finished import Finished
from harness import argument_parser
from reproduce import train_one
from todo import Todo, in_fork

from tables import write_part

SEEDS = (0, 1, 2)
KEY = ("task", "system", "seed")
"""What tells one run from another in the file of results."""
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

    def config(self, models: Path, data: Path, runs: Path) -> dict[str, Any]:
        """Its settings: T is half of the run, and the first cut comes after half of that."""
        tree = tasks.tree(self.trial.setting, "LoRA", models, data, runs)
        training = tree["training"] | self.trial.training
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

    @property
    def key(self) -> tuple[str, str, int]:
        """Its `KEY`."""
        return self.trial.setting.key, self.system, self.seed


def result_of(summary: dict[str, Any], metric: str) -> dict[str, Any]:
    """What the table needs of a finished run's summary.json."""
    place = LOWEST.search(summary["phases"][0]["measured"])
    assert place is not None, summary["phases"][0]["measured"]
    after = summary["metrics"]["after"]
    return {
        "steps": sum(phase["steps"] for phase in summary["phases"]),
        "lowest": int(place[1]),
        "step": float(place[2]),
        "loss": after["loss"],
        metric: after[metric],
        "versions": summary["versions"],
    }


def finish(run: Run, models: Path, data: Path, runs: Path, results: Finished) -> str:
    """Train and measure the run in a fork of this process, which has imported everything. Returns a line about it."""
    folder = run.folder(runs)
    if not (folder / "summary.json").is_file():
        in_fork(train_one, run.config(models, data, runs), folder)
    if not (folder / "summary.json").is_file():
        return f"{folder}: not finished, see {folder}.log"
    result = result_of(json.loads((folder / "summary.json").read_text()), run.trial.metric)
    results.add(run.key, result)
    return f"{', '.join(map(str, run.key))}: {result}"


def page(results: Finished) -> Iterator[str]:
    """The lines of this part, from the finished runs."""
    yield from ("## Where survivors are", "")
    yield """```
python benchmarks/survivors.py --models MODELS --data DATA --runs RUNS --results docs/survivors.jsonl \\
    --output docs/results.md
```

WeightLoRA on all linear layers in float32, with K adapters after T, which is half of the run. `lowest` is the number of
the lowest layer that keeps an adapter, for each seed. `step` is a step's arithmetic as a share of one with all
adapters. Differences are to `omega` with the same seed, with their standard deviation."""
    for trial in TRIALS:
        setting = trial.setting
        found = {
            system: {seed: result for seed in SEEDS if (result := results.of(Run(trial, system, seed).key)) is not None}
            for system in SYSTEMS
        }
        finished = [result for of_seeds in found.values() for result in of_seeds.values()]
        if not finished:
            continue
        title = f"### {setting.name}, {setting.model.folder}: K = {trial.keep}, {finished[0]['steps']} steps"
        yield from ("", title, "")
        yield f"| | lowest | step | loss | difference | {trial.metric} | difference | seeds |"
        yield "|---|---|---|---|---|---|---|---|"
        for system, of_seeds in found.items():
            if of_seeds:
                yield _row(system, trial, of_seeds, found["omega"])
    missing = [", ".join(map(str, run.key)) for run in all_runs() if results.of(run.key) is None]
    if missing:
        yield from ("", f"Not run yet: {'; '.join(missing)}.")


def _row(system: str, trial: Trial, of_seeds: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> str:
    cells = [
        system,
        ", ".join(str(result["lowest"]) for result in of_seeds.values()),
        f"{mean(result['step'] for result in of_seeds.values()):.2f}",
    ]
    for metric in ("loss", trial.metric):
        values = {seed: result[metric] for seed, result in of_seeds.items()}
        pairs = [value - reference[seed][metric] for seed, value in values.items() if seed in reference]
        cells.append(_spread(list(values.values()), ""))
        cells.append("" if system == "omega" or not pairs else _spread(pairs, "+"))
    return f"| {' | '.join([*cells, str(len(of_seeds))])} |"


def _spread(values: list[float], sign: str) -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{deviation}"


def all_runs() -> list[Run]:
    """In the order in which they run: a seed's systems one after the other."""
    return [Run(trial, system, seed) for trial in TRIALS for seed in SEEDS for system in SYSTEMS]


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argument_parser(__doc__)
    for name in ("models", "data", "runs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="one line per finished run; default: results.jsonl in --runs")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", choices=[trial.setting.name for trial in TRIALS])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.processes)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import sparse_llm_ft.training.run  # noqa: F401  (once, before the forks)

    models, data, runs = (path.resolve() for path in (options.models, options.data, options.runs))
    runs.mkdir(parents=True, exist_ok=True)
    results = Finished(options.results or runs / "results.jsonl", KEY)
    chosen = [run for run in all_runs() if options.only in (None, run.trial.setting.name)]
    todo = Todo(
        missing=lambda: (run for run in chosen if results.of(run.key) is None),
        is_done=lambda run: results.of(run.key) is not None,
    )
    if not todo.finish(lambda run: finish(run, models, data, runs, results), options.processes):
        sys.exit("a run failed; its log is beside its folder")
    if options.output:
        write_part(options.output, "survivors", "\n".join(page(results)))
    print("\n".join(page(results)))


if __name__ == "__main__":
    main()
