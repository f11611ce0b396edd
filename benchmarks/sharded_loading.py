"""What loading a base costs each rank at ZeRO stage 3: whole, then cut by DeepSpeed; or cut while it is read.

    python benchmarks/sharded_loading.py [--hidden 1536] [--layers 12] [--ranks 1 2 4]

The benchmark writes a random Llama into a temporary folder in several files. For every way, type and number of ranks it
starts new processes. Each prints, in MiB: the peak of its resident memory while loading and what stays of it, both
above what it held before (VmHWM and VmRSS: pages of mapped files count, shared ones on every rank); the bytes of its
parameters; the checkpoint's largest tensor; and what it read from files by read calls and through maps.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import argument_parser, engine_settings, memory, random_llama, restart_peak, start

SHARD_SIZE = "150MB"


def main() -> None:
    """Write the model, start the processes, print a table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--bases", nargs="+", default=["nf4", "none"])
    parser.add_argument("--ways", nargs="+", default=["whole", "sharded"])
    settings = parser.parse_args()
    print("base  loading   ranks  rank    peak  stays  shard  largest   read  mapped  seconds")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), settings.hidden, settings.layers)
        for quantization in settings.bases:
            for way in settings.ways:
                for ranks in settings.ranks:
                    measure(folder, quantization, way, ranks)


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama of random bfloat16 weights, in files of at most `SHARD_SIZE`."""
    model = random_llama(16000, hidden, hidden * 8 // 3, layers, hidden // 64, hidden // 256)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def measure(folder: str, quantization: str, way: str, ranks: int) -> None:
    """Start the processes and print a line for each."""
    # Freed memory goes back to the system at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node", str(ranks), "--standalone", __file__]
    result = subprocess.run(
        [*map(str, command), "--child", folder, quantization, way],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or len(lines) != ranks:
        sys.exit(result.stderr[-4000:])
    for line in sorted(lines, key=lambda entry: entry["rank"]):
        keys = ("peak", "stays", "shard", "largest", "read", "mapped")
        peak, stays, shard, largest, read, mapped = (f"{line[key] / 2**20:.0f}" for key in keys)
        print(
            f"{quantization:5} {way:8} {ranks:6} {line['rank']:5} {peak:>7} {stays:>6} {shard:>6} {largest:>8} "
            f"{read:>6} {mapped:>7} {line['seconds']:8.1f}",
            flush=True,
        )


def child(folder: str, quantization: str, way: str) -> None:
    """Load on this rank and print what it took, in bytes. Collective."""
    world = start()
    import deepspeed
    import torch
    import torch.distributed as dist
    from safetensors import safe_open

    from sparse_llm_ft.config import ModelConfig
    from sparse_llm_ft.engine.engine import process_group
    from sparse_llm_ft.engine.sharded_loading import load_sharded_model
    from sparse_llm_ft.model.loading import load_model

    def load(model: str) -> Any:
        config = ModelConfig(name=model, dtype="bfloat16", quantization=quantization)  # type: ignore[arg-type]
        settings = engine_settings(3).to_deepspeed()
        if way == "sharded":
            return load_sharded_model(config, settings)
        whole = load_model(config)
        deepspeed.zero.Init(module=whole, config_dict_or_path=settings)  # as an engine does when it is built
        return whole

    with process_group():
        warm_up(load, Path(folder), world.rank)
        gc.collect()
        before, read_before, began = memory("VmRSS"), read_calls(), time.perf_counter()
        restart_peak()
        model = load(folder)
        peak, seconds = memory("VmHWM"), time.perf_counter() - began
        gc.collect()
        shard = sum(getattr(p, "ds_tensor", p).nbytes for p in model.parameters())
        sizes = {}
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    sizes[name] = 2 * torch.Size(stored.get_slice(name).get_shape()).numel()
        read = read_calls() - read_before
        dist.barrier()
        line = {"rank": world.rank, "peak": peak - before, "stays": memory("VmRSS") - before, "shard": shard}
        line |= {"largest": max(sizes.values()), "read": read, "mapped": sum(sizes.values()) if way == "whole" else 0}
        sys.stdout.write(json.dumps(line | {"seconds": seconds}) + "\n")
        sys.stdout.flush()


def warm_up(load: Any, folder: Path, rank: int) -> None:
    """Load a tiny model first: libraries, tables and connections are not part of the measurement. Collective."""
    import torch.distributed as dist

    tiny = folder / "tiny"
    if rank == 0 and not tiny.exists():
        write_model(tiny, 256, 1)
    dist.barrier()
    load(str(tiny))


def read_calls() -> int:
    """Bytes that read calls returned, including those from sockets and pipes."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
