"""The command `check-adapter`: what each server makes of a PEFT adapter. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparse_llm_ft.errors import one_line
from sparse_llm_ft.serving.facts import AdapterFacts, read_facts
from sparse_llm_ft.serving.servers import SERVERS, find_servers, judge

_WRONG = 1
"""Exit status if a server refuses the adapter or computes something else. A wrong input is 2, as everywhere."""


def add_command(commands: Any) -> None:
    """Enter the command among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    check = commands.add_parser(
        "check-adapter", help="tell which servers load a PEFT adapter right; exit status 1 if one asked for does not"
    )
    check.add_argument("adapter", metavar="FOLDER", help="any PEFT adapter: adapter_config.json and safetensors")
    check.add_argument("--for", dest="servers", metavar="NAMES", help=f"of {','.join(SERVERS)}; default: all")
    check.add_argument("--base", metavar="FOLDER", help="the base model's folder, if the adapter does not lead there")
    check.set_defaults(command=_check_adapter, without_torch=True)


def _check_adapter(options: argparse.Namespace) -> None:
    servers = find_servers(options.servers)
    facts = read_facts(Path(options.adapter), Path(options.base) if options.base else None)
    verdicts = [judge(facts, server) for server in servers]
    print(one_line(f"{options.adapter}: {_describe(facts)}"))
    width = max(len(server.label) for server in servers)
    for verdict in verdicts:
        print(one_line(f"{verdict.server.label:<{width}}  {verdict}"))
    if not all(verdict.right for verdict in verdicts):
        sys.exit(_WRONG)


def _describe(facts: AdapterFacts) -> str:
    ranks = sorted({pair.rank for pair in facts.pairs.values()})
    if not ranks:
        return f"{facts.config['peft_type']}, {len(facts.others)} tensors"
    of = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    base = "" if facts.layers is None else f", base of {facts.layers} layers"
    return f"{facts.config['peft_type']}, {len(facts.pairs)} modules, {of}{base}"
