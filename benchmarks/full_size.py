"""A true-size Llama-3-8B, quantised to 4 bit, trained across a WeightLoRA phase change at ZeRO stage 3.

    python benchmarks/full_size.py MODEL [--layers 8] [--ranks 2] [--dtype bfloat16] [--out runs/full-size] [--forecast]

MODEL is a folder in Hugging Face layout with the shapes of Llama-3-8B; its values do not matter. With `--layers`, only
its first layers are used. The run trains 2 + 2 steps of 128 tokens per rank, all linear layers with an adapter in the
first two, a tenth of them in the others. It saves after every step. Right after it has saved step 3, every rank is
killed; the same command then resumes it, and ends with the exported adapter. A run that was stopped by anything else
resumes too: call the benchmark again with the same folder.

It prints, for every stretch of the run, the peak of each rank's resident memory (VmHWM, reset at the start of the
stretch) and its seconds, with those of its CPU core in brackets: other work on the machine makes the first longer. If
the machine's available memory falls below `--floor` GiB, the benchmark kills its ranks.

`--forecast` runs nothing, and prints what the planner says of these settings, with DeepSpeed's own prefetching and
without: bytes of tensors, to which the process of a rank adds Python and libraries. MODEL then needs config.json alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import argument_parser, memory, print_table, restart_peak

TOKENS, T, STEPS, KILLED_AT = 128, 2, 4, 3
MARKS = "marks.jsonl"
REST = "the rest"


def main() -> None:
    """Write model links, data and settings; start the ranks, twice if the run was new; print a table."""
    parser = argument_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/full-size"))
    parser.add_argument("--floor", type=float, default=1.5, help="GiB of available memory below which ranks are killed")
    parser.add_argument("--forecast", action="store_true", help="print the planner's figures, and run nothing")
    options = parser.parse_args()
    if options.forecast:
        show_forecast(options.model, options)
        return
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    model = options.model if options.layers is None else shortened(options.model, options.layers, out / "model")
    settings = write_settings(out, model.resolve(), options)
    while not (out / "run" / "summary.json").exists():
        steps = saved_steps(out / "run")
        status = start_ranks(out, settings, options.ranks, options.floor, KILLED_AT if not steps else None)
        if status and saved_steps(out / "run") <= steps:
            sys.exit(f"the ranks ended with status {status}, and saved nothing; their output is in {out / 'log.txt'}")
    show(out)


def shortened(model: Path, layers: int, folder: Path) -> Path:
    """A folder with links to the files of `model`, as a model of its first `layers` layers."""
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    own = {n: file for n, file in index["weight_map"].items() if not _beyond(n, layers)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": own}))
    tokenizer = [file.name for file in model.iterdir() if "token" in file.name or "chat" in file.name]
    for name in {*own.values(), *tokenizer}:
        if not (folder / name).exists():
            (folder / name).symlink_to((model / name).resolve())
    return folder


def _beyond(name: str, layers: int) -> bool:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return bool(numbers) and numbers[0] >= layers


def write_settings(out: Path, model: Path, options: argparse.Namespace) -> Path:
    """Training data, in which every sample fills its tokens, and the run's configuration. Returns the latter's path."""
    data = out / "data"
    data.mkdir(exist_ok=True)
    for split, rows in (("train", 64), ("validation", 2), ("test", 2)):
        lines = [
            json.dumps({"text": " ".join(f"{i} and {j}," for j in range(TOKENS)), "answer": "yes"}) for i in range(rows)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    settings = {
        "model": {
            "name": str(model),
            "dtype": options.dtype,
            "quantization": "nf4",
            "gradient_checkpointing": options.checkpointing,
        },
        "task": {
            "name": "custom",
            "path": str(data.resolve()),
            "prompt": "{text}",
            "completion": " {answer}",
            "max_length": TOKENS,
        },
        "adapter": {"target_modules": "all-linear", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        "method": {
            "name": "weight_lora",
            "keep": max(1, 22 * layers // 32),
            "steps": T,
            "batch_growth": "none",
        },
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": options.ranks,
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "save_every": 1,
        },
        "evaluation": {"samples": 0},
        # Memory counts here, and gathering a layer again is cheap beside computing it. By default DeepSpeed keeps and
        # prefetches layers until 10^9 of their numbers are live, 1.9 GiB: about all of this 4-bit base.
        "deepspeed": {
            "zero_stage": 3,
            "zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
        },
        "report": False,
        "output_dir": str((out / "run").resolve()),
    }
    path = out / "settings.yaml"
    path.write_text(json.dumps(settings, indent=1))
    return path


def show_forecast(model: Path, options: argparse.Namespace) -> None:
    """Print the planner's peaks of each phase, in GiB: for a CPU, every rank's samples as long as the run's."""
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.distributed.world import World
    from sparse_llm_ft.planning.forecast import forecast
    from sparse_llm_ft.planning.opening import open_for_planning
    from sparse_llm_ft.planning.samples import SampleSizes

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = json.loads(write_settings(Path(folder), model.resolve(), options).read_text())
        for prefetching, limits in (("yes", {}), ("no", tree["deepspeed"]["zero_optimization"])):
            config = parse_config(tree | {"deepspeed": {"zero_stage": 3, "zero_optimization": limits}})
            context = open_for_planning(config, World(0, options.ranks, 0, options.ranks))
            samples = dataclasses.replace(SampleSizes.assumed(TOKENS), equal=True)
            for phase in forecast(context, samples=samples, on_gpu=False).phases:
                shown = [phase.lines[key] for key in ("base", "adapters", "optimizer", "kept_for_backward")]
                shown += [
                    phase.lines["gathered_weights"],
                    *(phase.peaks[key] for key in ("load", "step", "change", "save")),
                ]
                rows.append([phase.name, prefetching, *(f"{size / 2**30:.2f}" for size in shown)])
    header = ["base", "adapters", "optimizer", "kept for backward", "gathered between the passes"]
    peaks = ["peak of loading", "of a step", "of the change", "of a save"]
    print_table(["phase", "prefetching", *header, *peaks], rows)


def saved_steps(run: Path) -> int:
    """How many checkpoints the run has."""
    return len([path for path in (run / "checkpoints").glob("*") if path.is_dir()])


def start_ranks(out: Path, settings: Path, ranks: int, floor: float, killed_at: int | None) -> int:
    """Run the ranks to their end, or until memory is short; their status."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(ranks), "--standalone"]
    # What torch frees goes back to the system, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    with (out / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [*command, __file__, "--child", str(out), str(settings), str(killed_at or 0)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while process.poll() is None:
            time.sleep(0.2)
            if _available() < floor * 2**30:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                sys.exit(f"available memory fell below {floor} GiB; what was reached is in {out / 'log.txt'}")
    return process.returncode


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


class Stretches:
    """Divides a rank's time into named stretches, and writes the peak of its memory and the seconds of each."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.name = path, rank, REST
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def switch(self, name: str) -> str:
        """End the present stretch, begin another; the former's name."""
        now, ended = time.perf_counter(), self.name
        line = {
            "rank": self.rank,
            "stretch": ended,
            "seconds": now - self.began,
            "cpu": time.process_time() - self.began_cpu,
            "peak": memory("VmHWM"),
            "stays": memory("VmRSS"),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        restart_peak()
        self.name, self.began, self.began_cpu = name, time.perf_counter(), time.process_time()
        return ended

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A stretch of its own inside another."""
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Make each call of a function or method a stretch."""
        original: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.within(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)


def child(out: str, settings: str, killed_at: str) -> None:
    """Train on this rank as `sparse-llm-ft train` does. Collective."""
    from sparse_llm_ft.cli.main import main as command
    from sparse_llm_ft.engine.engine import Engine
    from sparse_llm_ft.training import phase_training, run

    stretches = Stretches(Path(out) / MARKS, int(os.environ["RANK"]))
    stretches.around(run, "build_model", "load")
    stretches.around(Engine, "__init__", "build the engine")
    stretches.around(Engine, "forward", "forward")
    stretches.around(Engine, "backward", "backward")
    stretches.around(Engine, "step", "update")
    stretches.around(run.Run, "_change_phase", "change phase")
    stretches.around(phase_training.PhaseTraining, "_state", "read state")
    stretches.around(run.Run, "_finish", "export")
    save = phase_training.RunParts.save

    def saving(self: Any, state: Any, protect: int | None = None) -> None:
        with stretches.within("save"):
            save(self, state, protect)
        if state.progress.step == int(killed_at):
            os.kill(os.getpid(), signal.SIGKILL)

    phase_training.RunParts.save = saving  # type: ignore[method-assign]
    command(["train", "--config", settings])


def show(out: Path) -> None:
    """Print every stretch in its order: each rank's peak and what stays of it, in GiB, and rank 0's seconds."""
    lines = [json.loads(line) for line in (out / MARKS).read_text().splitlines()]
    ranks = sorted({line["rank"] for line in lines})
    own = [[line for line in lines if line["rank"] == rank and line["stretch"] != REST] for rank in ranks]
    rows = []
    for of_ranks in zip(*own, strict=False):  # a rank that was killed first has written less
        sizes = [f"{line['peak'] / 2**30:.2f} ({line['stays'] / 2**30:.2f})" for line in of_ranks]
        first = of_ranks[0]
        rows.append([first["stretch"], *sizes, f"{first['seconds']:.1f} ({first['cpu']:.1f})"])
    header = [f"peak (stays) of rank {rank}, GiB" for rank in ranks]
    print_table(["stretch", *header, "seconds (of its core) on rank 0"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
