"""Checks an export's options before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sparse_llm_ft.errors import UserError

Form = Literal["peft", "merged", "native"]

_FORMS: dict[str, Form] = {form: form for form in get_args(Form)}
_SHARD_SIZE = re.compile(r"[1-9][0-9]*(KB|MB|GB|TB)")


@dataclass(frozen=True)
class ExportOptions:
    """The form of an export.

    Attributes:
        to: ``peft``, ``merged`` or ``native``.
        uniform_rank: for ``peft``: one rank and one lora_alpha for all modules.
        max_shard_size: for ``merged``: largest weight file, such as ``5GB`` (5 · 10⁹ bytes).
    """

    to: Form = "peft"
    uniform_rank: bool = False
    max_shard_size: str = "5GB"

    @classmethod
    def parse(cls, to: str, uniform_rank: bool, max_shard_size: str) -> ExportOptions:
        """The options of the command line.

        Raises:
            UserError: a value is unknown, or two contradict each other.
        """
        if to not in _FORMS:
            raise UserError(f"--to {to}: expected {', '.join(_FORMS)}")
        if uniform_rank and to != "peft":
            raise UserError(f"--uniform-rank: --to {to} has no ranks to make equal; expected --to peft")
        if not _SHARD_SIZE.fullmatch(max_shard_size):
            raise UserError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB or 500MB")
        return cls(_FORMS[to], uniform_rank, max_shard_size)


def refuse_existing(output: Path) -> None:
    """Raise UserError if `output` exists."""
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: exists; choose a new folder")
