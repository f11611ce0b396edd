"""`sparse-llm-ft`: train, and the commands for before and after a run. `launch/train.py` is its `train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from sparse_llm_ft import __version__
from sparse_llm_ft.cli.check_adapter import add_command as add_check_adapter
from sparse_llm_ft.cli.cluster_commands import add_commands as add_cluster_commands
from sparse_llm_ft.cli.doctor import add_command as add_doctor
from sparse_llm_ft.cli.fetch import add_command as add_fetch
from sparse_llm_ft.cli.plan_command import add_command as add_plan
from sparse_llm_ft.cli.plan_command import add_gpu_memory, check_memory, gpu_memory
from sparse_llm_ft.cli.run_commands import add_commands
from sparse_llm_ft.config import RunConfig, load_config, split_arguments
from sparse_llm_ft.distributed.exit_status import Parser, one_line_errors
from sparse_llm_ft.distributed.signals import catch_signals, output_gone
from sparse_llm_ft.distributed.world import ONE_PROCESS, World, find_world, prepare_cpu, set_rendezvous
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.console import Console, ended_by_reader, escape_unencodable, silence_libraries
from sparse_llm_ft.io.output import outlived
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.run_folder import RunFolder

_DEBUG = "--debug"
_IMPORTING = "importing torch, transformers and deepspeed"
"""It takes up to half a minute."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run one command; a user error is one line and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug, arguments = _DEBUG in arguments, [argument for argument in arguments if argument != _DEBUG]
    own = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if own and own[0].startswith("--config"):  # a launcher starts the module with a run's settings
        arguments = ["train", *own]
    # Launchers start only these; the others may run anywhere, also in the shell of an allocation.
    launched = {"train", "derive", "evaluate", "doctor"} & set(arguments[:2])
    world = ONE_PROCESS
    if launched:
        with one_line_errors(world, debug):
            world = find_world()
    # A run goes on until its step is saved; the other commands are done when nobody reads what they print.
    resumes = bool({"train", "derive"} & launched)
    printing = outlived(output_gone) if resumes else nullcontext()
    escape_unencodable()
    with ended_by_reader(), printing, one_line_errors(world, debug, resumes):
        options = _parse(arguments)
        if launched:
            set_rendezvous()
        if options.command is _train:
            _train(options, world)
            return
        silence_libraries()
        if not getattr(options, "without_torch", False):  # torch takes seconds: these do without, or import it later
            prepare_cpu(world)
        options.command(options)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="sparse-llm-ft", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(_DEBUG, action="store_true", help="show the stack behind an error's line; for any command")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train adapters, under deepspeed (--module sparse_llm_ft), torchrun (-m), srun, or alone"
    )
    train.add_argument("--config", nargs="+", required=True, metavar="FILE", help="YAML files, later ones win")
    train.add_argument("settings", nargs="*", metavar="SECTION.KEY=VALUE", help="wins over the files")
    train.add_argument("--local_rank", help=argparse.SUPPRESS)
    train.set_defaults(command=_train, rest="settings")
    check = commands.add_parser(
        "check", help="check settings and data, and show the plan a run would begin with and the memory it would need"
    )
    check.add_argument("--config", nargs="+", required=True, metavar="FILE")
    check.add_argument("--processes", type=int, default=1, help="how many processes the run will have")
    add_gpu_memory(check, "refuse a run that does not fit")
    check.set_defaults(command=_check, without_torch=True)
    summary = commands.add_parser("summary", help="show the table of a finished run")
    summary.add_argument("run", metavar="RUN", help="a run's output_dir")
    summary.set_defaults(command=_summary, without_torch=True)
    add_plan(commands)
    add_commands(commands)
    add_check_adapter(commands)
    add_doctor(commands)
    add_fetch(commands, _check_run)
    add_cluster_commands(commands, _check_run)
    derive = commands.add_parser(
        "derive", help="derive the ratios of method partial_lora alone; a later run with these settings finds them"
    )
    derive.add_argument("--config", nargs="+", required=True, metavar="FILE")
    derive.set_defaults(command=_derive, without_torch=True)
    report = commands.add_parser("report", help="draw pictures of a run, or compare several in one table")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's output_dir; it need not be finished")
    report.add_argument("--output", metavar="FOLDER", help="default: RUN/report for one run, report for several")
    report.set_defaults(command=_report)
    tasks = commands.add_parser("tasks", help="list the tasks, or show one with an example")
    tasks.add_argument("name", nargs="?", metavar="TASK")
    tasks.add_argument("--path", metavar="FOLDER", help="show an example from these data")
    tasks.set_defaults(command=_tasks, without_torch=True)
    options, rest = parser.parse_known_args(arguments)
    takes: list[str] | None = getattr(options, getattr(options, "rest", ""), None)
    if takes is not None and "--" in rest:  # what follows is no option, whatever it looks like
        end = rest.index("--")
        rest, last = rest[:end], rest[end + 1 :]
    else:
        last = []
    if rest and (takes is None or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes is not None:
        takes += [*rest, *last]  # argparse takes no positional argument behind an option
    return options


def _train(options: argparse.Namespace, world: World) -> None:
    """Check, then import torch and train. Collective."""
    from sparse_llm_ft.context.preflight import check_node, preflight

    catch_signals()
    files, overrides = split_arguments(options.config)  # --config also swallows the overrides behind it
    config = load_config(files, [*overrides, *options.settings])
    task = preflight(config, world)
    check_node(config)
    silence_libraries()
    with Wait(Console(world.rank), _IMPORTING):
        prepare_cpu(world)
        from sparse_llm_ft.context.context import RunContext
        from sparse_llm_ft.distributed.heartbeat import monitor_ranks
        from sparse_llm_ft.training.run import train

    context = RunContext.open(config, world, task)  # before ranks connect: what it refuses, each finds by itself
    with monitor_ranks(world):
        train(context)


def _check(options: argparse.Namespace) -> None:
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: expected 1 or more")
    memory, world = gpu_memory(options), World(0, options.processes, 0, options.processes)
    print(*_check_run(load_config(*split_arguments(options.config)), world, memory), sep="\n")


def _check_run(config: RunConfig, world: World, memory: int | None = None, on_gpu: bool | None = None) -> list[str]:
    """Check a run as `train` would on so many processes; returns lines about it. `submit` and `fetch` check the same.

    Args:
        memory, on_gpu: see `planned_device`.

    Raises:
        UserError: the first thing that is wrong.
    """
    from sparse_llm_ft.context.preflight import preflight

    task = preflight(config, world)
    silence_libraries()
    with Wait(Console(0, stderr=True), _IMPORTING):
        prepare_cpu(ONE_PROCESS)
        import transformers

        from sparse_llm_ft.context.context import RunContext
        from sparse_llm_ft.planning.devices import planned_device
        from sparse_llm_ft.training.run import Run

    transformers.utils.logging.disable_progress_bar()
    device = planned_device(config, memory, on_gpu)
    run = Run.prepare(RunContext.open(config, world, task), device=device)
    return [*run.describe(), *check_memory(run.context, device)]


def _derive(options: argparse.Namespace) -> None:
    from sparse_llm_ft.context.preflight import check_node, preflight

    catch_signals()
    config, world = load_config(*split_arguments(options.config)), find_world()
    task = preflight(config, world)
    check_node(config)
    prepare_cpu(world)
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.distributed.heartbeat import monitor_ranks
    from sparse_llm_ft.training.derive import derive

    context = RunContext.open(config, world, task)
    with monitor_ranks(world):
        derive(context)


def _report(options: argparse.Namespace) -> None:
    from sparse_llm_ft.report import write_report

    runs = [Path(run) for run in options.runs]
    output = Path(options.output) if options.output else runs[0] / "report" if len(runs) == 1 else Path("report")
    for path in write_report(runs, output):
        print(path)


def _tasks(options: argparse.Namespace) -> None:
    from sparse_llm_ft.cli.task_listing import list_tasks, show_task

    if options.path is not None and options.name is None:
        raise UserError("--path: expected a task before it, as in `sparse-llm-ft tasks dialogsum --path FOLDER`")
    print(list_tasks() if options.name is None else show_task(options.name, options.path))


def _summary(options: argparse.Namespace) -> None:
    folder = RunFolder(options.run)
    summary = folder.summary()
    prepare_cpu(ONE_PROCESS)
    from sparse_llm_ft.training.records import show_summary

    show_summary(summary, folder, Console(rank=0))


if __name__ == "__main__":
    main()
