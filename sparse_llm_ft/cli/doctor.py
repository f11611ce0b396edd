"""The command `doctor`: one line for each part of this machine that a run would use."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparse_llm_ft.distributed.world import World, find_world
from sparse_llm_ft.doctor import machine, ranks, software
from sparse_llm_ft.doctor.findings import Check, Finding, Level, run_checks
from sparse_llm_ft.errors import UserError


def add_command(commands: Any) -> None:
    """Enter the command among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    doctor = commands.add_parser(
        "doctor",
        help="check this machine; under srun or torchrun all of them. Exit status 0: fine, 1: warnings, 2: a run fails",
    )
    doctor.add_argument("--processes", type=int, help="that sum a tensor; default: one for each GPU, two without one")
    doctor.add_argument("--output", default=".", metavar="FOLDER", help="where runs will write")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    world = find_world()
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes {options.processes}: expected 1 or more")
    if options.processes is not None and world.size > 1:
        raise UserError(f"--processes {options.processes}: expected none, as a launcher has started {world.size}")
    worst = Level.OK
    for finding in _findings(options, world):
        worst = max(worst, finding.level)
        print(finding if world.rank == 0 else f"{socket.gethostname()}: {finding}", flush=True)
    sys.exit(int(worst))


def _findings(options: argparse.Namespace, world: World) -> Iterator[Finding]:
    """All findings, on the first rank of each node; other ranks only take part in the sum."""
    if world.local_rank == 0:
        checks: list[tuple[str, Check]] = [
            ("versions", software.versions),
            ("gpu", machine.gpus),
            ("bf16", machine.cpu_bf16),
            ("memory", machine.memory),
            ("/dev/shm", machine.shared_memory),
            ("output", partial(machine.output_folder, Path(options.output))),
            ("model cache", partial(machine.cache_room, Path(software.cache_folder()))),
            ("deepspeed", software.deepspeed_loads),
            ("4-bit", software.four_bit),
            ("compiler", software.compilers),
            ("hub", software.hub),
            ("slurm", machine.slurm),
        ]
        yield from run_checks(checks)
    yield from run_checks([("ranks", partial(_sum, options.processes, world))])


def _sum(processes: int | None, world: World) -> Iterator[Finding]:
    if world.size == 1:
        yield from ranks.start_ranks(processes or _default_processes())
        return
    found = ranks.judge(ranks.all_reduce(world), world.size)
    if world.rank == 0:
        yield found


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2
