"""A run that goes on with other ranks and other ZeRO stages: the same samples, and the same losses within a tolerance.

    python tests/faults/elastic.py --report elastic.json

10 steps of 8 samples on 2 ranks, ZeRO-2, are the measure. The others are killed after step 3 and again after step 6,
and go on from the checkpoints of steps 2 and 6: on 1 and then 4 ranks, under ZeRO-3 and then ZeRO-1, or both at once.
Without dropout, which is drawn rank by rank. Exit status 1: some journey did not arrive at the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from helpers.comparing import Splits, consumed, metrics
from helpers.forked_ranks import Kill, import_everything, last_lines, run_world
from helpers.places import die_at, record_samples
from helpers.sabotage import SABOTAGES
from helpers.tiny_files import make_data, make_model
from helpers.tiny_run import run_settings

STEPS = 10
_WEIGHT = {"name": "weight_lora", "keep": 4, "steps": 4, "cut_after": 2, "omega_lr": 0.5}
METHODS: dict[str, Any] = {
    "lora": "lora",
    "weight_lora": _WEIGHT | {"batch_growth": "none"},
    "weight_lora, keep_global": _WEIGHT | {"batch_growth": "keep_global"},
    "lora_drop": {"name": "lora_drop", "sample_fraction": 0.3, "pilot_epochs": 1, "threshold": 0.6},
}
DTYPES = ("float32", "bfloat16")
Leg = tuple[int, int]
"""Ranks and ZeRO stage."""
JOURNEYS: dict[str, list[Leg]] = {
    "ranks 2, 1, 4": [(2, 2), (1, 2), (4, 2)],
    "stages 2, 3, 1": [(2, 2), (2, 3), (2, 1)],
    "ranks 2, 1, 4 and stages 2, 3, 1": [(2, 2), (1, 3), (4, 1)],
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3}
"""Of a step's loss, relative. In bfloat16 a gradient summed in another order differs in its last of 8 bits, 4e-3."""
_ARRIVALS = (4, 5)
"""The step that each leg but the last is killed at, counted from where it began: the run's steps 4 and 7."""


class Journeys:
    """Runs journeys in one folder."""

    def __init__(self, folder: Path, sabotage: str | None = None) -> None:
        self.folder, self.sabotage = folder, sabotage
        self.model, self.data = folder / "model", folder / "data"
        self.data.mkdir(parents=True)
        make_model(self.model)
        make_data(self.data)
        self.whole: dict[tuple[str, str], tuple[Path, Splits]] = {}

    def travel(self, method: str, dtype: str, legs: list[Leg]) -> tuple[Path, Splits]:
        """The finished run's folder, and what it consumed.

        Raises:
            AssertionError: a leg that ended in another way than it should.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        tree = run_settings(self.model, self.data, folder / "run")
        tree["model"]["dtype"] = dtype
        tree["adapter"]["lora_dropout"] = 0.0
        tree["method"] = METHODS[method]
        tree["training"] |= {"max_steps": STEPS, "save_every": 2, "eval_every": 5, "warmup_steps": 2}
        for number, (ranks, stage) in enumerate(legs):
            arrival = _ARRIVALS[number] if number < len(legs) - 1 else None
            before = partial(self._before, folder, number, arrival)
            kill = Kill(tuple(range(ranks))) if arrival else None
            tree["deepspeed"] = {"zero_stage": stage}
            statuses = run_world(tree, ranks, folder / "logs", kill, before)
            # A rank may notice that another one is gone before its own kill comes.
            as_wanted = statuses[0] == -9 and all(statuses) if arrival else not any(statuses)
            assert as_wanted, f"{statuses}\n{last_lines(folder / 'logs')}"
        return folder / "run", consumed(folder, len(legs), [ranks for ranks, _ in legs])

    def uninterrupted(self, method: str, dtype: str) -> tuple[Path, Splits]:
        """The same on 2 ranks under ZeRO-2, all the way."""
        if (method, dtype) not in self.whole:
            self.whole[method, dtype] = self.travel(method, dtype, [(2, 2)])
        return self.whole[method, dtype]

    def compare(self, method: str, dtype: str, legs: list[Leg]) -> dict[str, Any]:
        """Largest relative difference of a loss, and of the adapter; whatever else differs."""
        whole, expected = self.uninterrupted(method, dtype)
        run, samples = self.travel(method, dtype, legs)
        found = [] if samples == expected else ["other samples were consumed, or in another order"]
        found += _steps_differ(metrics(whole), metrics(run))
        loss = 0.0 if found else _loss_difference(metrics(whole), metrics(run))
        if loss > TOLERANCES[dtype]:
            found.append(f"losses differ by {loss:.1e}, more than {TOLERANCES[dtype]:.0e}")
        adapter = _adapter_difference(whole, run)
        return {"loss_difference": loss, "adapter_difference": adapter, "differences": found}

    def _before(self, folder: Path, number: int, arrival: int | None, rank: int) -> None:
        record_samples(folder / f"{number}-{rank}.jsonl")
        if self.sabotage and number:
            SABOTAGES[self.sabotage]()
        if arrival and rank == 0:
            die_at("step", arrival)


def _steps_differ(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> Iterator[str]:
    """What does not depend on rounding: steps, samples, phases, adapters."""
    for key in ("step", "samples", "phase", "active_adapters", "trainable_parameters", "learning_rate"):
        values = [[line[key] for line in lines] for lines in (expected, got)]
        if values[0] != values[1]:
            yield f"{key}: {values[1]} in place of {values[0]}"


def _loss_difference(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> float:
    """The largest relative one, of training and validation losses."""
    pairs = [
        (one[key], other[key])
        for one, other in zip(expected, got, strict=True)
        for key in ("loss", "validation_loss")
        if key in one
    ]
    return max(abs(one - other) / abs(one) for one, other in pairs)


def _adapter_difference(whole: Path, run: Path) -> float:
    """Norm of the difference over the norm."""
    from safetensors.torch import load_file

    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, whole))
    if mine.keys() != theirs.keys():
        return math.inf
    square = sum(float((mine[name] - theirs[name]).float().norm() ** 2) for name in theirs)
    return math.sqrt(square / sum(float(tensor.float().norm() ** 2) for tensor in theirs.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--journeys", nargs="+", choices=JOURNEYS, default=list(JOURNEYS))
    parser.add_argument("--report", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sabotage", choices=SABOTAGES, help="spoil every resumed run, to see that it is noticed")
    arguments = parser.parse_args()
    import_everything()
    results = []
    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        journeys = Journeys(Path(folder), arguments.sabotage)
        for method, dtype, journey in product(arguments.methods, arguments.dtypes, arguments.journeys):
            result = {"method": method, "dtype": dtype, "journey": journey}
            try:
                result |= journeys.compare(method, dtype, JOURNEYS[journey])
            except (AssertionError, TimeoutError) as error:
                result["differences"] = [str(error)]
            results.append(result)
            print(json.dumps(result), flush=True)  # noqa: T201
    arguments.report.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["differences"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
