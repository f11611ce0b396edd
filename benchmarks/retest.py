"""Partial-LoRA against LoRA on MiniLM and SST-2, with rates searched for each system: a part of docs/results.md.

    python benchmarks/retest.py --models MODELS --data DATA --out RUNS [--results FILE] [--processes 1] [--only NAME]

Args:
    --models: holds all-minilm-l6-v2.
    --data: holds glue/sst2 with GLUE's train.jsonl and validation.jsonl.
    --out: run folders go here. After a kill the same command continues: finished runs are not repeated, and an
        unfinished one resumes.
    --results: one line of JSON per finished run; default: results.jsonl in --out. With a file that was kept, only the
        runs that it lacks are made.
    --only: names of systems.

Every system has the same steps, data order and fresh head for a seed. Its learning rate is the one of three with the
lowest held-out loss, as the mean over two seeds that no result uses. Results are means over five other seeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finished import Finished
from harness import argument_parser
from reproduce import train_one
from retest_systems import ALPHA, BESIDE, LORA, RANK, SYSTEMS, System
from todo import Todo, in_fork

from jobs import failed_file
from tables import T_975, write_part

MODEL, TASK = "all-minilm-l6-v2", "glue/sst2"
STEPS, BATCH = 1000, 16
HELD_OUT, CUT_OFF = 500, 4000
SEARCH_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
CENTRE = 1e-3
"""The middle of LoRA's three rates. The others' are LoRA's best one times their factors."""
MARGIN = 1.0
"""*As good* means: not worse by as many points."""
HEAD_VALUES = 2 * 384 + 2
KEY = ("system", "learning_rate", "seed")
"""What tells one run from another in the file of results."""


@dataclass(frozen=True)
class Run:
    """One run."""

    system: System
    learning_rate: float
    seed: int

    @property
    def measured(self) -> bool:
        """Whether the test samples are measured; a run of the search needs only the held-out loss."""
        return self.seed in SEEDS

    def folder(self, out: Path) -> Path:
        """Its output_dir while it runs."""
        return out / "runs" / self.system.folder / f"lr-{self.learning_rate:g}-seed-{self.seed}"

    @property
    def key(self) -> tuple[str, float, int]:
        """Its `KEY`."""
        return self.system.folder, self.learning_rate, self.seed

    def config(self, models: Path, data: Path, out: Path) -> dict[str, Any]:
        """Its settings."""
        adapter = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": r".*encoder\.layer\..*"}
        method = dict(self.system.method)
        if method["name"] == "partial_lora":
            method["cache_dir"] = str(out / "derivations")
        return {
            "model": {"name": str(models / MODEL), "dtype": "float32"},
            "task": {"name": TASK, "path": str(data), "max_length": 64},
            "method": method,
            "adapter": adapter | dict(self.system.adapter or {}),
            "training": {
                "learning_rate": self.learning_rate,
                "max_steps": STEPS,
                "warmup_steps": STEPS // 20,
                "schedule": "linear",
                "micro_batch_size": BATCH // 2,  # two parts of similar lengths: less padding
                "global_batch_size": BATCH,
                "eval_every": STEPS,
                "save_every": STEPS // 4,
                "log_every": STEPS // 20,
                "keep_checkpoints": 2,
            },
            "evaluation": {"split": "test", "samples": 0, "micro_batch_size": 64},
            "deepspeed": {"zero_stage": 0},
            "output_dir": str(self.folder(out)),
            "seed": self.seed,
            "report": False,
        }


def prepare_data(source: Path, target: Path) -> Path:
    """SST-2's training rows in three parts, the last one and the validation set as test.

    Training phrases that are contained in a test sentence are left out.
    """
    folder = target / "data"
    if (folder / "counts.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = (source / TASK / "train.jsonl").read_text().splitlines(keepends=True)
    held_out, rest, cut_off = rows[:HELD_OUT], rows[HELD_OUT:-CUT_OFF], rows[-CUT_OFF:]
    dev = (source / TASK / "validation.jsonl").read_text().splitlines(keepends=True)
    tested = "\n".join(f" {_words(row)} " for row in (*cut_off, *dev))
    train = [row for row in rest if f" {_words(row)} " not in tested]
    for name, lines in (("validation", held_out), ("train", train), ("test", [*dev, *cut_off])):
        (folder / f"{name}.jsonl").write_text("".join(lines))
    counts = {"train": len(train), "dropped": len(rest) - len(train), "dev": len(dev), "cut_off": len(cut_off)}
    (folder / "counts.json").write_text(json.dumps(counts) + "\n")
    return folder


def _words(row: str) -> str:
    return str(json.loads(row)["sentence"]).strip()


def finish(run: Run, models: Path, data: Path, block: Block) -> str:
    """Train the run, measure it, write its result, and delete its folder. Returns a line about it.

    Both in forks of this process, which has imported everything: DeepSpeed connects its processes once in each.
    """
    out, folder = block.out, run.folder(block.out)
    in_fork(train_one, run.config(models, data, out), folder)
    failed = failed_file(folder)
    if failed.is_file():  # the loss is not finite at this rate
        result: dict[str, Any] = {"failed": failed.read_text().strip(), "held_out_loss": float("inf")}
    elif not (folder / "summary.json").is_file():
        return f"{folder}: not finished, see {folder}.log"
    else:
        result = _read(folder) | (_measured(run, models, data, out) if run.measured else {})
    block.results.add(run.key, result)
    shutil.rmtree(folder, ignore_errors=True)
    shown = {key: value for key, value in result.items() if isinstance(value, float | int)}
    return f"{run.system.name}, rate {run.learning_rate:g}, seed {run.seed}: {shown}"


def _read(folder: Path) -> dict[str, Any]:
    """From a finished run's folder."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = summary["phases"]
    return {
        "held_out_loss": [line["validation_loss"] for line in lines if "validation_loss" in line][-1],
        "values": phases[-1]["trainable_parameters"],
        "derived": [phase["measured"] for phase in phases if phase.get("measured")],
        "samples": summary["samples"],
        "versions": summary["versions"],
    }


def _measured(run: Run, models: Path, data: Path, out: Path) -> dict[str, Any]:
    """Accuracy in percent on dev, on the phrases cut off, and on both; by the run's own `evaluate`."""
    counts, folder = json.loads((data / "counts.json").read_text()), run.folder(out)
    tree = run.config(models, data, out)
    tree["evaluation"]["samples"] = counts["dev"] + counts["cut_off"]
    shutil.rmtree(folder / "measured", ignore_errors=True)
    in_fork(evaluate_one, tree, folder)
    metrics = json.loads((folder / "measured" / "metrics.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (folder / "measured" / "predictions.jsonl").read_text().splitlines()]
    right = [100.0 * (row["prediction"] == row["label"]) for row in rows]
    dev, cut_off = right[: counts["dev"]], right[counts["dev"] :]
    means = {"accuracy": mean(right), "accuracy_dev": mean(dev), "accuracy_cut_off": mean(cut_off)}
    return means | {"loss": metrics["loss"]}


def evaluate_one(tree: Mapping[str, Any], folder: Path) -> None:
    """Evaluate the run in `folder` in this process, with its output in the run's log."""
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.distributed.world import find_world, prepare_cpu
    from sparse_llm_ft.engine.engine import process_group
    from sparse_llm_ft.inference.evaluate import evaluate
    from sparse_llm_ft.inference.trained_run import read_run

    log = folder.parent / f"{folder.name}.log"
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        world = find_world()
        prepare_cpu(world)
        with process_group():
            evaluate(read_run(str(folder), parse_config(dict(tree)), world), folder / "measured")


@dataclass(frozen=True)
class Block:
    """All runs, and what is known of them."""

    out: Path
    results: Finished

    @cached_property
    def _lora_rates(self) -> tuple[float, ...]:
        return tuple(_round(CENTRE * factor) for factor in LORA.factors)

    def rates(self, system: System) -> tuple[float, ...] | None:
        """The rates of the system's search; None as long as LoRA's is not over."""
        if system.rate_of is not None:
            return self.rates(system.rate_of)
        if system is LORA:
            return self._lora_rates
        best = self.best_rate(LORA)
        return None if best is None else tuple(_round(best * factor) for factor in system.factors)

    def search(self, system: System) -> list[Run]:
        """The runs that choose its rate."""
        searched = system.rate_of or system
        return [Run(searched, rate, seed) for seed in SEARCH_SEEDS for rate in self.rates(system) or ()]

    def _losses(self, system: System) -> dict[float, list[float]]:
        """Rate of the search -> the held-out losses that are known."""
        found: dict[float, list[float]] = {rate: [] for rate in self.rates(system) or ()}
        for run in self.search(system):
            result = self.results.of(run.key)
            if result is not None:
                found[run.learning_rate].append(result["held_out_loss"])
        return found

    def _contenders(self, system: System) -> list[float]:
        """Rates that may still have the lowest mean. No loss is negative: what is known of a rate can be enough to tell
        that another one, whose losses are all known, has a lower mean.
        """
        losses = self._losses(system)
        complete = (sum(of_rate) for of_rate in losses.values() if len(of_rate) == len(SEARCH_SEEDS))
        lowest = min(complete, default=float("inf"))
        return [rate for rate, of_rate in losses.items() if sum(of_rate) <= lowest]

    def best_rate(self, system: System) -> float | None:
        """The rate with the lowest mean held-out loss; None while a run that may change it is missing."""
        left, losses = self._contenders(system), self._losses(system)
        complete = all(len(losses[rate]) == len(SEARCH_SEEDS) for rate in left)
        return left[0] if left and complete else None

    def finals(self, system: System) -> list[Run]:
        """The runs that the table is made of; none as long as the rate is not known."""
        rate = self.best_rate(system)
        return [] if rate is None else [Run(system, rate, seed) for seed in SEEDS]

    def missing(self, system: System) -> list[Run]:
        """The system's runs that can be made now. With the search's second seed, the best rate of the first leads."""
        losses, rates = self._losses(system), self._contenders(system)
        left = [run for run in self.search(system) if run.learning_rate in rates and self.results.of(run.key) is None]
        left.sort(key=lambda run: (run.seed, sum(losses[run.learning_rate])))
        return left or [run for run in self.finals(system) if self.results.of(run.key) is None]

    def scores(self, system: System) -> dict[int, dict[str, Any]]:
        """Seed -> result, of the finished final runs."""
        found = {run.seed: self.results.of(run.key) for run in self.finals(system)}
        return {seed: result for seed, result in found.items() if result is not None and "accuracy" in result}


def page(block: Block) -> Iterator[str]:
    """The lines of this part, from the finished runs."""
    yield from ("## Partial-LoRA against LoRA, with rates searched for each", "")
    yield from (
        "```",
        "python benchmarks/retest.py --models MODELS --data DATA --out RUNS --results docs/retest.jsonl \\",
        "    --output docs/results.md",
        "```",
    )
    counts = json.loads((block.out / "data" / "counts.json").read_text())
    dev, cut_off, dropped, train = (f"{counts[key]:,}" for key in ("dev", "cut_off", "dropped", "train"))
    yield f"""
all-MiniLM-L6-v2 with a fresh head on SST-2, adapters on all 36 linear layers of the encoder, {STEPS:,} steps of
{BATCH} samples, linear decay, float32. LoRA has rank {RANK} and scaling {ALPHA / RANK:g}. Tested on SST-2's {dev}
dev sentences and {cut_off} phrases cut off the 20,000 training rows. Left out are {dropped} training
phrases that a tested one contains. {HELD_OUT} rows choose rates, and {train} remain. D_t is 5 % of these; a
derivation uses half of it for its head.

Each system's rate, which is also that of its head, is one of three with a factor of 4 between them: the one with the
lowest held-out loss, as the mean over {len(SEARCH_SEEDS)} seeds that are not used again. A rate is dropped after its
first seed if that loss alone exceeds the sum of both losses of another rate. A rate with * lies at an end of its three:
such a system may do better at one beyond. Systems that are given the balanced one's budget take its rate, and had no
search of their own. The rows are means over {len(SEEDS)} other seeds, or as
many as are named; a seed has the same data order and the same fresh head for all systems. Differences are to LoRA of
the same seed on all tested samples, with their 95 % t-intervals over seeds: the choice of the samples is not in them,
and targeted masks are one mask, whatever the seed. All masked systems have `masking: compact`. "joint
(ours)" also has `mask_scaling: true`, which is not the default.
"""
    yield "| | adapter values | rate | dev | cut off | all | difference to LoRA | as good (above -1)? | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for system in SYSTEMS:
        scores = block.scores(system)
        if scores:
            yield _row(block, system, scores)
    pairs = [(text, _difference(block.scores(first), block.scores(second))) for text, first, second in BESIDE]
    if any(difference for _, difference in pairs):
        yield from ("", "At equal budgets, differences over the same seeds:", "")
        yield from (f"- {text}: {difference.text}" for text, difference in pairs if difference)
    missing = [system.name for system in SYSTEMS if len(block.scores(system)) < len(SEEDS)]
    if missing:
        yield from ("", f"Not complete: {', '.join(missing)}.")
    derived = [(system.name, found[0]["derived"]) for system in SYSTEMS if (found := [*block.scores(system).values()])]
    if any(lines for _, lines in derived):
        yield from ("", "What was derived, for the first seed:", "")
        yield from (f"- {name}: {line}" for name, lines in derived for line in lines)


def _row(block: Block, system: System, scores: Mapping[int, Mapping[str, Any]]) -> str:
    rate, rates = block.best_rate(system), block.rates(system)
    assert rate is not None and rates is not None
    end = "*" if rate in (min(rates), max(rates)) else ""
    # The head's values are no adapter's; under the head alone, the adapter does nothing.
    values = 0 if system.adapter and system.adapter["lora_alpha"] < 1e-6 else _mean(scores, "values") - HEAD_VALUES
    to_lora = None if system is LORA else _difference(scores, block.scores(LORA))
    difference, verdict = ("", "") if to_lora is None else (to_lora.text, to_lora.as_good)
    cells = [system.name, f"{values:,.0f}", f"{rate:g}{end}"]
    cells += [f"{_mean(scores, key):.1f}" for key in ("accuracy_dev", "accuracy_cut_off", "accuracy")]
    return f"| {' | '.join([*cells, difference, verdict, str(len(scores))])} |"


@dataclass(frozen=True)
class _Difference:
    """A mean of paired differences of accuracy, and half of its 95 % t-interval."""

    middle: float
    half: float

    @property
    def text(self) -> str:
        """With its interval."""
        return f"{self.middle:+.2f} ({self.middle - self.half:+.2f} to {self.middle + self.half:+.2f})"

    @property
    def as_good(self) -> str:
        """Whether the first is not worse by `MARGIN`."""
        return (
            "yes" if self.middle - self.half > -MARGIN else "no" if self.middle + self.half < -MARGIN else "undecided"
        )


def _difference(first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]) -> _Difference | None:
    """Of two systems' accuracies, over their common seeds; None if they have not two."""
    pairs = [first[seed]["accuracy"] - second[seed]["accuracy"] for seed in first if seed in second]
    if len(pairs) < 2:
        return None
    return _Difference(mean(pairs), T_975[len(pairs) - 1] * stdev(pairs) / len(pairs) ** 0.5)


def _mean(scores: Mapping[int, Mapping[str, Any]], key: str) -> float:
    return mean(result[key] for result in scores.values())


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")


def main() -> None:
    """Search, train, and write the table."""
    parser = argument_parser(__doc__)
    for name in ("models", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="one line per finished run; default: results.jsonl in --out")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[system.name for system in SYSTEMS])
    parser.add_argument("--output", type=Path, help="docs/results.md, or another page to write the table into")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.processes)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import sparse_llm_ft.inference.evaluate
    import sparse_llm_ft.training.run  # noqa: F401  (once, before the forks)

    models, out = options.models.resolve(), options.out.resolve()
    data, block = prepare_data(options.data, out), Block(out, Finished(options.results or out / "results.jsonl", KEY))
    chosen = [system for system in SYSTEMS if options.only is None or system.name in options.only]
    todo = Todo(
        missing=lambda: (run for system in chosen for run in block.missing(system)),
        is_done=lambda run: block.results.of(run.key) is not None,
    )
    if not todo.finish(lambda run: finish(run, models, data, block), options.processes):
        sys.exit("a run failed; its log is beside its folder")
    if options.output:
        write_part(options.output, "retest", "\n".join(page(block)))
    print("\n".join(page(block)))


if __name__ == "__main__":
    main()
