"""Train adapters: `deepspeed [launcher flags] launch/train.py --config A.yaml [B.yaml ...] [section.key=value ...]`.

Runs under deepspeed, torchrun and srun, and alone. Later files win over earlier ones, overrides over files.
"""

from __future__ import annotations

import argparse

from sparse_llm_ft.config import load_config, split_arguments
from sparse_llm_ft.context.preflight import preflight
from sparse_llm_ft.distributed.exit_status import Parser, one_line_errors
from sparse_llm_ft.distributed.signals import catch_signals
from sparse_llm_ft.distributed.world import find_world, prepare_cpu
from sparse_llm_ft.io.console import silence_libraries


def main() -> None:
    """Parse, check, then import torch and train."""
    world = find_world()
    with one_line_errors(world):
        catch_signals()
        files, overrides = _arguments()
        config = load_config(files, overrides)
        task = preflight(config, world)
        silence_libraries()
        prepare_cpu(world)
        # These import torch, transformers and deepspeed: half a minute.
        from sparse_llm_ft.context.context import RunContext
        from sparse_llm_ft.distributed.heartbeat import monitor_ranks
        from sparse_llm_ft.training.run import train

        with monitor_ranks(world):
            train(RunContext.open(config, world, task))


def _arguments() -> tuple[list[str], list[str]]:
    """Config files and overrides. Overrides may stand before or after --config."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="YAML files, later ones win")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments, rest = parser.parse_known_args()
    for argument in rest:
        if argument.startswith("-"):
            parser.error(f"unknown option {argument}")
    files, overrides = split_arguments(arguments.config)  # --config also swallows the overrides behind it
    return files, [*overrides, *rest]


if __name__ == "__main__":
    main()
