"""The command `plan`: what is typed and what is printed. Imports no torch itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparse_llm_ft.config import RunConfig, load_config, split_arguments
from sparse_llm_ft.config.types import bytes_of
from sparse_llm_ft.distributed.world import ONE_PROCESS, World, prepare_cpu
from sparse_llm_ft.errors import UserError, reason_of
from sparse_llm_ft.run_folder import open_run

if TYPE_CHECKING:
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.planning.devices import Device

DOES_NOT_FIT = 3
"""Exit status."""

FIELDS = ("micro_batch_size", "max_length", "r", "keep", "nodes", "zero_stage")
"""What ``--solve`` takes (planning/solve.py)."""


def add_command(commands: Any) -> None:
    """Enter the command among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    plan = commands.add_parser(
        "plan",
        help="say what a run will need on each device, before anything is loaded; exit status 3: it does not fit",
    )
    plan.add_argument("--config", nargs="+", required=True, metavar="FILE", help="as of train; settings may follow")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="devices of a node, one process each")
    plan.add_argument("--nodes", type=int, default=1, metavar="N")
    add_gpu_memory(plan, "what must suffice")
    plan.add_argument("--tflops", type=float, metavar="N", help="what a device does in a second, for times")
    plan.add_argument("--card", metavar="NAME", help="a known card in place of --tflops, with --mfu of its peak")
    plan.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="default: 0.4")
    plan.add_argument("--rate-of", metavar="RUN", help="times as a finished run of this model measured them")
    plan.add_argument("--json", action="store_true", help="print JSON alone")
    plan.add_argument("--no-others", action="store_true", help="leave out the table of other methods")
    plan.add_argument(
        "--solve",
        metavar="FIELD",
        help="print the best value that fits, and the first that does not, of micro_batch_size, max_length, r, keep "
        "(largest), nodes or zero_stage (smallest)",
    )
    plan.set_defaults(command=run_plan, without_torch=True)  # until the settings are checked


def run_plan(options: argparse.Namespace) -> None:
    """Forecast and print; ends with status 3 if a phase does not fit."""
    config, world = load_config(*split_arguments(options.config)), _world(options)
    given = gpu_memory(options)
    if options.solve is not None:
        config = _check_solved(options.solve, config)
    _check_rates(options)
    prepare_cpu(ONE_PROCESS)
    from sparse_llm_ft.planning.devices import planned_device
    from sparse_llm_ft.planning.forecast import forecast
    from sparse_llm_ft.planning.micro_batch import describe, with_micro_batch
    from sparse_llm_ft.planning.opening import open_for_planning
    from sparse_llm_ft.planning.rates import check_card
    from sparse_llm_ft.planning.samples import sample_sizes
    from sparse_llm_ft.planning.solve import solve
    from sparse_llm_ft.planning.tables import phase_table, size_text, to_json

    if options.card is not None:
        check_card(options.card)
    device = planned_device(config, given)
    memory, on_gpu = device.memory or _share_of_host(world), device.is_gpu
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # what a run would log
        context = open_for_planning(config, world)
    samples = sample_sizes(context)
    try:
        if options.solve is not None:
            found_value = solve(options.solve, context, memory, samples, on_gpu, options.gpus)
            print(json.dumps(asdict(found_value)) if options.json else describe(found_value, memory))
            sys.exit(DOES_NOT_FIT if found_value.value is None else 0)
        if config.training.micro_batch_size == "auto":
            context = with_micro_batch(context, solve("micro_batch_size", context, memory, samples, on_gpu).value or 1)
        found = forecast(context, samples=samples, on_gpu=on_gpu)
    except UserError:
        raise
    except Exception as error:  # a model may fail on the meta device in any way
        reason = f"{type(error).__name__}: {reason_of(error, 200)}"
        raise UserError(f"model.name: the memory of {config.model.name} cannot be planned ({reason})") from error
    fits = found.fits(memory)
    if options.json:
        print(json.dumps(to_json(found, fits), indent=1))
        sys.exit(0 if fits else DOES_NOT_FIT)
    rates = _rates(options, found, config)
    for note in found.notes:
        print(note)
    where = f"{world.size} {device.noun}{'' if world.size == 1 else 's' if on_gpu else 'es'}"
    print(f"one of {where}, ZeRO-{config.deepspeed.zero_stage}, {size_text(memory)} each\n")
    for phase in found.phases:
        print(phase_table(phase, world.size, rates) + "\n")
    if not options.no_others:
        from sparse_llm_ft.planning.others import other_methods
        from sparse_llm_ft.planning.tables import others_table

        total = sum(phase.steps or 0 for phase in found.phases) or 1000
        print(others_table(found, other_methods(context, samples, total, on_gpu), config.method_name) + "\n")
    worst, verdict = found.highest, "fits" if fits else "does not fit"
    print(f"{verdict}: {size_text(worst.peak_bytes)} of {size_text(memory)} (phase {worst.name}, {worst.highest})")
    sys.exit(0 if fits else DOES_NOT_FIT)


def check_memory(context: RunContext, device: Device) -> list[str]:
    """Lines about what the run will need on each device.

    Raises:
        UserError: a phase does not fit into the device's memory, if that is known.
    """
    from sparse_llm_ft.planning.forecast import forecast
    from sparse_llm_ft.planning.tables import memory_line, size_text

    try:
        found = forecast(context, on_gpu=device.is_gpu)
    except UserError:
        raise
    except Exception as error:  # a model may fail on the meta device in any way
        return [f"planned memory: not known for this model ({type(error).__name__}: {reason_of(error, 200)})"]
    worst = found.highest
    if device.memory is not None and not found.fits(device.memory):
        raise UserError(
            f"{device.source} {size_text(device.memory)}: phase {worst.name} needs {size_text(worst.peak_bytes)} "
            f"({worst.highest}); expected more, or what `sparse-llm-ft plan --solve` finds"
        )
    return [*found.notes, memory_line(found, device)]


def add_gpu_memory(command: argparse.ArgumentParser, what: str) -> None:
    """Enter the option ``--gpu-memory``.

    Args:
        what: what the command does with it, for its help.
    """
    command.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help=f"of each GPU, such as 80GiB: {what}; default: training.device_memory, or that of this machine's GPU",
    )


def gpu_memory(options: argparse.Namespace) -> int | None:
    """Bytes of the typed ``--gpu-memory``; None: not given.

    Raises:
        UserError: not a size.
    """
    return None if options.gpu_memory is None else parse_size(options.gpu_memory)


def parse_size(text: str) -> int:
    """Bytes of a text such as ``80GiB``, ``24 GB`` or ``1000000``.

    Raises:
        UserError: anything else, and nothing at all.
    """
    size = bytes_of(text)
    if not size:
        raise UserError(f"--gpu-memory {text}: expected a size such as 80GiB")
    return size


def _check_solved(field: str, config: RunConfig) -> RunConfig:
    """The settings to open the run with; a micro-batch that is sought need not go with the number of processes.

    Raises:
        UserError: no such field.
    """
    if field not in FIELDS:
        raise UserError(f"--solve {field}: expected one of {', '.join(FIELDS)}")
    if field != "micro_batch_size":
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": "auto"})})


def _world(options: argparse.Namespace) -> World:
    for name in ("gpus", "nodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected 1 or more")
    size = options.gpus * options.nodes
    return World(0, size, 0, options.gpus)


def _check_rates(options: argparse.Namespace) -> None:
    given = [name for name in ("tflops", "card", "rate_of") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UserError(
            f"--{given[0].replace('_', '-')}: given with --{given[1].replace('_', '-')}; expected one of them"
        )
    if options.tflops is not None and not options.tflops > 0:
        raise UserError(f"--tflops {options.tflops:g}: expected a positive number")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu:g}: expected a share of the card's peak, above 0 and at most 1")
    if options.rate_of is not None:
        open_run(options.rate_of).summary()


def _share_of_host(world: World) -> int:
    """Bytes of this machine's memory for each of its processes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size


def _rates(options: argparse.Namespace, found: Any, config: RunConfig) -> Any:
    from sparse_llm_ft.planning.rates import card_rate, given_rate, measured_rate

    if options.tflops is not None:
        return given_rate(found, options.tflops)
    if options.card is not None:
        return card_rate(found, options.card, options.mfu)
    if options.rate_of is not None:
        return measured_rate(found, open_run(options.rate_of).summary(), config.model.name)
    return {}
