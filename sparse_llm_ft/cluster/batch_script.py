"""From options to a batch script: `run.sbatch.template` beside this file, filled in."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from sparse_llm_ft.cluster.job_folder import MOST_JOBS
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import JOB_FOLDER

Launcher = Literal["srun", "deepspeed", "torchrun"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)

CONFIG_NAME, SCRIPT_NAME, RUNS_NAME = "config.yaml", "run.sbatch", "runs"
"""In the job's folder: a run's settings, the batch script, and how the names of a sweep's listings begin."""

_TIME = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<parts>[0-9]+(?::[0-9]+){0,2})")
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_MOUNTED = re.compile(r"/[^\s:,]+")
_IMAGE = re.compile(r"(?:\./|/).+|(?:[a-z]+://)?(?:[^@#\s]+@)?(?:[^#/\s]+#)?[A-Za-z0-9/._:@-]+")
_HOST = re.compile(r"[^/#]*[.:][^/#]*/.+")  # docker's REGISTRY/IMAGE, which enroot looks for on Docker Hub
_HEAD = r"""head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Another one after a requeue: the first may be what another program has.
port=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 12000))"""
_PATIENT = """# After SIGTERM it would kill, in 30 s, whoever still saves its step. Slurm says when it is too late.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"""
_DEAF = "# This launcher would die of USR2. Ignored by it, the signal still reaches the handlers of its processes."


class _Template(string.Template):
    """``<word>`` is filled in; the shell keeps its dollars."""

    delimiter = "<"
    pattern: ClassVar[Any] = r"<(?P<braced>[a-z_]+)>|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!))"


@dataclass(frozen=True)
class JobOptions:
    """What a job asks Slurm for.

    Attributes:
        gpus_per_node: 0 on a cluster without GPUs.
        tasks_per_node: processes; one per GPU.
        cpus_per_task: cores of a process.
        time: as Slurm writes it, such as ``12:00:00`` or ``2-12``.
        leave_before: seconds before the time limit at which the run is asked to save and leave.
        chain: 0 requeues the job itself; N submits N jobs, each after the one before.
        sbatch: further options of sbatch, such as ``--mem=0``.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    time: str
    leave_before: int = 300
    partition: str | None = None
    account: str | None = None
    cpus_per_task: int | None = None
    container: str | None = None
    launcher: Launcher = "srun"
    chain: int = 0
    sbatch: tuple[str, ...] = ()

    @property
    def processes_per_task(self) -> int:
        """Of a task of Slurm: torchrun and deepspeed are one task on each node, and start its processes."""
        return 1 if self.launcher == "srun" else self.tasks_per_node

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return self.nodes * self.tasks_per_node

    def check(self) -> None:
        """Refuse what Slurm would refuse, or what would end in the middle of a job.

        Raises:
            UserError: naming the option.
        """
        for name, value, least, most in (
            ("--nodes", self.nodes, 1, 10**6),
            ("--gpus-per-node", self.gpus_per_node, 0, 10**6),
            ("--cpus-per-task", self.cpus_per_task, 1, 10**6),
            ("--leave-before", self.leave_before, 1, 10**6),
            ("--chain", self.chain, 0, MOST_JOBS),
        ):
            if value is not None and not least <= value <= most:
                expected = f"{least} or more" if value < least else f"{most} or less"
                raise UserError(f"{name} {value}: expected {expected}")
        if self.tasks_per_node < 1:
            raise UserError("--gpus-per-node 0: expected --tasks-per-node beside it, the processes of a CPU node")
        if self.gpus_per_node not in (0, self.tasks_per_node):
            raise UserError(
                f"--tasks-per-node {self.tasks_per_node}: expected {self.gpus_per_node}, one process per GPU, "
                "or no such option"
            )
        limit = seconds_of(self.time)
        if limit <= self.leave_before + 60:  # Slurm sends the signal up to a minute early
            raise UserError(
                f"--time {self.time}: {limit} s, and the run leaves {self.leave_before} s before the limit; expected "
                "a longer time, or --leave-before with fewer seconds"
            )
        for option, text in (("--partition", self.partition), ("--account", self.account)):
            if text is not None and not _PLAIN.fullmatch(text):
                raise UserError(f"{option} {text}: expected a name")
        if self.container is not None:
            _check_image(self.container)
            if self.launcher != "srun":
                raise UserError(f"--container {self.container}: expected --launcher srun, which starts it")
        for text in self.sbatch:
            if not text.startswith("-") or not text.isprintable():
                raise UserError(f"--sbatch {text}: expected an option of sbatch, as in --sbatch=--mem=0")


def _check_image(image: str) -> None:
    """Refuse what enroot would refuse, or look for in another registry, minutes later on the nodes.

    Source: pyxis's `--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH`, enroot's doc/cmd/import.md.

    Raises:
        UserError: what would be right.
    """
    if not _IMAGE.fullmatch(image):
        raise UserError(f"--container {image!r}: expected [REGISTRY#]IMAGE[:TAG], or the path of a .sqsh file")
    if image.startswith(("/", "./")):
        if not Path(image).is_file():
            raise UserError(f"--container {image}: no such file; expected one that all nodes see, or an image's name")
    elif "://" not in image and _HOST.fullmatch(image):
        registry, _, name = image.partition("/")
        raise UserError(f"--container {image}: enroot would look on Docker Hub; expected {registry}#{name}")


def seconds_of(time: str) -> int:
    """Seconds of a time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        UserError: it is none of these.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time}: expected HH:MM:SS, D-HH, or minutes, as in 12:00:00")
    days, parts = match["days"], [int(part) for part in match["parts"].split(":")]
    if days is not None:  # hours come first
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:  # minutes
        parts.append(0)
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + part
    return int(days or 0) * 86400 + seconds


def check_path(folder: Path) -> None:
    """Refuse a folder whose name sbatch would read as something else.

    Raises:
        UserError: naming it.
    """
    if not _PLAIN.fullmatch(str(folder)):
        raise UserError(f"output_dir: {str(folder)!r} has spaces or signs that sbatch reads otherwise; expected none")


def runs_name(listing: str) -> str:
    """Where a sweep's `listing` of run folders lies in the job's folder. Each has a file of its own: the tasks of an
    earlier sweep in the same folder, which may begin later, read theirs.
    """
    return f"{RUNS_NAME}-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


_REQUEUE = """\
if [ "$status" -eq 75 ]; then
  job=$SLURM_JOB_ID  # of one task of an array this is the array's own number, which stands for all of its tasks
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  # More than once: Slurm's controller may be busy, or away for a moment.
  for pause in 5 20 60 0; do scontrol requeue "$job" && exit; sleep "$pause"; done
fi"""


def render(
    options: JobOptions,
    folder: Path,
    tasks: int = 0,
    mounts: Sequence[Path] = (),
    runs: str = RUNS_NAME,
    submission: str = "",
) -> str:
    """The batch script of a run, or of a sweep's array.

    Args:
        folder: the run's output_dir; of a sweep the folder that holds the runs. Absolute.
        tasks: of the array; 0: a single run.
        mounts: folders that a container must see.
        runs: of an array: the file in the job's folder that lists the run folders.
        submission: the mark of this `submit` (see `attempts.begin`); empty: the script may be submitted at any time.
    """
    check_path(folder)
    job = folder / JOB_FOLDER
    pattern, name = ("%A_%a", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID") if tasks else ("%j", "$SLURM_JOB_ID")
    run = f'$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {job / runs})' if tasks else str(folder)
    lines = [
        options.gpus_per_node and f"gpus-per-node={options.gpus_per_node}",
        options.partition and f"partition={options.partition}",
        options.account and f"account={options.account}",
        options.cpus_per_task and f"cpus-per-task={options.cpus_per_task * options.processes_per_task}",
        tasks and f"array=0-{tasks - 1}",
    ]
    template = _Template(files("sparse_llm_ft.cluster").joinpath("run.sbatch.template").read_text(encoding="utf-8"))
    return template.substitute(
        name=re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name)[:60],
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node // options.processes_per_task,
        time=options.time,
        leave_before=options.leave_before,
        log=job / f"{pattern}.log",
        requeue="no-requeue" if options.chain else "requeue",
        options="\n".join(
            [*(f"#SBATCH --{line}" for line in lines if line), *(f"#SBATCH {o}" for o in options.sbatch)]
        ),
        python=shlex.quote(sys.executable),
        submission=submission,
        run=run,
        config=f"$run/{JOB_FOLDER}/{CONFIG_NAME}",
        launch=_launch(options, mounts),
        log_file=f'"{job}/{name}.log"',
        again="# The next job of the chain tries again." if options.chain else _REQUEUE,
    )


def _launch(options: JobOptions, mounts: Sequence[Path]) -> str:
    """The lines that start the run's processes."""
    srun = "srun --kill-on-bad-exit=1 "
    train = '-m sparse_llm_ft train --config "$config"'
    if options.container is not None:
        hub = cache_folders()
        mounted = list(dict.fromkeys([*mounts, *hub]))
        for path in mounted:
            if not _MOUNTED.fullmatch(str(path)):
                raise UserError(f"--container: {str(path)!r} has signs that pyxis reads otherwise; expected none")
        inside = ",".join(f"{path}:{path}" for path in mounted)
        image = shlex.quote(f"--container-image={options.container}")
        seen = shlex.quote(f"--container-mounts={inside}")
        return f"""{_HEAD}
# An image has no scontrol with which ranks could find the first node, and its home is not this one.
export MASTER_ADDR=$head MASTER_PORT=$port HF_HOME={shlex.quote(str(hub[0]))}
{srun}{image} {seen} --no-container-entrypoint \\
  python3 {train}"""
    if options.launcher == "srun":
        return f'{srun}"$python" {train}'
    count = options.tasks_per_node
    if options.launcher == "torchrun":
        return f"""{_HEAD}
{_PATIENT}
{_DEAF}
{srun}bash -c 'trap "" USR2; exec "$0" -m torch.distributed.run "$@"' "$python" \\
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {count} --rdzv-id "$SLURM_JOB_ID" \\
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" {train}"""
    return f"""{_HEAD}
{_DEAF}
hosts=$run/{JOB_FOLDER}/hostfile
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots={count}/" > "$hosts"
{srun}bash -c 'trap "" USR2; exec "$0" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "$@"' "$python" \\
  --no_ssh --hostfile "$hosts" --master_addr "$head" --master_port "$port" --module {train.removeprefix("-m ")}"""


def cache_folders() -> list[Path]:
    """Where models, data and samples are cached: HF_HOME as huggingface_hub finds it, then what is set besides."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    others = [value for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE") if (value := os.environ.get(name))]
    return [Path(folder).expanduser().absolute() for folder in (home, *others)]
