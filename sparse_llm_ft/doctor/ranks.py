"""Do processes reach each other? An all-reduce between them, checked and timed.

python -m sparse_llm_ft.doctor.ranks        is one of the processes that `start_ranks` starts
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

from sparse_llm_ft.distributed.world import World, find_world, free_port
from sparse_llm_ft.doctor.findings import Finding, ok, problem, warning

GPU_BYTES, CPU_BYTES = 2**28, 2**24
REPEATS = 5
TIMEOUT = 60.0
"""Seconds until processes that do not answer count as cut off."""
_SLOW = 5e9
_ADVICE = "NCCL_DEBUG=INFO (or TORCH_DISTRIBUTED_DEBUG=DETAIL) says which way it takes; see NCCL_SOCKET_IFNAME"


def all_reduce(world: World) -> dict[str, float | str]:
    """Collective. The backend, and its bus bandwidth in bytes per second (2 (n-1)/n of the bytes, by the median time).

    Raises:
        RuntimeError: a sum is wrong, or a rank does not answer within `TIMEOUT`.
    """
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    backend = "nccl" if gpu else "gloo"
    if gpu:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    values = torch.empty((GPU_BYTES if gpu else CPU_BYTES) // 4, device="cuda" if gpu else "cpu")
    seconds = []
    for _ in range(REPEATS + 1):
        values.fill_(world.rank + 1.0)
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])  # waits for the device
        seconds.append(time.perf_counter() - began)
        if total != world.size * (world.size + 1) / 2:
            raise RuntimeError(f"the sum over ranks is {total}")
    dist.destroy_process_group()
    moved = 2 * (world.size - 1) / world.size * values.numel() * 4
    return {"backend": backend, "bandwidth": moved / statistics.median(seconds[1:])}


def start_ranks(count: int) -> Iterator[Finding]:
    """Start `count` processes on this machine, which sum a tensor."""
    port = str(free_port())
    started = []
    for rank in range(count):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # A torchrun that started this process holds a store, which these must not take for theirs.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")} | world
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", __name__]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    end = time.monotonic() + 2 * TIMEOUT
    outputs = []
    for process in started:
        try:
            outputs.append(process.communicate(timeout=max(1.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            yield problem("ranks", f"{count} processes did not finish a sum in {2 * TIMEOUT:.0f} s", _ADVICE)
            return
    failed = next((i for i, process in enumerate(started) if process.returncode), None)
    if failed is not None:
        lines = outputs[failed][1].strip().splitlines()
        yield problem("ranks", f"rank {failed} of {count} fails: {lines[-1] if lines else 'no output'}", _ADVICE)
        return
    yield judge(json.loads(outputs[0][0].splitlines()[-1]), count)


def judge(measured: dict[str, float | str], count: int) -> Finding:
    """The finding of what `all_reduce` returned."""
    bandwidth = float(measured["bandwidth"])
    text = f"{count} processes sum over {measured['backend']}, {bandwidth / 1e9:.1f} GB/s"
    slow = measured["backend"] == "nccl" and bandwidth < _SLOW
    return warning("ranks", text, f"this is slow for GPUs; {_ADVICE}") if slow else ok("ranks", text)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(all_reduce(find_world())) + "\n")
