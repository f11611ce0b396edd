"""All that is to be known of one GPU: is a run right on it, and how fast is a step of Llama-3-8B.

    python benchmarks/gpu/run.py --out FOLDER [--seconds 500] [--device cpu --tiny]

No network, no checkpoint: weights are random and made on the device. Writes results.json and results.md after every
part, so that what is cut off is not lost. Exit status 1: a part failed; what was left out for want of time is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

READY = "ready"
"""What speed.py prints when it has imported everything."""

# The most telling first: --seconds may end the list early.
MEASURED = (
    ("none", "stock PEFT"),
    ("none", "lora"),
    ("none", "weight_lora after T, top tenth"),
    ("none", "weight_lora after T, top tenth, prefix cache"),
    ("nf4", "stock PEFT"),
    ("nf4", "lora"),
    ("nf4", "lora, ZeRO-1"),
    ("nf4", "weight_lora after T, top tenth"),
    ("none", "lora, compiled"),
    ("none", "PEFT tuned"),
    ("none", "bare base"),
    ("none", "stock PEFT, dropout .05"),
    ("none", "lora, dropout .05"),
    ("none", "weight_lora before its first cut"),
    ("none", "weight_lora before T"),
    ("none", "PEFT with Liger"),
    ("nf4", "weight_lora after T, top tenth, prefix cache"),
    ("none", "bare base, top tenth"),
    ("nf4", "PEFT tuned"),
    ("nf4", "bare base"),
    ("none", "lora, ZeRO-1"),
)


class Measurement:
    """speed.py on one system. It imports what it needs, and begins when asked: Python's imports would disturb another
    one's measurement, and take longer than its own.
    """

    def __init__(self, base: str, system: str, options: argparse.Namespace) -> None:
        self.base, self.system = base, system
        command = [sys.executable, str(HERE / "speed.py"), "--system", system, "--quantization", base, "--wait"]
        command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the process; a full pipe would stop it)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True
        )

    def wait(self) -> None:
        """Return once it has imported everything, or has ended."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and line.strip() != READY:
            pass

    def result(self, timeout: float) -> dict[str, Any]:
        """What speed.py prints, or why it does not."""
        try:
            printed, _ = self._process.communicate("begin\n", timeout)
        except subprocess.TimeoutExpired:
            self.end()
            return {"system": self.system, "base": self.base, "problem": f"not done after {timeout:.0f} s"}
        if self._process.returncode:
            self._complaints.seek(0)
            return {"system": self.system, "base": self.base, "problem": self._complaints.read()[-3000:]}
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


def measured(
    wanted: Sequence[tuple[str, str]], options: argparse.Namespace, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """What speed.py finds of one system after the other; all import at once before. None is begun once no seconds are
    `left`.
    """
    waiting = [Measurement(base, system, options) for base, system in wanted]
    try:
        for one in waiting:
            one.wait()
        while waiting and left() > 0:
            yield waiting.pop(0).result(max(left() + 30, 60))
    finally:
        for one in waiting:
            one.end()


def planned(options: argparse.Namespace) -> subprocess.Popen[str]:
    """planned.py, which needs no GPU, so that it runs beside other parts."""
    command = [sys.executable, str(HERE / "planned.py"), *(["--tiny"] if options.tiny else [])]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def table(results: dict[str, Any]) -> str:
    """For people."""
    speed = results["speed"]
    stock = {row["base"]: row for row in speed if row["system"] == "stock PEFT" and "problem" not in row}
    lines = [
        f"{results['device']}; {results['versions']}.",
        "",
        "| base | system | ms a step | of the host | tokens/s | against stock PEFT | of the card's peak | peak GiB | "
        "planned | without base |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in speed:
        if "problem" in row:
            lines.append(f"| {row['base']} | {row['system']} | failed | | | | | | | |")
            continue
        reference = stock.get(row["base"])
        ratio = f"{row['step_ms'] / reference['step_ms']:.2f}" if reference else ""
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
        peak = above = plan = ""
        if row["peak_bytes"] is not None:
            peak = f"{row['peak_bytes'] / 2**30:.1f}"
            above = f"{(row['peak_bytes'] - row['base_bytes']) / 2**30:.1f}"
        foreseen = results["planned"].get(f"{row['base']}:{row['system']}")
        if foreseen is not None:
            plan = f"{foreseen / 2**30:.1f}"
        lines.append(
            f"| {row['base']} | {row['system']} | {row['step_ms']:.1f} | {row['host_ms']:.1f} | "
            f"{row['tokens_per_second']:,.0f} | {ratio} | {mfu} | {peak} | {plan} | {above} |"
        )
    lines += ["", f"Correctness: {results['correctness']}."]
    if results["left_out"]:
        lines += ["", f"Left out for want of time: {', '.join(results['left_out'])}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Correctness, then speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=500, help="no system is begun after so long")
    parser.add_argument("--only", choices=("correctness", "speed"))
    parser.add_argument("--systems", nargs="+", help="only these, as BASE:SYSTEM")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**_versions(options.device), "correctness": "not run", "speed": [], "left_out": []}
    results["planned"] = {}
    planner = planned(options)

    def write() -> None:
        results["seconds"] = time.monotonic() - began
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "results.md").write_text(table(results))

    if options.only != "speed":
        command = [sys.executable, str(HERE / "correctness.py"), "--out", str(options.out), "--device", options.device]
        command += ["--tiny", "--parallel", "2"] if options.tiny else []
        done = subprocess.run(command, capture_output=True, text=True)
        sys.stdout.write(done.stdout[-6000:] + (done.stderr[-3000:] if done.returncode else ""))
        sys.stdout.flush()
        results["correctness"] = (done.stdout.splitlines() or ["it did not run"])[-1]
        results["correctness_failed"] = done.returncode != 0
        write()
    if options.only != "correctness":
        wanted: Sequence[tuple[str, str]] = MEASURED[:4] if options.tiny else MEASURED
        if options.systems:
            wanted = [(base, system) for base, _, system in (name.partition(":") for name in options.systems)]
        for row in measured(wanted, options, lambda: options.seconds - (time.monotonic() - began)):
            results["speed"].append(row)
            brief = {
                key: row[key]
                for key in ("base", "system", "problem", "step_ms", "host_ms", "waits", "seconds")
                if key in row
            }
            sys.stdout.write(f"{json.dumps(brief)}\n")
            sys.stdout.flush()
            write()
        results["left_out"] = [f"{base}: {system}" for base, system in wanted[len(results["speed"]) :]]
    printed, complaints = planner.communicate()
    if planner.returncode:
        sys.stdout.write(f"the planner failed: {complaints[-3000:]}\n")
    else:
        results["planned"] = json.loads(printed.splitlines()[-1])
    write()
    sys.stdout.write(table(results))
    failed = (
        planner.returncode
        or results.get("correctness_failed", False)
        or any("problem" in row for row in results["speed"])
    )
    sys.exit(1 if failed else 0)


def _versions(device: str) -> dict[str, str]:
    """The card and what runs on it, asked in a process of its own: this one leaves the device alone."""
    script = (
        "import torch, transformers, peft, deepspeed, bitsandbytes as b\n"
        f"name = torch.cuda.get_device_name() if {device == 'cuda'} else 'CPU'\n"
        "print(f'{name}|torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, '"
        "f'deepspeed {deepspeed.__version__}, bitsandbytes {b.__version__}')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"the libraries do not load here:\n{result.stderr[-2000:]}")
    name, _, versions = result.stdout.splitlines()[-1].partition("|")
    return {"device": name, "versions": versions}


if __name__ == "__main__":
    main()
