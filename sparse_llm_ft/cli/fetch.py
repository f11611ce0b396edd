"""The command `fetch`: everything that a run reads from a network, into the caches, on a node that has one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sparse_llm_ft.config import RunConfig, load_config, split_arguments
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.model.base_files import fetch_model


def add_command(commands: Any, check: Callable[[RunConfig, World], list[str]]) -> None:
    """Enter the command among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        check: reads and tokenises the data as a run on these processes would; returns lines about the run.
    """
    fetch = commands.add_parser(
        "fetch",
        help="fill the caches with a run's model and tokenised data; the run then needs no network (HF_HUB_OFFLINE=1)",
    )
    fetch.add_argument("--config", nargs="+", required=True, metavar="FILE")
    fetch.add_argument("--processes", type=int, default=1, help="how many processes the run will have")
    fetch.set_defaults(command=lambda options: _fetch(options, check), without_torch=True)  # `check` imports it


def _fetch(options: argparse.Namespace, check: Callable[[RunConfig, World], list[str]]) -> None:
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: expected 1 or more")
    config = load_config(*split_arguments(options.config))
    folder = fetch_model(config.model)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"model: {folder} ({size / 2**30:.1f} GiB)")
    print(*check(config, World(0, options.processes, 0, options.processes)), sep="\n")
    print("the run needs no network now: set HF_HUB_OFFLINE=1 there, and the same HF_HOME")
