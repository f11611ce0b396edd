"""How many bytes two ranks of a node read from the disk for one base: `shared_pages.py BASE QUANTIZATION RESULT`.

Rank 0 drops the base's files from the page cache. Then rank 0 loads the base alone, both ranks load it at the same time
with the files dropped again, and both once more with the files in the cache. RESULT-RANK gets what the kernel has read
for the rank in each of the three (/proc/self/io, which counts no bytes that were in the page cache).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.distributed.world import find_world, prepare_cpu
from sparse_llm_ft.engine.engine import init_distributed
from sparse_llm_ft.model.loading import load_model

base, quantization, result = sys.argv[-3:]
WORLD = find_world()
FILES = sorted(Path(base).glob("*.safetensors"))


def drop() -> None:
    """Out of the page cache, from which only pages can go that are on the disk and in no process's memory."""
    if WORLD.rank == 0:
        for file in FILES:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def read_by_loading() -> int:
    """Bytes that the kernel has read from the disk for this process while it loaded the base."""
    before = _read_bytes()
    load_model(ModelConfig(name=base, dtype="bfloat16", quantization=quantization))
    read = _read_bytes() - before
    gc.collect()  # no process has the files mapped when they are dropped
    dist.barrier()
    return read


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


prepare_cpu(WORLD)
init_distributed()
read_by_loading()  # what is read once, such as code
drop()
found = {"alone": read_by_loading() if WORLD.rank == 0 else dist.barrier() or 0}
drop()
found["together"] = read_by_loading()
found["cached"] = read_by_loading()
Path(f"{result}-{WORLD.rank}").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
