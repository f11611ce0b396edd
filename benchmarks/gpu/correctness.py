"""Does a run on this device train at every ZeRO stage as at stage 0, change phase, survive a SIGKILL, and write?

    python benchmarks/gpu/correctness.py --out FOLDER [--device cpu] [--parallel 8] [--tiny]

Whole runs on the tests' tiny Llama with NCCL (gloo on the CPU) in a world of one. A process trains all stages of one
method and dtype, since to import everything takes longer than to train; several go side by side. Losses are compared as
tests/launches/parity.py compares them, within its tolerances.
Exit status 1: something failed or differs; correctness.json says what.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

from helpers.tiny_files import make_data, make_model  # noqa: E402
from launches.parity import Case, compare, settings  # noqa: E402

METHODS = ("lora", "weight_lora_plus", "partial", "lora_drop")
"""WeightLoRA+ and LoRA-drop change phase, Partial-LoRA keeps its masks in the sharded optimizer."""
DTYPES = ("bfloat16", "nf4", "float32")
KILLED = (Case("weight_lora_plus", "bfloat16", 2), Case("partial", "nf4", 3))


class Runs:
    """Runs in one folder, on one kind of device."""

    def __init__(self, folder: Path, device: str, timeout: float) -> None:
        self.folder, self.device, self.timeout = folder, device, timeout
        self.seconds: dict[str, float] = {}  # of each process that ended
        for name, make in {"model": make_model, "data": make_data}.items():
            (folder / name).mkdir(parents=True)
            make(folder / name)

    def train(self, name: str, cases: Sequence[Case]) -> str:
        """Train them one after the other in one process; what went wrong, or nothing."""
        return self._wait(self._start(name, {case.name: case for case in cases}), name)

    def train_killed(self, case: Case) -> str:
        """Kill it with SIGKILL once half of its steps are logged, run it again, and compare it with the other."""
        name = f"{case.name}-killed"
        process = self._start(name, {name: case})
        metrics, end = self.folder / name / "metrics.jsonl", time.monotonic() + self.timeout
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                return f"it ended by itself, with {process.wait()}, before it was killed: {self._log(name)}"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        problem = self._wait(self._start(name, {name: case}), name)
        if problem or not (self.folder / case.name / "summary.json").is_file():
            return problem or "the run to compare it with did not end"
        outcome = compare(case, self.folder / name, self.folder / case.name)
        return "" if outcome.passed else outcome.problem or f"other losses: {outcome.loss}, {outcome.validation_loss}"

    def generate(self, case: Case) -> str:
        """`sparse-llm-ft generate` from a finished run."""
        command = [sys.executable, "-m", "sparse_llm_ft.cli", "generate", str(self.folder / case.name)]
        command += ["anna buys the red", "tom meets"]
        result = subprocess.run(
            command, capture_output=True, text=True, env=self._environment(), timeout=self.timeout, check=False
        )
        return "" if result.returncode == 0 else result.stdout[-500:] + result.stderr[-500:]

    def _start(self, name: str, cases: Mapping[str, Case]) -> subprocess.Popen[str]:
        trees = [settings(case, self.folder, self.folder / folder) for folder, case in cases.items()]
        for tree in trees:
            tree["training"]["save_every"] = 2
        asked = self.folder / f"{name}.json"
        asked.write_text(json.dumps(trees))
        command = [sys.executable, __file__, "--train", str(asked)]
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=self._environment())

    def _environment(self) -> dict[str, str]:
        """This process's, without GPUs where none is meant, and without a thread pool in every process."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return os.environ | hidden | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def _wait(self, process: subprocess.Popen[str], name: str) -> str:
        began = time.monotonic()
        try:
            status = process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"hangs: {self._log(name)}"
        self.seconds[name] = round(time.monotonic() - began, 1)
        return "" if status == 0 else f"exit status {status}: {self._log(name)}"

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-1500:]


def train_here(trees: Sequence[Mapping[str, Any]]) -> None:
    """What launch/train.py does with parsed arguments, for one configuration after the other."""
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.context.preflight import preflight
    from sparse_llm_ft.distributed.world import find_world, prepare_cpu
    from sparse_llm_ft.engine.engine import process_group
    from sparse_llm_ft.training.run import train

    world = find_world()
    prepare_cpu(world)
    with process_group():
        for tree in trees:
            config = parse_config(tree)
            train(RunContext.open(config, world, preflight(config, world)))


def check(runs: Runs, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every check: what, its name, the largest difference of a loss, and the problem, empty where there is none."""
    few = options.tiny
    methods, dtypes = METHODS[1:2] if few else options.methods, DTYPES[:1] if few else DTYPES
    stages, killed = (0, 2) if few else (0, 1, 2, 3), [case for case in KILLED if case.method in methods]
    groups = {
        f"{method}-{dtype}": [Case(method, dtype, stage) for stage in stages] for method in methods for dtype in dtypes
    }
    with ThreadPoolExecutor(options.parallel) as pool:
        problems = dict(zip(groups, pool.map(runs.train, groups, groups.values()), strict=True))
        again = list(pool.map(runs.train_killed, killed))
        written = list(pool.map(runs.generate, killed))
    rows: list[dict[str, Any]] = []
    for name, cases in groups.items():
        for case in cases:
            problem, difference = problems[name], None
            if not problem:
                outcome = compare(case, runs.folder / case.name, runs.folder / case.reference.name)
                difference = max(outcome.loss, outcome.validation_loss)
                if not outcome.passed:
                    problem = outcome.problem or f"largest difference of a loss: {difference}"
            rows.append({"what": "parity", "name": case.name, "problem": problem, "difference": difference})
    for what, found in (("killed and resumed", again), ("generated", written)):
        rows += [{"what": what, "name": c.name, "problem": p} for c, p in zip(killed, found, strict=True)]
    return rows


def main() -> None:
    """Check, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parallel", type=int, default=min(os.cpu_count() or 1, 14))
    parser.add_argument("--timeout", type=float, default=150)
    parser.add_argument("--tiny", action="store_true", help="one method, bfloat16 and stages 0 and 2 alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_here(json.loads(options.train.read_text()))
        return
    began = time.monotonic()
    runs = Runs(options.out / "runs", options.device, options.timeout)
    rows = check(runs, options)
    failed = [row for row in rows if row["problem"]]
    (options.out / "correctness.json").write_text(
        json.dumps({"checks": rows, "seconds": runs.seconds}, indent=1) + "\n"
    )
    for row in failed:
        sys.stdout.write(f"{row['what']}: {row['name']}: {row['problem'][-700:]}\n")
    differences = [row["difference"] for row in rows if row.get("difference") is not None]
    sys.stdout.write(
        f"{len(rows)} checks, {len(failed)} failed, largest difference of a loss {max(differences, default=0):.1e}, "
        f"{time.monotonic() - began:.0f} s\n"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
