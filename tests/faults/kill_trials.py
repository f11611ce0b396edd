"""SIGKILL at random, the same settings again: does every run end as the one that was never interrupted?

    python tests/faults/kill_trials.py --trials 50 --seed 0 --report report.json

A trial draws a configuration, one to three kills in a row, which ranks die (one or all) and when: at any time of the
run, or at a named place. Then the run goes on to its end and is compared with the uninterrupted one, bit for bit.
Beside the report, in the same folder, `report.md` is its table. Exit status 1: some trial did not end the same.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from helpers.comparing import Splits, consumed, differences
from helpers.forked_ranks import LAUNCHER_POLLS, Kill, import_everything, last_lines, run_world
from helpers.places import PLACES, die_at, record_samples
from helpers.sabotage import SABOTAGES
from helpers.tiny_files import make_data, make_model
from helpers.trial_settings import CONFIGURATIONS, Configuration, settings

ANY_TIME = "any time"


@dataclass
class Blow:
    """One kill: at a time (`seconds` after the start) or at a place (its `arrival`-th passing, of the first rank)."""

    ranks: tuple[int, ...]
    place: str
    arrival: int = 1
    seconds: float | None = None
    launcher_polls: float = LAUNCHER_POLLS
    statuses: list[int] = field(default_factory=list)

    @property
    def fell(self) -> bool:
        """Whether it met the run; the place may not have been reached, the run may have been over."""
        return -9 in self.statuses


@dataclass
class Trial:
    """One run that is killed, and how it ended."""

    number: int
    configuration: Configuration
    blows: list[Blow]
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def reports(self) -> bool:
        """Whether its runs draw pictures."""
        return any(blow.place == "report" for blow in self.blows)


@dataclass
class Whole:
    """An uninterrupted run: what the others are compared with."""

    run: Path
    samples: Splits
    seconds: float


class Trials:
    """Runs trials in one folder; the uninterrupted run of a configuration is made when it is first needed."""

    def __init__(self, folder: Path, world_size: int, sabotage: str | None = None) -> None:
        self.folder, self.world_size, self.sabotage = folder, world_size, sabotage
        self.model, self.data = folder / "model", folder / "data"
        self.data.mkdir(parents=True)
        make_model(self.model)
        make_data(self.data)
        self.whole: dict[Configuration, Whole] = {}

    def uninterrupted(self, configuration: Configuration) -> Whole:
        """The finished run.

        Raises:
            RuntimeError: it does not even end well undisturbed.
        """
        if configuration not in self.whole:
            name = f"whole-{len(self.whole)}"
            started = time.monotonic()
            statuses = self._attempt(configuration, name, 0)
            if any(statuses):
                raise RuntimeError(f"{configuration}: {statuses}\n{last_lines(self.folder / name / 'logs')}")
            seconds = time.monotonic() - started
            samples = consumed(self.folder / name, 1, [self.world_size])
            self.whole[configuration] = Whole(self.folder / name / "run", samples, seconds)
        return self.whole[configuration]

    def run(self, trial: Trial) -> None:
        """Kill, resume and compare; what is found is in the trial."""
        started = time.monotonic()
        name = f"trial-{trial.number}"
        try:
            whole = self.uninterrupted(trial.configuration)
            for attempt, blow in enumerate(trial.blows):
                if blow.seconds is not None:
                    blow.seconds *= whole.seconds
                blow.statuses = self._attempt(trial.configuration, name, attempt, blow, trial.reports)
                if any(blow.statuses) and not blow.fell:
                    trial.differences.append(f"attempt {attempt} ended by itself: {blow.statuses}")
            statuses = self._attempt(trial.configuration, name, len(trial.blows), report=trial.reports)
            if any(statuses):
                trial.differences.append(f"resumed, it ended with {statuses}")
        except (RuntimeError, TimeoutError) as error:  # not even undisturbed, or it hangs
            trial.differences.append(str(error))
        if trial.differences and (self.folder / name).is_dir():
            trial.differences.append(last_lines(self.folder / name / "logs"))
        elif not trial.differences:
            attempts = len(trial.blows) + 1
            trial.differences += differences(whole.run, self.folder / name / "run")
            if trial.reports and not (self.folder / name / "run" / "report" / "index.html").is_file():
                trial.differences.append("there is no report")
            if consumed(self.folder / name, attempts, [self.world_size] * attempts) != whole.samples:
                trial.differences.append("other samples were consumed, or in another order")
        trial.seconds = time.monotonic() - started
        if not trial.differences:
            shutil.rmtree(self.folder / name)

    def _attempt(
        self, configuration: Configuration, name: str, attempt: int, blow: Blow | None = None, report: bool = False
    ) -> list[int]:
        folder = self.folder / name
        tree = settings(configuration, self.model, self.data, folder / "run", report)
        before = partial(self._before, folder, attempt, blow)
        kill = Kill(blow.ranks, blow.seconds, blow.launcher_polls) if blow else None
        return run_world(tree, self.world_size, folder / "logs", kill, before)

    def _before(self, folder: Path, attempt: int, blow: Blow | None, rank: int) -> None:
        """In each rank: record what it consumes, and make ready to die."""
        record_samples(folder / f"{attempt}-{rank}.jsonl")
        if self.sabotage and attempt:
            SABOTAGES[self.sabotage]()
        if blow is not None and blow.seconds is None and rank == blow.ranks[0]:
            die_at(blow.place, blow.arrival)


def draw_trials(count: int, seed: int, world_size: int, different: int) -> list[Trial]:
    """`different` configurations in a random order, each before any comes again; everything else at random.

    A time is drawn as a fraction of the uninterrupted run's duration.
    """
    draw = random.Random(seed)
    drawn = draw.sample(CONFIGURATIONS, different)
    trials = []
    configurations: list[Configuration] = []
    for number in range(count):
        configurations = configurations or draw.sample(drawn, different)
        configuration = configurations.pop()
        blows = [_draw_blow(draw, configuration, world_size) for _ in range(draw.randint(1, 3))]
        trials.append(Trial(number, configuration, blows))
    return trials


def _draw_blow(draw: random.Random, configuration: Configuration, world_size: int) -> Blow:
    everyone = list(range(world_size))
    draw.shuffle(everyone)
    alone, polls = draw.random() < 0.5, draw.uniform(0.0, LAUNCHER_POLLS)
    if draw.random() < 0.4:
        return Blow(tuple(everyone[: 1 if alone else None]), ANY_TIME, seconds=draw.random(), launcher_polls=polls)
    name = draw.choice([name for name, place in PLACES.items() if configuration.changes or not place.change])
    place = PLACES[name]
    if place.rank_zero:
        everyone.sort()
    return Blow(tuple(everyone[: 1 if alone else None]), name, draw.randint(1, place.most), launcher_polls=polls)


def report(trials: list[Trial], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The numbers, and every trial."""
    blows = [(trial, blow) for trial in trials for blow in trial.blows]
    fell = [(trial, blow) for trial, blow in blows if blow.fell]

    def count(key: Callable[[Trial, Blow], Any]) -> dict[str, int]:
        return dict(sorted(Counter(str(key(*pair)) for pair in fell).items()))

    return {
        "first": arguments.first,
        "trials": len(trials),
        "seed": arguments.seed,
        "world_size": arguments.world,
        "seconds": round(seconds),
        "kills": len(fell),
        "kills_that_came_too_late": len(blows) - len(fell),
        "mismatches": sum(bool(trial.differences) for trial in trials),
        "kills_by_place": count(lambda trial, blow: blow.place),
        "kills_by_method": count(lambda trial, blow: trial.configuration.method),
        "kills_by_zero_stage": count(lambda trial, blow: trial.configuration.stage),
        "kills_by_dtype": count(lambda trial, blow: trial.configuration.dtype),
        "kills_by_ranks": count(lambda trial, blow: sorted(blow.ranks)),
        "every_trial": [
            {
                "number": trial.number,
                "configuration": str(trial.configuration),
                "kills": [vars(blow) | {"fell": blow.fell} for blow in trial.blows],
                "differences": trial.differences,
                "seconds": round(trial.seconds, 1),
            }
            for trial in trials
        ],
    }


def table(numbers: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{numbers['trials']} trials on {numbers['world_size']} ranks, seed {numbers['seed']}, "
        f"{numbers['kills']} kills ({numbers['kills_that_came_too_late']} more came when the run was over or past "
        f"their place): {numbers['mismatches']} mismatches.",
    ]
    for key in ("place", "method", "zero_stage", "dtype", "ranks"):
        counts = numbers[f"kills_by_{key}"]
        lines += [
            "",
            f"| {key.replace('_', ' ')} | kills |",
            "|---|---|",
            *(f"| {k} | {v} |" for k, v in counts.items()),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="go on with this trial of the series")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=2, help="ranks; global batch 8 in micro-batches of 2")
    parser.add_argument(
        "--configurations", type=int, default=len(CONFIGURATIONS), help="how many; with fewer, trials share the measure"
    )
    parser.add_argument("--report", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sabotage", choices=SABOTAGES, help="spoil every resumed run, to see that it is noticed")
    arguments = parser.parse_args()
    import_everything()
    started = time.monotonic()
    trials = draw_trials(arguments.trials, arguments.seed, arguments.world, arguments.configurations)[arguments.first :]
    if arguments.sabotage:  # what is spoilt must be in use: a checkpoint after step 4, and step 5 to be done again
        for trial in trials:
            trial.blows = [Blow((0,), "step", 6)]
    folder = Path(tempfile.mkdtemp(prefix="kill-trials-"))
    runner = Trials(folder, arguments.world, arguments.sabotage)
    numbers: dict[str, Any] = {}
    for done, trial in enumerate(trials, 1):
        runner.run(trial)
        said = "; ".join(difference.splitlines()[0] for difference in trial.differences) or "the same"
        kills = ", ".join(f"{blow.place}{'' if blow.fell else ' (too late)'}" for blow in trial.blows)
        print(f"{trial.number}: {trial.configuration}: {kills}: {said} ({trial.seconds:.0f} s)", flush=True)  # noqa: T201
        numbers = report(trials[:done], arguments, time.monotonic() - started)
        arguments.report.write_text(json.dumps(numbers, indent=1) + "\n")
        arguments.report.with_suffix(".md").write_text(table(numbers))
    if numbers["mismatches"]:
        sys.stderr.write(f"what differs is in {folder}\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
