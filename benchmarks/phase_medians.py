"""Throughput of each phase of one run: the median over its steps, and the ratio of later phases to the first.

python benchmarks/phase_medians.py RUN [RUN ...]
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from harness import argument_parser


def phase_medians(run: Path) -> dict[str, float]:
    """Phase name -> median tokens/s of its logged steps, in the order of the run (``metrics.jsonl``)."""
    rates: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        rates.setdefault(step["phase"], []).append(step["tokens_per_second"])
    return {phase: median(values) for phase, values in rates.items()}


def main() -> None:
    """Print a line for each phase."""
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for run in parser.parse_args().runs:
        medians = phase_medians(run)
        first = next(iter(medians.values()))
        for phase, rate in medians.items():
            print(f"{run.name}  {phase}  {rate:,.0f} tokens/s  {rate / first:.2f} of the first phase")


if __name__ == "__main__":
    main()
