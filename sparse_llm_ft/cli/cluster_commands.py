"""The commands `submit`, `status`, `cancel`, and `attempt`, which batch scripts call. Imports no torch itself."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparse_llm_ft.cli.plan_command import add_gpu_memory, gpu_memory
from sparse_llm_ft.cluster import attempts, slurm
from sparse_llm_ft.cluster.batch_script import LAUNCHERS, JobOptions
from sparse_llm_ft.cluster.cancel import cancel
from sparse_llm_ft.cluster.status import RunView, find_runs, view_runs
from sparse_llm_ft.cluster.submission import Submission
from sparse_llm_ft.cluster.sweep import combinations
from sparse_llm_ft.config import RunConfig, load_config, split_arguments
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import UserError, may_pass, one_line
from sparse_llm_ft.io.console import Console, clock
from sparse_llm_ft.run_folder import RunFolder

WATCH_SECONDS = 5.0

Check = Callable[[RunConfig, World, int | None, bool], list[str]]
"""What `sparse-llm-ft check` does, for these processes, bytes of a GPU, and with or without GPUs; returns its lines."""


def add_commands(commands: Any, check: Check) -> None:
    """Enter the commands among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        check: run on the settings of every run before it is submitted.
    """
    submit = commands.add_parser("submit", help="check a run, or a sweep of runs, and submit it to Slurm")
    submit.add_argument("--config", nargs="+", required=True, metavar="FILE", help="as of `train`, overrides too")
    submit.add_argument("settings", nargs="*", metavar="SECTION.KEY=VALUE", help="wins over the files")
    submit.add_argument("--nodes", type=int, default=1, metavar="N")
    submit.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="one process each; 0: CPUs alone")
    submit.add_argument("--tasks-per-node", type=int, metavar="N", help="processes of a node without GPUs")
    submit.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of a process")
    add_gpu_memory(submit, "refuse a run that does not fit")
    submit.add_argument("--time", required=True, metavar="HH:MM:SS", help="time limit; a run that needs more goes on")
    submit.add_argument("--leave-before", type=int, default=300, metavar="SECONDS", help="to save before the limit")
    submit.add_argument("--partition", metavar="NAME")
    submit.add_argument("--account", metavar="NAME")
    submit.add_argument("--container", metavar="IMAGE", help="run in this image (pyxis: --container-image)")
    submit.add_argument("--launcher", choices=LAUNCHERS, default="srun", help="what starts a node's processes")
    submit.add_argument("--chain", type=int, default=0, metavar="N", help="N jobs in a row, where requeue is forbidden")
    submit.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="further, as --sbatch=--mem=0")
    submit.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE", help="one job array")
    submit.add_argument("--dry-run", action="store_true", help="check and print the batch script; submit nothing")
    submit.set_defaults(command=lambda options: _submit(options, check), rest="settings", without_torch=True)

    status = commands.add_parser("status", help="list the runs below a folder: state, step, loss, time left")
    status.add_argument("folders", nargs="*", default=[], metavar="DIR", help="default: the current folder")
    status.add_argument("--watch", action="store_true", help="refresh until no run is pending or running")
    status.set_defaults(command=_status, without_torch=True)

    stop = commands.add_parser("cancel", help="let a run save its step and leave, and cancel its job")
    stop.add_argument("run", metavar="RUN", help="a run's output_dir")
    stop.set_defaults(command=_cancel, without_torch=True)

    attempt = commands.add_parser("attempt", help="for batch scripts: record how a job's attempt begins and ends")
    attempt.add_argument("moment", choices=("begin", "end"))
    attempt.add_argument("run", metavar="RUN", help="a run's output_dir")
    attempt.add_argument("--submission", default="", metavar="MARK", help="of begin: the mark of the job's `submit`")
    attempt.add_argument("--status", type=int, default=1, metavar="N", help="of end: exit status of the launcher")
    attempt.add_argument("--log", metavar="FILE", help="of end: the job's log, which names dead nodes")
    attempt.set_defaults(command=_attempt, without_torch=True)


def _submit(options: argparse.Namespace, check: Check) -> None:
    """Check, render, submit. What a second suffices for comes first."""
    files, overrides = split_arguments(options.config)
    overrides += options.settings
    asked = JobOptions(
        options.nodes,
        options.gpus_per_node,
        options.gpus_per_node if options.tasks_per_node is None else options.tasks_per_node,
        options.time,
        options.leave_before,
        options.partition,
        options.account,
        options.cpus_per_task,
        options.container,
        options.launcher,
        options.chain,
        tuple(options.sbatch),
    )
    asked.check()
    memory = gpu_memory(options)
    if not options.dry_run:
        _check_cluster(options.partition)
    base = load_config(files, overrides)
    folder = Path(base.output_dir).absolute()
    chosen = combinations(options.sweep) or [("", ())]
    runs = [load_config(files, [*overrides, *more, f"output_dir={folder / name}"]) for name, more in chosen]
    submission = Submission(folder, runs, asked, bool(options.sweep))
    submission.check()
    for config in submission.runs:
        world = World(0, asked.processes, 0, asked.processes // asked.nodes)
        lines = check(config, world, memory, asked.gpus_per_node > 0)
        if options.sweep:
            print(f"{config.output_dir}: {lines[0]}")
        else:
            print(*lines, sep="\n")
    if options.dry_run:
        print(submission.script(), end="")
        return
    print(*submission.next_steps(submission.submit()), sep="\n")


def _check_cluster(partition: str | None) -> None:
    """Refuse a partition that does not exist, and a host without Slurm.

    Raises:
        UserError: which partitions there are.
    """
    known = slurm.partitions()
    for name in (partition or "").split(","):
        if name and name not in known:
            raise UserError(f"--partition {name}: unknown; expected one of {', '.join(sorted(known))}")


def _status(options: argparse.Namespace) -> None:
    roots = [Path(folder) for folder in options.folders or ["."]]

    def look() -> list[RunView]:
        return view_runs([folder for root in roots for folder in find_runs(root)])

    views = look()
    if not views:
        raise UserError(f"{', '.join(map(str, roots))}: no run below; expected a folder that holds runs")
    console = Console(rank=0).rich
    live = Live(console=console, auto_refresh=False) if options.watch and console.is_terminal else None
    with live or nullcontext():
        while True:
            if live is None:  # a file gets one listing after the other
                console.print(_listing(views))
            else:
                live.update(_listing(views), refresh=True)
            if not (options.watch and any(view.is_alive for view in views)):
                return
            time.sleep(WATCH_SECONDS)
            views = look()


def _listing(views: list[RunView]) -> Group:
    """A table of the runs, and a line about each that has something to say."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "loss", "tokens/s", "left", "GPU-hours"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    notes = []
    for view in views:
        name, state = _short(view.folder.path), view.state
        if state is None:
            table.add_row(Text(name), view.word)
        else:
            runs = state.state == "running"
            table.add_row(
                Text(name),
                view.word,
                f"{state.step}/{state.total_steps}" if state.total_steps else "",
                "" if state.loss is None else f"{state.loss:.4f}",
                "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
                clock(state.seconds_left) if runs and state.seconds_left is not None else "",
                f"{state.gpu_hours:.2f}" if state.gpu_hours else "",
            )
        said = "; ".join(filter(None, [view.note, state.message if state is not None else ""]))
        if said:
            job = f" (job {view.job_id})" if view.job_id else ""
            notes.append(Text(f"{name}{job}: {said}"))
    return Group(table, *notes)


def _short(path: Path) -> str:
    """The path as it is typed here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def _cancel(options: argparse.Namespace) -> None:
    path = Path(options.run)
    folder = next(find_runs(path), None)
    if folder is None or folder.path != path:
        raise UserError(f"{path}: not a run's output_dir; expected one, as `sparse-llm-ft status` lists them")
    print(cancel(folder))


def _attempt(options: argparse.Namespace) -> None:
    if not options.run:
        raise UserError("attempt: no run folder; expected the output_dir of this job's run")
    folder = RunFolder(options.run)

    def ask() -> attempts.Verdict:
        if options.moment == "begin":
            return attempts.begin(folder, submission=options.submission)
        return attempts.end(folder, options.status, None if options.log is None else Path(options.log))

    try:
        verdict = _patiently(ask)
    except OSError as error:
        raise UserError(
            f"{folder.path}: its state cannot be kept ({error}); expected a disk that can be written"
        ) from None
    print(verdict.line, flush=True)
    raise SystemExit(verdict.status)


_PAUSES = (5.0, 20.0, 60.0)
"""Seconds before a file server that is away is asked again: without the verdict the job would end for good."""


def _patiently(ask: Callable[[], attempts.Verdict]) -> attempts.Verdict:
    for pause in _PAUSES:
        try:
            return ask()
        except (OSError, UserError) as error:
            if not may_pass(error):
                raise
            print(one_line(f"{error}; asking again in {pause:.0f} s"), flush=True)
            time.sleep(pause)
    return ask()
