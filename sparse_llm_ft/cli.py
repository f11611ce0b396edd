"""`sparse-llm-ft`: what one does before and after a run. Training itself is `deepspeed launch/train.py`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparse_llm_ft import __version__
from sparse_llm_ft.config import load_config, split_arguments
from sparse_llm_ft.distributed import World, find_world, prepare_cpu
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.exits import one_line_errors
from sparse_llm_ft.quiet import quiet_libraries
from sparse_llm_ft.signals import catch_signals
from sparse_llm_ft.training.run_folder import CONFIG, RunFolder


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run one command; a user error is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="sparse-llm-ft", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="check settings and data, and show the plan a run would begin with")
    check.add_argument("--config", nargs="+", required=True, metavar="FILE")
    check.add_argument("--processes", type=int, default=1, help="how many processes the run will have")
    check.set_defaults(command=_check)
    summary = commands.add_parser("summary", help="show the table of a finished run")
    summary.add_argument("run", metavar="RUN", help="a run's output_dir")
    summary.set_defaults(command=_summary)
    export = commands.add_parser("export", help="write a stock PEFT adapter from a run's newest checkpoint")
    export.add_argument("run", metavar="RUN", help="a run's output_dir; the run need not be finished")
    export.add_argument("--output", required=True, metavar="FOLDER", help="must not exist yet")
    export.set_defaults(command=_export)
    derive = commands.add_parser(
        "derive", help="derive the ratios of method partial_lora alone; a later run with these settings finds them"
    )
    derive.add_argument("--config", nargs="+", required=True, metavar="FILE")
    derive.set_defaults(command=_derive)
    report = commands.add_parser("report", help="draw pictures of a run, or compare several in one table")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's output_dir; it need not be finished")
    report.add_argument("--output", metavar="FOLDER", help="default: RUN/report for one run, report for several")
    report.set_defaults(command=_report)
    options = parser.parse_args(arguments)
    quiet_libraries()
    world = find_world() if options.command is _derive else World(rank=0, size=1, local_rank=0, local_size=1)
    with one_line_errors(world):
        prepare_cpu(world)
        options.command(options)


def _check(options: argparse.Namespace) -> None:
    from sparse_llm_ft.training.prepare import prepare

    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: expected 1 or more")
    config = load_config(*split_arguments(options.config))
    prepared = prepare(config, World(0, options.processes, 0, options.processes))
    from sparse_llm_ft.modeling import check_weights
    from sparse_llm_ft.plan import module_kind
    from sparse_llm_ft.training.samples import Samples
    from sparse_llm_ft.training.setup import Setup

    setup = Setup.of(prepared)
    phase = setup.methods.first(setup.plan, setup.targets)
    check_weights(config.model)
    samples = Samples.encode(prepared, setup.tokenizer)
    kinds = Counter(module_kind(name).rpartition(".")[2] for name in phase.plan.active)
    adapters = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
    print(f"{len(samples.train)} training samples, {prepared.schedule.total_steps} optimizer steps")
    print(f"{samples.shortened} training texts shortened to fit task.max_length {config.task.max_length}")
    print(f"phase {phase.name}: {phase.plan.describe()}{adapters}")
    whole = sum(
        parameter.numel() for name in phase.plan.trained for parameter in setup.empty.get_submodule(name).parameters()
    )
    print(f"{phase.plan.parameters(setup.targets) + whole:,} trainable parameters")


def _derive(options: argparse.Namespace) -> None:
    from sparse_llm_ft.training.prepare import prepare

    catch_signals()
    prepared = prepare(load_config(*split_arguments(options.config)), find_world())
    from sparse_llm_ft.training.run import derive
    from sparse_llm_ft.watch import watching

    with watching(prepared.world):
        derive(prepared)


def _report(options: argparse.Namespace) -> None:
    from sparse_llm_ft.report import write_report

    runs = [Path(run) for run in options.runs]
    output = Path(options.output) if options.output else runs[0] / "report" if len(runs) == 1 else Path("report")
    for path in write_report(runs, output):
        print(path)


def _summary(options: argparse.Namespace) -> None:
    folder = RunFolder(options.run)
    summary = folder.summary()
    from sparse_llm_ft.training.display import Display
    from sparse_llm_ft.training.summary import show_summary

    show_summary(summary, folder, Display(rank=0))


def _export(options: argparse.Namespace) -> None:
    folder, output = RunFolder(options.run), Path(options.output)
    if output.exists():
        raise UserError(f"--output {output}: exists; choose a new folder")
    if not (folder.path / CONFIG).is_file():
        raise UserError(f"{options.run}: no {CONFIG}; expected a run's output_dir")
    # Only model and task are needed; data and relative paths need not be where they were.
    config = folder.config()
    from sparse_llm_ft.adapters import linear_modules
    from sparse_llm_ft.data.reading import check_task
    from sparse_llm_ft.fitting import Expected
    from sparse_llm_ft.modeling import empty_model
    from sparse_llm_ft.training.checkpoints import load_checkpoint, newest_valid
    from sparse_llm_ft.training.export import export

    empty = empty_model(config.model, labels=check_task(config.task).classes)
    parameters = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    real = Expected(linear_modules(empty), parameters, len(config.method))
    newest, complaints = newest_valid(folder.checkpoints, real, RunFolder.identity(config))
    for complaint in complaints:
        print(complaint)
    if newest is None:
        raise UserError(f"{options.run}: no checkpoint yet")
    state, phase = load_checkpoint(newest, real)
    try:
        export(output, config.model, empty, phase.plan, state.tensors)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    print(json.dumps({"adapter": str(output), "step": state.progress.step}))


if __name__ == "__main__":
    main()
