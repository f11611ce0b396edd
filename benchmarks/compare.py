"""Stock PEFT, PEFT tuned, this toolkit and the bare base: seconds and bytes of a training step, case by case.

    python benchmarks/compare.py --out FOLDER [--quick | --tiny] [--model PATH] [--docs docs/benchmarks.md]

Every system has a process to itself, and they take turns: in every round each makes its steps while the others wait.
A ratio is taken in each round, and their median is shown, so that a machine which slows down for a while slows down
both sides. Bytes are counted, not sampled. Writes results.json and results.md after every case.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

from compare_cases import CASES
from compare_tables import page
from compare_worker import SYSTEMS, TOOLKIT, Job
from harness import argument_parser

HERE = Path(__file__).parent


class Worker:
    """A job's processes: one, or a rank each."""

    def __init__(self, job: Job, ranks: int, errors: Path) -> None:
        self.job, self.errors = job, errors
        environment = [os.environ | ({} if ranks == 1 else _of_rank(rank, ranks)) for rank in range(ranks)]
        if ranks > 1:
            port = str(_free_port())
            environment = [each | {"MASTER_PORT": port} for each in environment]
        with errors.open("w") as log:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, str(HERE / "compare_worker.py"), json.dumps(asdict(job))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=each,
                    text=True,
                )
                for each in environment
            ]
        self._answers()

    def ask(self, do: str, **arguments: object) -> Any:
        """Send a command to all ranks; returns the first one's answer."""
        for rank in self._ranks:
            _pipe(rank.stdin).write(json.dumps({"do": do, **arguments}) + "\n")
            _pipe(rank.stdin).flush()
        return self._answers()[0]

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            _pipe(rank.stdin).close()
        for rank in self._ranks:
            rank.wait()

    def _answers(self) -> list[Any]:
        lines = [_pipe(rank.stdout).readline() for rank in self._ranks]
        if not all(lines):
            for rank in self._ranks:
                rank.kill()
            sys.exit(f"{self.job.system}, {self.job.case}: a process ended\n{self.errors.read_text()[-3000:]}")
        return [json.loads(line) for line in lines]


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _of_rank(rank: int, ranks: int) -> dict[str, str]:
    """The environment of one of several processes that share the cores."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def workers(jobs: Sequence[Job], ranks: int, folder: Path) -> Iterator[list[Worker]]:
    """The jobs' processes, ended at the end."""
    with ExitStack() as stack:
        found = []
        for i, job in enumerate(jobs):
            found.append(Worker(job, ranks, folder / f"stderr-{i}"))
            stack.callback(found[-1].close)
        yield found


def alternate(running: Sequence[Worker], rounds: int, steps: int) -> list[list[dict[str, Any]]]:
    """Rounds in which each worker makes its steps, by turns; another one begins each round.

    Returns:
        For each worker what it answered in each round.
    """
    for worker in running:
        worker.ask("steps", count=2)  # caches, the optimizer's state and the allocator's pools fill
    answers: list[list[dict[str, Any]]] = [[] for _ in running]
    for i in range(rounds):
        for turn in range(len(running)):
            chosen = (i + turn) % len(running)
            answers[chosen].append(running[chosen].ask("steps", count=steps))
    return answers


def measure(job: Job, timed: bool, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """All systems on one case.

    Args:
        job: the toolkit's.
        timed: whether to measure seconds as well.
    """
    jobs = [replace(job, system=system) for system in SYSTEMS]
    row: dict[str, Any] = {"case": job.case, "data": job.key, "job": asdict(job), "systems": {}}
    with workers(jobs, 1, folder) as running:
        rounds_of = alternate(running, rounds, steps) if timed else [[] for _ in jobs]
        for worker, answers in zip(running, rounds_of, strict=True):
            if not timed:
                worker.ask("steps", count=1)  # the optimizer's state comes into being
            row["systems"][worker.job.system] = {"bytes": worker.ask("bytes"), "rounds": answers}
    return row


@dataclass(frozen=True)
class Plan:
    """A part of the comparison: cases on the same base and data."""

    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["none", "nf4"]
    batch: int
    length: int
    supervised: Literal["half", "all"]
    cases: tuple[str, ...]
    timed: bool

    def jobs(self, base: str, zero_stage: int) -> list[Job]:
        """The toolkit's job of every case."""
        prompt = self.length // 2 if self.supervised == "half" else 1
        sizes = (self.batch, self.length, prompt, zero_stage)
        return [Job(TOOLKIT, case, base, self.dtype, self.quantization, *sizes) for case in self.cases]


ALL = tuple(CASES)
MAIN = ("lora", "lora, dropout .05", "weight_lora after T, top tenth")


def full() -> list[Plan]:
    """Everything: seconds in the dtypes that the CPU multiplies fast, bytes in all."""
    fast = bfloat16_is_fast()
    plans = [Plan("float32", "none", 2, 256, "half", ALL, True), Plan("bfloat16", "none", 2, 256, "half", ALL, fast)]
    plans += [
        Plan("float32", "none", *sizes, MAIN, True) for sizes in ((2, 256, "all"), (4, 512, "half"), (4, 512, "all"))
    ]
    plans += [Plan("bfloat16", "none", 2, 256, "all", MAIN, False)]
    plans += [Plan("bfloat16", "none", 4, 512, supervised, MAIN, False) for supervised in ("half", "all")]
    plans += [Plan("float32", "nf4", 2, 256, "half", MAIN, True), Plan("bfloat16", "nf4", 2, 256, "half", MAIN, False)]
    return plans


QUICK = [Plan("float32", "none", 2, 256, "half", ("lora",), True)]
TINY = [Plan("float32", "none", 2, 32, "half", ("lora", "weight_lora after T, top tenth"), True)]


def bfloat16_is_fast() -> bool:
    """Whether the CPU multiplies bfloat16 matrices by itself (AVX512-BF16, AMX)."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """The features that the kernel lists; empty where it lists none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def describe_machine() -> str:
    """Cores and those features that matter for matrix products."""
    told = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd") if flag in cpu_flags()]
    return f"{len(os.sched_getaffinity(0))} CPU cores ({', '.join(told)})"


def write_base(folder: Path, tiny: bool) -> Path:
    """A checkpoint of random float32 weights in the shapes of SmolLM2-135M, or of a narrow Llama."""
    import torch
    from bases import random_base, smollm2_135m, tiny_llama

    config = tiny_llama() if tiny else smollm2_135m()
    random_base(config, "none", torch.device("cpu"), torch.float32).save_pretrained(folder)
    return folder


def main() -> None:
    """Measure all cases and write the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one case in three rounds")
    size.add_argument("--tiny", action="store_true", help="two cases on a narrow Llama")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: random weights in SmolLM2-135M's shapes")
    parser.add_argument("--rounds", type=int, help="default: 5, or 3 with --quick and --tiny")
    parser.add_argument("--steps", type=int, default=2, help="of a system in a round")
    parser.add_argument("--zero-stage", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plans = TINY if options.tiny else QUICK if options.quick else full()
    rounds = options.rounds or (3 if options.quick or options.tiny else 5)
    results: dict[str, Any] = {"machine": describe_machine(), "versions": versions(), "rounds": rounds, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = str(options.model or write_base(folder / "base", options.tiny))
        for plan in plans:
            for job in plan.jobs(base, options.zero_stage):
                began = time.monotonic()
                row = measure(job, plan.timed, rounds, options.steps, folder)
                row["job"].pop("base")
                results["rows"].append(row)
                (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
                (options.out / "results.md").write_text(page(results))
                print(f"{job.key}: {job.case}, {time.monotonic() - began:.0f} s", flush=True)
    print(page(results))


def versions() -> str:
    """Of the libraries that are compared."""
    return ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    )


if __name__ == "__main__":
    main()
