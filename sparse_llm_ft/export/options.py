"""What can be wrong with a command before torch is imported: the run's folder, the form of an export, its place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import CONFIG_FILE, RunFolder

Form = Literal["peft", "merged", "native"]

_FORMS: dict[str, Form] = {form: form for form in get_args(Form)}
_SHARD_SIZE = re.compile(r"[1-9][0-9]*(KB|MB|GB|TB)")


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        to: ``peft``, ``merged`` or ``native``.
        uniform_rank: of a ``peft`` export: one rank and one lora_alpha for all modules.
        max_shard_size: of a ``merged`` export: largest file of weights, such as ``5GB`` (10⁹ bytes each).
    """

    to: Form = "peft"
    uniform_rank: bool = False
    max_shard_size: str = "5GB"

    @classmethod
    def parse(cls, to: str, uniform_rank: bool, max_shard_size: str) -> ExportOptions:
        """The options that were typed.

        Raises:
            UserError: an unknown value, or two that do not go together.
        """
        if to not in _FORMS:
            raise UserError(f"--to {to}: expected {', '.join(_FORMS)}")
        if uniform_rank and to != "peft":
            raise UserError(f"--uniform-rank: --to {to} has no ranks to make equal; expected --to peft")
        if not _SHARD_SIZE.fullmatch(max_shard_size):
            raise UserError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB or 500MB")
        return cls(_FORMS[to], uniform_rank, max_shard_size)


def open_run(path: str) -> RunFolder:
    """The folder of a run.

    Raises:
        UserError: it is none, or nothing has been saved in it.
    """
    folder = RunFolder(path)
    if not (folder.path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: no {CONFIG_FILE}; expected a run's output_dir")
    if not folder.has_checkpoints():
        raise UserError(f"{path}: no checkpoint yet")
    return folder


def refuse_existing(output: Path) -> None:
    """Raises UserError where something is in the way of a new folder."""
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: exists; choose a new folder")
