"""`sparse-llm-ft`: what one does before and after a run. Training itself is `deepspeed launch/train.py`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from sparse_llm_ft import __version__
from sparse_llm_ft.config import RunConfig, load_config, split_arguments
from sparse_llm_ft.distributed import World, prepare_cpu
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.exits import one_line_errors
from sparse_llm_ft.quiet import quiet_libraries
from sparse_llm_ft.training.run_folder import CONFIG, RunFolder


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run one command; a user error is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="sparse-llm-ft", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
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
    options = parser.parse_args(arguments)
    quiet_libraries()
    world = World(rank=0, size=1, local_rank=0, local_size=1)
    with one_line_errors(world):
        prepare_cpu(world)
        options.command(options)


def _check(options: argparse.Namespace) -> None:
    from sparse_llm_ft.training.prepare import prepare

    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: expected 1 or more")
    config = load_config(*split_arguments(options.config))
    prepared = prepare(config, World(0, options.processes, 0, options.processes))
    from sparse_llm_ft.adapters import find_targets
    from sparse_llm_ft.methods import make_method
    from sparse_llm_ft.modeling import check_weights, empty_model, load_tokenizer
    from sparse_llm_ft.training.samples import Samples

    targets = find_targets(empty_model(config.model), config.adapter.target_modules)
    phase = make_method(config).first(targets)
    check_weights(config.model)
    samples = Samples.encode(prepared, load_tokenizer(config.model))
    kinds = Counter(name.rpartition(".")[2] for name in phase.plan.active)
    print(f"{len(samples.train)} training samples, {prepared.schedule.total_steps} optimizer steps")
    print(f"{samples.shortened} training prompts shortened to fit task.max_length {config.task.max_length}")
    print(f"phase {phase.name}: {len(phase.plan.active)} adapters ({', '.join(f'{n} {k}' for k, n in kinds.items())})")
    print(f"{phase.plan.parameters(targets):,} trainable parameters")


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
    # Only the model's name is needed; data and relative paths need not be where they were.
    model = RunConfig.model_validate(yaml.safe_load((folder.path / CONFIG).read_text(encoding="utf-8"))).model
    from sparse_llm_ft.adapters import save_stock_lora
    from sparse_llm_ft.folders import write_folder
    from sparse_llm_ft.methods import Phase
    from sparse_llm_ft.state import TrainState
    from sparse_llm_ft.training.checkpoints import newest_valid

    newest, complaints = newest_valid(folder.checkpoints)
    for complaint in complaints:
        print(complaint)
    if newest is None:
        raise UserError(f"{options.run}: no checkpoint yet")
    state = TrainState.load(newest)
    plan = Phase.from_dict(state.phase).plan
    try:
        write_folder(output, lambda path: save_stock_lora(path, plan, state.tensors, model.name, model.revision))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    print(json.dumps({"adapter": str(output), "step": state.progress.step}))
