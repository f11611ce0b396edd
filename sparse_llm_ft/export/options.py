"""Checks an export's options before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.serving.ranks import LARGEST_RANK, served_rank

Form = Literal["peft", "merged", "native"]

_FORMS: dict[str, Form] = {form: form for form in get_args(Form)}
SHARD_SIZE = "5GB"
TARGETS = ("vllm", "sglang", "llama.cpp", "ollama", "tgi")
"""Values of ``--for``."""

_SHARD_SIZE = re.compile(r"[1-9][0-9]*(KB|MB|GB|TB)")


@dataclass(frozen=True)
class ExportOptions:
    """The form of an export.

    Attributes:
        to: ``peft``, ``merged`` or ``native``.
        patterns: for ``peft``: each module keeps its rank and scaling, as PEFT's patterns.
        rank: for ``peft``: truncate every ΔW to this rank.
        server: for ``peft``: the server that the adapter must fit; None: none in particular.
        max_shard_size: for ``merged``: largest weight file, such as ``500MB`` (5 · 10⁸ bytes); None: `SHARD_SIZE`.
    """

    to: Form = "peft"
    patterns: bool = False
    rank: int | None = None
    server: str | None = None
    max_shard_size: str | None = None

    @classmethod
    def parse(
        cls,
        to: str,
        patterns: bool = False,
        rank: int | None = None,
        server: str | None = None,
        max_shard_size: str | None = None,
    ) -> ExportOptions:
        """The options of the command line.

        Raises:
            UserError: a value is unknown, or two contradict each other.
        """
        if to not in _FORMS:
            raise UserError(f"--to {to}: expected {', '.join(_FORMS)}")
        given = {"--patterns": patterns, f"--rank {rank}": rank is not None, f"--for {server}": server is not None}
        chosen = [option for option, is_given in given.items() if is_given]
        if chosen and to != "peft":
            raise UserError(f"{chosen[0]}: --to {to} writes no stock adapter; expected --to peft")
        if patterns and len(chosen) > 1:
            raise UserError(f"--patterns: {chosen[1]} gives all modules one rank; expected one of the two")
        if rank is not None and not (1 <= rank <= LARGEST_RANK and served_rank(rank) == rank):
            raise UserError(f"--rank {rank}: expected 8 or a multiple of 16, up to {LARGEST_RANK}")
        if server is not None and server not in TARGETS:
            raise UserError(f"--for {server}: expected {', '.join(TARGETS)}")
        if max_shard_size is not None and to != "merged":
            raise UserError(f"--max-shard-size {max_shard_size}: --to {to} writes one file; expected --to merged")
        if max_shard_size is not None and not _SHARD_SIZE.fullmatch(max_shard_size):
            raise UserError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB or 500MB")
        return cls(_FORMS[to], patterns, rank, server, max_shard_size)


def refuse_existing(output: Path) -> None:
    """Raise UserError if `output` exists."""
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: exists; choose a new folder")
