"""Does every method train alike at every ZeRO stage, on one rank and two, with and without offload?

    python tests/launches/parity.py --report parity.json [--every 1] [--methods NAME ...] [--dtypes NAME ...]

Each run is compared with the run of the same method and dtype on one rank at stage 0: the loss of every step, the
validation losses, and the plan it ends with. Runs are whole ones, pilots, derivations and changes of phase included.
`--every N` takes each N-th combination, by a seeded order. Beside the report, `report.md` is its table. Exit status 1:
some run failed or lies outside the tolerance of its dtype.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent))

from helpers.all_methods import METHODS, with_cache
from helpers.forked_ranks import import_everything, last_lines, run_world
from helpers.tiny_files import make_data, make_encoder, make_labelled, make_model
from helpers.tiny_run import run_settings

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "nf4": 1e-2}
"""Of a loss near 3. Adam makes of rounding, where a gradient is almost zero, whole steps; hence more than rounding."""
CHECKPOINTED, HEAD = "lora, gradient checkpointing", "lora, fresh head"
VARIANTS = {CHECKPOINTED: "lora", HEAD: "lora"}
WHOLE_MATRICES = ("adalora", "partial_adalora", "dora", "partial_dora")


class Case(NamedTuple):
    """One cell of the matrix."""

    method: str
    dtype: str
    stage: int = 0
    world: int = 1
    offload: bool = False

    @property
    def reference(self) -> Case:
        return Case(self.method, self.dtype)

    @property
    def name(self) -> str:
        offload = "-offload" if self.offload else ""
        return f"{self.method}-{self.dtype}-zero{self.stage}-{self.world}{offload}".replace(", ", "-").replace(" ", "-")


@dataclass
class Outcome:
    """How a case went; differences are the largest from the reference."""

    case: Case
    statuses: list[int]
    loss: float = 0.0
    validation_loss: float = 0.0
    same_plan: bool = True
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and max(self.loss, self.validation_loss) <= TOLERANCE[self.case.dtype]


def make_steady_encoder(folder: Path) -> None:
    """The tiny encoder without the dropout of its own, which is drawn by rank."""
    make_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))


def matrix() -> Iterator[Case]:
    """Every case that can be, without the references."""
    for method in (*METHODS, *VARIANTS):
        for dtype in TOLERANCE:
            if method == "full" and dtype == "nf4":
                continue  # refused: a quantised base cannot be trained
            for stage in (0, 1, 2, 3):
                if stage == 3 and method in WHOLE_MATRICES:
                    continue  # refused: AdaLoRA's penalty and DoRA's forward pass need whole matrices
                for world in (1, 2):
                    for offload in (False, True)[: 1 + bool(stage)]:
                        if (stage, world) != (0, 1):
                            yield Case(method, dtype, stage, world, offload)


def settings(case: Case, inputs: Path, output_dir: Path) -> dict[str, Any]:
    """A run of 8 counted steps with a validation loss every 4; no dropout, which is drawn by rank."""
    tree = run_settings(inputs / "model", inputs / "data", output_dir)
    if case.method == HEAD:
        tree["model"]["name"] = str(inputs / "encoder")
        labels = {"labels": ["no", "yes"], "texts": ["sentence"], "max_length": 32}
        tree["task"] = {"name": "custom", "path": str(inputs / "labelled")} | labels
    tree["adapter"]["lora_dropout"] = 0.0
    tree["model"] |= {"dtype": "float32"} if case.dtype == "float32" else {"dtype": "bfloat16"}
    if case.dtype == "nf4":
        tree["model"]["quantization"] = "nf4"
    if case.method == CHECKPOINTED:
        tree["model"]["gradient_checkpointing"] = True
    # Decisions (a cut, a choice of layers) are made on what differs by rounding; a small rate keeps it small.
    tree["training"] |= {"learning_rate": 0.003, "eval_every": 4}
    tree["evaluation"]["samples"] = 0
    tree["deepspeed"] = {"zero_stage": case.stage}
    if case.offload:
        tree["deepspeed"]["zero_optimization"] = {"offload_optimizer": {"device": "cpu"}}
    # Ratios are derived once for a method and dtype; that every stage derives the same is a case of its own.
    cache = inputs / "cache" / f"{case.reference.name}"
    tree["method"] = with_cache((METHODS | VARIANTS)[case.method], cache)
    tree["report"] = False
    return tree


def run_case(case: Case, folder: Path) -> Outcome:
    """Train it, unless it is done, and compare."""
    output, logs = folder / case.name, folder / "logs" / case.name
    if not (output / "summary.json").is_file():
        try:
            statuses = run_world(settings(case, folder, output), case.world, logs, timeout=300)
        except TimeoutError as error:
            return Outcome(case, [], problem=f"hangs: {str(error)[-1500:]}")
        if any(statuses):
            return Outcome(case, statuses, problem=last_lines(logs, 1500))
    return compare(case, output, folder / case.reference.name)


def compare(case: Case, output: Path, reference: Path) -> Outcome:
    """Largest differences over the steps of the two runs."""
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (output, reference)
    )
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        return Outcome(case, [], problem=f"other steps: {[line['step'] for line in ours]}")
    plans = [json.loads((run / "plan.json").read_text()) for run in (output, reference)]
    worst = {
        key: max((abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True) if key in b), default=0.0)
        for key in ("loss", "validation_loss")
    }
    return Outcome(case, [0] * case.world, worst["loss"], worst["validation_loss"], plans[0] == plans[1])


def table(outcomes: list[Outcome], seconds: float) -> str:
    """Per dtype: how many runs, how many outside the tolerance, the largest difference and whose it is."""
    lines = [
        "| dtype | runs | tolerance | outside | other plan | largest difference | of |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype, tolerance in TOLERANCE.items():
        here = [outcome for outcome in outcomes if outcome.case.dtype == dtype]
        if here:
            worst = max(here, key=lambda o: max(o.loss, o.validation_loss))
            largest = max(worst.loss, worst.validation_loss)
            failed, other = sum(not o.passed for o in here), sum(not o.same_plan for o in here)
            lines.append(
                f"| {dtype} | {len(here)} | {tolerance:g} | {failed} | {other} | {largest:.1e} | {worst.case.name} |"
            )
    failures = [
        f"- {o.case.name}: {o.problem[-300:] or max(o.loss, o.validation_loss)}" for o in outcomes if not o.passed
    ]
    return "\n".join([*lines, "", *failures, "", f"{len(outcomes)} runs in {seconds:.0f} s."]) + "\n"


def main() -> None:
    """Run the matrix, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *VARIANTS])
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE))
    parser.add_argument("--runs", type=Path, help="keep the runs here; what is done is not done again")
    options = parser.parse_args()
    cases = [case for case in matrix() if case.method in (options.methods or (*METHODS, *VARIANTS))]
    cases = [case for case in cases if case.dtype in (options.dtypes or TOLERANCE)]
    random.Random(0).shuffle(cases)
    cases = cases[:: options.every]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        import_everything()
        makers = {"model": make_model, "data": make_data, "encoder": make_steady_encoder, "labelled": make_labelled}
        for name, make in makers.items():
            if not (folder / name).is_dir():
                (folder / name).mkdir(parents=True)
                make(folder / name)
        outcomes = []
        for case in [*dict.fromkeys(case.reference for case in cases), *cases]:
            outcomes.append(run_case(case, folder))
            sys.stdout.write(f"{len(outcomes)} {case.name} {'passed' if outcomes[-1].passed else 'FAILED'}\n")
            sys.stdout.flush()
    compared = [outcome for outcome in outcomes if outcome.case in cases or not outcome.passed]
    text = table(compared, time.monotonic() - started)
    rows = [asdict(outcome) | {"case": outcome.case._asdict(), "passed": outcome.passed} for outcome in compared]
    options.report.write_text(json.dumps(rows, indent=1))
    options.report.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    sys.exit(0 if all(outcome.passed for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
