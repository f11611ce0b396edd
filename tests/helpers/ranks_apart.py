"""What each rank of a world is given before it runs, see `before` of `run_world`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def opened_files(folder: str) -> Callable[[int], None]:
    """Let each rank write the names of the weights' files that it opens to FOLDER/opened-RANK, one a line."""

    def prepare(rank: int) -> None:
        from transformers import modeling_utils

        log = os.open(Path(folder) / f"opened-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        map_file = modeling_utils.safe_open

        def note(path: object) -> None:
            if str(path).endswith(".safetensors") and "checkpoints" not in str(path):
                os.write(log, f"{path}\n".encode())

        def audited(event: str, arguments: tuple[Any, ...]) -> None:  # what Python opens; safetensors is not Python
            if event == "open" and arguments[1] in ("r", "rb"):
                note(arguments[0])

        def noting(path: object, *rest: Any, **options: Any) -> Any:
            note(path)
            return map_file(path, *rest, **options)

        modeling_utils.safe_open = noting
        sys.addaudithook(audited)

    return prepare


def nodes_of_one_rank(*disks: str) -> Callable[[int], None]:
    """Every rank is the first one of a node; rank i finds ``disks[i]`` in the variable DISK."""

    def prepare(rank: int) -> None:
        os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="1", DISK=disks[rank])

    return prepare


def failing_load(kind: str, text: str) -> Callable[[int], None]:
    """On rank 1 alone, loading the base raises ``UserError`` or ``RuntimeError``, by no collective."""

    def prepare(rank: int) -> None:
        from sparse_llm_ft.engine import build
        from sparse_llm_ft.errors import UserError

        def fail(*_: object, **__: object) -> None:
            raise {"UserError": UserError, "RuntimeError": RuntimeError}[kind](text)

        if rank == 1:
            build.load_model = fail

    return prepare
