"""Checks of the machine: GPUs, processor, memory, disks, locks, Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparse_llm_ft.doctor.findings import Finding, ok, problem, warning
from sparse_llm_ft.io.folder_lock import FolderLock

GIB = 2**30
_ROOM, _SHARED_MEMORY, _CACHE = 10 * GIB, GIB, 20 * GIB


def gpus() -> Iterator[Finding]:
    """Each GPU with its memory and what it computes in, and whether torch and the driver fit."""
    import torch

    if not torch.cuda.is_available():
        smi = shutil.which("nvidia-smi")
        if smi is None:
            yield warning("gpu", "none", "training runs on the CPU, which is for small models and tests")
        else:
            built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
            yield problem(
                "gpu", f"nvidia-smi is here, but torch finds no GPU ({built})", "install torch for the driver's CUDA"
            )
        return
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]
    yield ok("gpu driver", f"{driver or 'version unknown'}, torch's CUDA {torch.version.cuda}")
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        text = f"{i}: {torch.cuda.get_device_name(i)}, {total / GIB:.0f} GiB, {free / GIB:.0f} free"
        if free < 0.9 * total:
            yield warning("gpu", text, "another process uses it")
        else:
            yield ok("gpu", text)
    if not torch.cuda.is_bf16_supported():
        yield warning("bf16", "this GPU emulates it", "set model.dtype: float32")


def cpu_bf16() -> Iterator[Finding]:
    """Whether the processor multiplies bfloat16 itself; without, it is many times slower than float32."""
    import torch

    if torch.cuda.is_available():
        return
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    kinds = [kind for kind in ("avx512_bf16", "amx_bf16", "bf16") if f" {kind}" in flags]
    if kinds:
        yield ok("bf16", f"the processor has {kinds[0]}")
    else:
        yield warning("bf16", "this processor does not multiply it", "set model.dtype: float32, far faster here")


def memory() -> Iterator[Finding]:
    """Host memory, and the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text.isdecimal() and int(text) < total:
        yield ok("memory", f"{int(text) / GIB:.0f} GiB for this container, of {total / GIB:.0f}")
    else:
        yield ok("memory", f"{total / GIB:.0f} GiB")


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which NCCL and data loaders of one node talk."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield warning("/dev/shm", "missing", "NCCL talks between GPUs of a node through it")
        return
    size = shutil.disk_usage(folder).total
    advice = "give the container more, such as docker run --shm-size=8g"
    yield _enough("/dev/shm", size, _SHARED_MEMORY, f"{size / GIB:.1f} GiB", advice)


def output_folder(folder: Path) -> Iterator[Finding]:
    """A folder for runs: that it can be written, its room, its locks, that its renames are atomic, and the umask."""
    existing = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield problem("output", f"{existing} cannot be written", "choose another folder")
        return
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.0f} GiB free at {existing}"
    yield _enough("disk", free, _ROOM, text, "checkpoints of a run take a few GiB")
    with tempfile.TemporaryDirectory(dir=existing, prefix=".doctor-") as name:
        lock = FolderLock(Path(name))
        lock.acquire()
        by_kernel = not lock.owner.exists()
        lock.release()
        written = Path(name) / "file"
        written.write_text("x")
        written.replace(Path(name) / "renamed")
    if by_kernel:
        yield ok("file locks", f"{_file_system(existing)} has them")
    else:
        yield ok("file locks", f"{_file_system(existing)} has none; a file with a heartbeat takes their place")
    mask = os.umask(0o022)
    os.umask(mask)
    yield ok("umask", f"{mask:03o}")


def cache_room(folder: Path) -> Iterator[Finding]:
    """Room for models from the hub."""
    existing = next(part for part in (folder, *folder.parents) if part.exists())
    free = shutil.disk_usage(existing).free
    advice = "a model of 8B takes 16 GiB; set HF_HOME to a larger disk"
    yield _enough("model cache", free, _CACHE, f"{free / GIB:.0f} GiB free for {folder}", advice)


def slurm() -> Iterator[Finding]:
    """Slurm's version and partitions, where it is installed."""
    if shutil.which("sbatch") is None:
        yield ok("slurm", "not installed here")
        return
    version = _output(["sinfo", "--version"])
    partitions = " ".join(_output(["sinfo", "-h", "-o", "%P(%l)"]).split())
    if not partitions:
        yield warning("slurm", f"{version or 'installed'}, but sinfo lists no partition", "is the controller up?")
    else:
        yield ok("slurm", f"{version}: {partitions}")


def _enough(subject: str, size: int, least: int, text: str, advice: str) -> Finding:
    """Fine from `least` bytes on."""
    return warning(subject, text, advice) if size < least else ok(subject, text)


def _file_system(folder: Path) -> str:
    return _output(["stat", "-f", "-c", "%T", str(folder)]) or "the file system"


def _output(command: list[str]) -> str:
    """What a command prints; empty if it is missing, fails or takes over ten seconds."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
