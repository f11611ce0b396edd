"""The planner's forecast beside the bytes of real steps: every line, and the peak, with signed errors.

    python benchmarks/planner_truth.py --model FOLDER --store FILE [--suites NAME ...] [--only-plan]

FOLDER is SmolLM2-135M-Instruct. Each case opens a run, builds the engine of one of its phases, makes steps of the run's
own loop, and counts the bytes of all tensors in one of them: `LiveBytes` in both passes and the update, and what was
there before by Python's own list of objects. Two and four ranks run under torchrun, over gloo; each line is that of the
rank that has most of it. What a case measured is kept in FILE; --only-plan makes no new steps, and plans those in FILE
anew. The phases are the planner's, after T too.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import argument_parser, print_table, start
from truth_cases import SUITES, Case, opened, random_base

MARK = "truth: "


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


def launch(
    models: dict[str, str], cases: Sequence[Case], ranks: int, script: str = __file__
) -> Iterator[tuple[Case, dict[str, int]]]:
    """Start the processes of these cases, which all have as many ranks, and yield what rank 0 has measured.

    Args:
        script: whose `child` they run.
    """
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(ranks), "--standalone"]
    arguments = [script, "--child", json.dumps(models), json.dumps([asdict(case) for case in cases])]
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
    from truth_steps import real_step

    from sparse_llm_ft.engine.engine import init_distributed
    from sparse_llm_ft.planning.phases import foresee_phases

    init_distributed()
    for case in cases:
        context, sizes = opened(case, models)
        phase = foresee_phases(context, world.size, sizes)[case.phase].phase
        result = real_step(case, context, phase, world)
        gc.collect()
        if world.rank == 0:
            print(MARK + json.dumps(result), flush=True)


def plan(case: Case, models: dict[str, str]) -> dict[str, int]:
    """What the planner says of the case, by the names of what is measured."""
    from sparse_llm_ft.planning.forecast import forecast

    context, sizes = opened(case, models)
    planned = forecast(context, case.ranks, sizes, on_gpu=False).phases[case.phase]
    lines = {key: planned.lines[key] for key in LINES}
    return {"peak": planned.peaks["step"], **lines, "communicated": planned.communicated_bytes_per_step}


LINES = ("base", "adapters", "gradients", "optimizer", "kept_for_backward", "logits_and_loss", "gathered_weights")


if __name__ == "__main__":
    if "--child" in sys.argv:
        where = sys.argv.index("--child")
        child(json.loads(sys.argv[where + 1]), [Case(**case) for case in json.loads(sys.argv[where + 2])])
    else:
        main()
