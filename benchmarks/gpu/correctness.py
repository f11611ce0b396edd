"""Does a run on this device train at every ZeRO stage as at stage 0, change phase, survive a SIGKILL, and write?

    python benchmarks/gpu/correctness.py --out FOLDER [--device cpu] [--parallel 8] [--tiny]

Whole runs of launch/train.py on the tests' tiny Llama, each a process of its own with NCCL (gloo on the CPU) in a world
of one, several side by side. Losses are compared as tests/launches/parity.py compares them, within its tolerances.
Exit status 1: something failed or differs; correctness.json says what.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

from helpers.tiny_files import make_data, make_model
from launches.parity import Case, compare, settings

METHODS = ("lora", "weight_lora_plus", "partial", "lora_drop")
"""WeightLoRA+ and LoRA-drop change phase, Partial-LoRA keeps its masks in the sharded optimizer."""
DTYPES = ("bfloat16", "nf4", "float32")
KILLED = (Case("weight_lora_plus", "bfloat16", 2), Case("partial", "nf4", 3))


class Runs:
    """Runs in one folder, on one kind of device."""

    def __init__(self, folder: Path, device: str, timeout: float) -> None:
        self.folder, self.device, self.timeout = folder, device, timeout
        for name, make in {"model": make_model, "data": make_data}.items():
            (folder / name).mkdir(parents=True)
            make(folder / name)

    def environment(self) -> dict[str, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return os.environ | world | hidden | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(self, case: Case, name: str) -> subprocess.Popen[str]:
        tree = settings(case, self.folder, self.folder / name)
        tree["training"]["save_every"] = 2
        config = self.folder / f"{name}.yaml"
        config.write_text(json.dumps(tree))
        log = (self.folder / f"{name}.log").open("a")
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)]
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=self.environment())

    def train(self, case: Case) -> str:
        """Run it; what went wrong, or nothing."""
        return self._wait(self.start(case, case.name), case.name)

    def train_killed(self, case: Case) -> str:
        """Kill it with SIGKILL once half of its steps are logged, run it again, and compare it with the other."""
        name = f"{case.name}-killed"
        process = self.start(case, name)
        metrics, end = self.folder / name / "metrics.jsonl", time.monotonic() + self.timeout
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                return f"it ended by itself, with {process.wait()}, before it was killed: {self._log(name)}"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        problem = self._wait(self.start(case, name), name)
        if problem:
            return problem
        outcome = compare(case, self.folder / name, self.folder / case.name)
        return "" if outcome.passed else outcome.problem or f"other losses: {outcome.loss}, {outcome.validation_loss}"

    def generate(self, case: Case) -> str:
        """`sparse-llm-ft generate` from a finished run."""
        run = self.folder / case.name
        command = [sys.executable, "-m", "sparse_llm_ft.cli", "generate", str(run), "anna buys the red", "tom meets"]
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment(), timeout=self.timeout)
        return "" if result.returncode == 0 else result.stdout[-500:] + result.stderr[-500:]

    def _wait(self, process: subprocess.Popen[str], name: str) -> str:
        try:
            status = process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"hangs: {self._log(name)}"
        return "" if status == 0 else f"exit status {status}: {self._log(name)}"

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-1500:]


def main() -> None:
    """References first, then what is compared with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parallel", type=int, default=min(os.cpu_count() or 1, 14))
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--tiny", action="store_true", help="two methods, bfloat16 and stages 0 and 3 alone")
    options = parser.parse_args()
    began = time.monotonic()
    methods, dtypes, stages = METHODS, DTYPES, (1, 2, 3)
    killed = KILLED
    if options.tiny:
        methods, dtypes, stages, killed = METHODS[:2], DTYPES[:1], (2,), KILLED[:1]
    runs = Runs(options.out / "runs", options.device, options.timeout)
    references = [Case(method, dtype) for method in methods for dtype in dtypes]
    cases = [case._replace(stage=stage) for case in references for stage in stages]
    rows: list[dict[str, Any]] = []

    def add(what: str, name: str, problem: str, difference: float | None = None) -> None:
        rows.append({"what": what, "name": name, "problem": problem, "difference": difference})

    with ThreadPoolExecutor(options.parallel) as pool:
        failed = dict(zip(references, pool.map(runs.train, references), strict=True))
        failed |= dict(zip(cases, pool.map(runs.train, cases), strict=True))
        again = list(pool.map(runs.train_killed, killed))
        written = list(pool.map(runs.generate, killed))
    for case in [*references, *cases]:
        problem, difference = failed[case], None
        if not problem and not failed[case.reference]:
            outcome = compare(case, runs.folder / case.name, runs.folder / case.reference.name)
            difference = max(outcome.loss, outcome.validation_loss)
            if not outcome.passed:
                problem = outcome.problem or f"largest difference of a loss: {difference}"
        add("parity", case.name, problem, difference)
    for case, problem in zip(killed, again, strict=True):
        add("killed and resumed", case.name, problem)
    for case, problem in zip(killed, written, strict=True):
        add("generated", case.name, problem)
    report = {"rows": rows, "failed": sum(bool(row["problem"]) for row in rows), "seconds": time.monotonic() - began}
    (options.out / "correctness.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        if row["problem"]:
            sys.stdout.write(f"{row['what']}: {row['name']}: {row['problem'][-700:]}\n")
    sys.stdout.write(f"{len(rows)} checks, {report['failed']} failed, {report['seconds']:.0f} s\n")
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
