"""The commands `evaluate`, `generate`, `export`, `push`: what is typed and what is printed. Imports no torch itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_llm_ft.config import RunConfig, load_config, merge, parse_config
from sparse_llm_ft.context.preflight import check_eval_splits, check_node
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.distributed.world import ONE_PROCESS, World, find_world
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.export.hub import check_name, check_repository, upload
from sparse_llm_ft.export.options import SHARD_SIZE, TARGETS, ExportOptions, refuse_existing
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.run_folder import CONFIG_FILE, open_run

if TYPE_CHECKING:
    from sparse_llm_ft.inference.trained_run import TrainedRun

_RUN = "a run's output_dir; the run need not be finished"
_MEASURING = ("evaluation.", "deepspeed.", "task.path=", "task.metrics=", "model.stage_to=", "seed=")
_TO = "peft: a stock PEFT adapter; merged: whole weights, for transformers alone; native: this package's own adapter"


def add_commands(commands: Any) -> None:
    """Enter the commands among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    export = commands.add_parser("export", help="write a run's newest checkpoint in one of three forms")
    _add_run(export)
    export.add_argument("--output", metavar="FOLDER", help="must not exist yet; default: RUN/export-FORM")
    _add_form(export)
    export.set_defaults(command=_export)

    evaluate = commands.add_parser("evaluate", help="measure a run's newest checkpoint, on one process or many")
    _add_run(evaluate)
    evaluate.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="evaluation.split=validation, evaluation.samples=500, ..."
    )
    evaluate.add_argument("--output", metavar="FOLDER", help="must not exist yet; default: RUN/evaluation-NUMBER")
    evaluate.set_defaults(command=_evaluate, rest="settings")

    generate = commands.add_parser("generate", help="print the answer of a run's newest checkpoint to a text")
    _add_run(generate)
    generate.add_argument("texts", nargs="*", metavar="TEXT", help="fills the task's prompt; - reads standard input")
    generate.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a column, if the prompt has several",
    )
    generate.add_argument("--max-new-tokens", type=int, metavar="N")
    generate.add_argument("--num-beams", type=int, metavar="N", help="width of a beam search")
    generate.add_argument("--temperature", type=float, metavar="T", help="above 0: sample; 0: the most probable tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="least probability mass that sampling draws from")
    generate.add_argument("--seed", type=int, metavar="S", help="of sampling")
    generate.set_defaults(command=_generate, rest="texts")

    push = commands.add_parser("push", help="upload an export with a model card to the Hugging Face hub")
    _add_run(push)
    push.add_argument("repo_id", metavar="NAMESPACE/NAME", help="a repository that does not exist yet")
    push.add_argument(
        "--private", action="store_true", help="make the new repository private; refused for a public one"
    )
    push.add_argument(
        "--update",
        action="store_true",
        help="upload into a repository that may exist, in place of what was pushed there",
    )
    push.add_argument("--dry-run", action="store_true", help="upload nothing, but write the files into --output")
    push.add_argument("--output", metavar="FOLDER", help="of --dry-run; must not exist yet; default: RUN/push-FORM")
    _add_form(push)
    push.set_defaults(command=_push)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help=_RUN)
    command.add_argument("--trust-remote-code", action="store_true", help="let code of the run's base model run here")


def _add_form(command: argparse.ArgumentParser) -> None:
    command.add_argument("--to", default="peft", metavar="FORM", help=_TO)
    command.add_argument(
        "--patterns", action="store_true", help="with --to peft: each module's own rank and scaling, for PEFT itself"
    )
    command.add_argument("--rank", type=int, metavar="R", help="with --to peft: truncate every module to this rank")
    command.add_argument("--for", dest="server", metavar="SERVER", help=f"with --to peft: {', '.join(TARGETS)}")
    command.add_argument(
        "--max-shard-size", metavar="SIZE", help=f"with --to merged: largest file of weights; default: {SHARD_SIZE}"
    )


def _form(options: argparse.Namespace) -> ExportOptions:
    return ExportOptions.parse(options.to, options.patterns, options.rank, options.server, options.max_shard_size)


def _export(options: argparse.Namespace) -> None:
    form = _form(options)
    output = Path(options.output or Path(options.run) / f"export-{form.to}")
    refuse_existing(output)
    run = _read(options)
    from sparse_llm_ft.export.export import export_run
    from sparse_llm_ft.export.serve_lines import serve_lines

    lines = export_run(run, output, form)
    for line in (*lines, *serve_lines(run, output, form, run.config.model.name, str(output))):
        print(line, file=sys.stderr)
    print(json.dumps({"to": form.to, "folder": str(output), "step": run.state.progress.step}))


def _evaluate(options: argparse.Namespace) -> None:
    world = find_world()
    folder = open_run(options.run)
    config = _with_settings(folder.path / CONFIG_FILE, options.settings)
    task = resolve_task(config.task)
    if not config.evaluation.samples:
        raise UserError("evaluation.samples: 0 measures nothing; expected 1 or more")
    check_eval_splits(config, task)
    check_node(config)
    if options.output:
        refuse_existing(Path(options.output))
    from sparse_llm_ft.distributed.collectives import broadcast_int
    from sparse_llm_ft.distributed.heartbeat import monitor_ranks
    from sparse_llm_ft.engine.engine import process_group
    from sparse_llm_ft.inference.evaluate import evaluate, evaluate_again

    with ExitStack() as connected:

        def connect(step: int) -> int:
            """Collective. Join the other processes, now that the run is open, and take rank 0's step."""
            connected.enter_context(monitor_ranks(world))
            connected.enter_context(process_group())
            return broadcast_int(step)

        console = Console(world.rank)
        run = _read(options, config, world, connect, console)
        if options.output:
            output = Path(options.output)
            result = evaluate(run, output)
        else:
            result, output = evaluate_again(run, folder.path)
    for name, value in result["metrics"].items():
        console.log(f"{name} {value:.4f}")
    console.log(f"{output}: {sum(result['samples'].values())} samples at step {result['step']}")


def _with_settings(path: Path, settings: Sequence[str]) -> RunConfig:
    """The run's settings, overridden by those given; only sections that do not make it another run are allowed.

    The run's own ``model.stage_to`` does not count: the folder may be a stranger's, and must not say where to write.
    """
    for setting in settings:
        if not setting.startswith(_MEASURING):
            raise UserError(f"{setting}: expected a setting of {', '.join(_MEASURING)}")
    return load_config([str(path)], ["model.stage_to=null", *settings])


def _generate(options: argparse.Namespace) -> None:
    given = _columns(options.column)
    config = _generation(open_run(options.run).config(), options)
    from sparse_llm_ft.inference.generate import answer, input_columns, make_rows
    from sparse_llm_ft.inference.trained_run import in_one_process

    run = _read(options, in_one_process(config))
    texts = [_standard_input() if text == "-" else text for text in options.texts]
    rows = make_rows(input_columns(run), texts, given)
    for text in answer(run, rows):
        print(text)


def _standard_input() -> str:
    """What stands there, without the line ends behind it.

    Raises:
        UserError: it is closed, or not text of its encoding.
    """
    if sys.stdin is None:
        raise UserError("-: standard input is closed; expected a text there")
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"-: standard input is not {error.encoding} (byte {error.start}); expected a text") from None


def _push(options: argparse.Namespace) -> None:
    form = _form(options)
    if options.output and not options.dry_run:
        raise UserError(f"--output {options.output}: expected --dry-run beside it; else nothing stays on disk")
    check_name(options.repo_id)
    if options.dry_run:
        output = Path(options.output or Path(options.run) / f"push-{form.to}")
        refuse_existing(output)
        run = _read(options)
        from sparse_llm_ft.export.staging import stage

        print(f"nothing uploaded; {options.repo_id} would get, from {output}:")
        for name, size in stage(run, output, options.repo_id, form).items():
            print(f"  {name} ({size:,} bytes)")
        return
    open_run(options.run)
    check_repository(options.repo_id, options.private, options.update)  # before an export that may be large
    run = _read(options)
    from sparse_llm_ft.export.staging import staged

    with staged(run, options.repo_id, form) as folder:
        print(upload(folder, options.repo_id, options.private, options.update))


def _read(
    options: argparse.Namespace,
    config: RunConfig | None = None,
    world: World = ONE_PROCESS,
    agree: Callable[[int], int] = int,
    console: Console | None = None,
) -> TrainedRun:
    """Open the run, and print a line on standard error about each of its checkpoints that cannot be used.

    Args:
        console: None: one on standard error, since standard output gets a result.
    """
    open_run(options.run)  # reports what is wrong with it before anything slow is imported
    import transformers

    from sparse_llm_ft.inference.trained_run import read_run

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(world.rank, stderr=True) if console is None else console
    run = read_run(options.run, config, world, options.trust_remote_code, agree, console)
    for complaint in run.complaints if world.rank == 0 else ():
        print(complaint, file=sys.stderr)
    return run


def _columns(arguments: Sequence[str]) -> dict[str, str]:
    columns = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or name in columns:
            raise UserError(f"--column {argument}: " + ("given twice" if equals else "expected NAME=TEXT"))
        columns[name] = text
    return columns


def _generation(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The run's settings, overridden by the generation options and checked."""
    names = ("max_new_tokens", "num_beams", "temperature", "top_p")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given["samples"] = max(1, config.evaluation.samples)  # a run that measures nothing may exceed its positions
    # The command reads no data: their folder need not exist.
    tree = merge(config.model_dump(mode="json"), {"evaluation": given, "task": {"path": None}})
    if options.seed is not None:
        tree["seed"] = options.seed
    checked = parse_config(tree)
    return config.model_copy(update={"evaluation": checked.evaluation, "seed": checked.seed})
