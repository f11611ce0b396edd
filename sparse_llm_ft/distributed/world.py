"""Rank and world size of this process, under any launcher."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from sparse_llm_ft.errors import TrainingError, UserError, reason_of


@dataclass(frozen=True)
class World:
    """This process's rank and the number of processes, in all and on this node."""

    rank: int
    size: int
    local_rank: int
    local_size: int


ONE_PROCESS = World(0, 1, 0, 1)
"""A single process without a launcher."""


def find_world(environment: MutableMapping[str, str] = os.environ) -> World:
    """Read the environment of deepspeed, torchrun or srun, and complete it for torch.distributed.

    Without a launcher the world has one process. srun says all but where rank 0 is: see `set_rendezvous`.

    Raises:
        UserError: a variable is no number, or the rank is none of the world's.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_RANK", "0")
    elif (
        "SLURM_STEP_NUM_TASKS" in environment and _number(environment, "SLURM_STEP_NUM_TASKS") > 1
    ):  # srun sets it; the batch script itself is not a step
        _from_slurm(environment)
    else:
        environment.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if "LOCAL_SIZE" in environment:  # the deepspeed launcher's
        environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
    rank, size, local_rank = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size:
        raise UserError(f"RANK: {rank}, and WORLD_SIZE is {size}; expected 0 to {size - 1}, as launchers set them")
    if environment.get("LOCAL_WORLD_SIZE"):
        return World(rank, size, local_rank, _number(environment, "LOCAL_WORLD_SIZE"))
    return World(rank, size, local_rank, int(_slurm_local_size(environment) or size))


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not re.fullmatch("[0-9]+", text):
        raise UserError(f"{name}: {text!r} in the environment; expected a number, as launchers set it")
    return int(text)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This node as Slurm calls it, or its host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def prepare_cpu(world: World) -> None:
    """On a node without GPU, tell DeepSpeed so and divide the cores among the node's processes.

    Otherwise every process would start one thread per core, and they would slow each other down. OMP_NUM_THREADS wins
    where the user has set it. Call before importing deepspeed.
    """
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(own_cores(len(os.sched_getaffinity(0)), world.local_size))


def own_cores(usable: int, processes: int, environment: Mapping[str, str] = os.environ) -> int:
    """Cores of a process that may run on `usable` ones, and has a node with `processes` in all. Where srun has bound
    each of its tasks to cores of their own (``SLURM_CPUS_ON_NODE`` counts the job's), all usable ones are.
    """
    of_job = environment.get("SLURM_CPUS_ON_NODE", "")
    bound = "SLURM_STEP_NUM_TASKS" in environment and of_job.isdigit() and usable * processes <= int(of_job)
    return usable if bound else max(1, usable // processes)


def _from_slurm(environment: MutableMapping[str, str]) -> None:
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")


def set_rendezvous(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let srun's tasks find rank 0: set MASTER_ADDR and MASTER_PORT where nobody has. Other launchers set both.

    Raises:
        UserError: scontrol, which knows the nodes' addresses, is missing (in a container) or fails.
        TrainingError: Slurm's controller is away.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1 or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        first = _scontrol("show", "hostnames", nodes).split()[0]
        # A node's name may not resolve; Slurm itself connects to its NodeAddr.
        address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
        environment["MASTER_ADDR"] = address[1] if address else first
    # All tasks must choose the same free port without communicating: derive it from the job. It lies below 32768, from
    # where on Linux gives ports to outgoing connections, whichever process opens them.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 12000))


_PAUSES = (2.0, 10.0, 30.0)
"""Seconds before Slurm's controller is asked again: every task of a job asks it at once."""

_AWAY = re.compile("contact slurm controller|[Tt]imed out|[Cc]onnection|Zero Bytes|temporarily")
"""In what scontrol says of a controller that is busy or away."""


def _scontrol(*arguments: str) -> str:
    reason = ""
    for pause in (0.0, *_PAUSES):
        time.sleep(pause)
        try:
            command = ["scontrol", *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        except FileNotFoundError:
            raise UserError(
                "scontrol: not found, so ranks cannot find the first node; expected MASTER_ADDR, exported before srun "
                "(an image has no scontrol)"
            ) from None
        except subprocess.TimeoutExpired:
            reason = "no answer"
        except subprocess.CalledProcessError as error:
            reason = reason_of(error.stderr)
            if not _AWAY.search(error.stderr):
                raise UserError(f"scontrol: {reason}; expected MASTER_ADDR, exported before srun") from None
    raise TrainingError(f"scontrol: {reason}; Slurm's controller may be away")


def _slurm_local_size(environment: MutableMapping[str, str]) -> str | None:
    """``SLURM_STEP_TASKS_PER_NODE`` looks like ``2(x3),1``; the first number stands for all nodes."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return tasks.split(",")[0].split("(")[0] or None


def free_port() -> int:
    """A port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
