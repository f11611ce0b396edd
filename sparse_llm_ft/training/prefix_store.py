"""Where a rank keeps hidden states of samples: in memory, or in memory-mapped files of the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparse_llm_ft.errors import CheckpointError
from sparse_llm_ft.io.atomic import verify_folder, write_folder

SHARD_BYTES = 2**28
"""Bytes that a rank collects before it writes a file."""

_STATES = "states.safetensors"


class MemoryStore:
    """States on the CPU: number of the sample -> (tokens, d)."""

    shard_bytes: int | None = None
    """After how many bytes a rank must `flush`; None: never."""

    def __init__(self) -> None:
        self._rows: dict[int, torch.Tensor] = {}

    def __getitem__(self, sample: int) -> torch.Tensor:
        return self._rows[sample]

    def put(self, rows: dict[int, torch.Tensor]) -> None:
        """Keep states (tokens, d) on the CPU."""
        self._rows.update(rows)

    def flush(self) -> None:
        """Write what is only in memory; nothing here."""

    def read(self, lengths: Sequence[int], width: int, dtype: torch.dtype, part: tuple[int, int]) -> list[int]:
        """Take over what an earlier process has kept; nothing here. Returns the samples found."""
        return []


class DiskStore(MemoryStore):
    """States in `folder`, in files of about `SHARD_BYTES`, each in a folder with checksums (`write_folder`).

    Args:
        folder: for states of one base, lowest layer, training set and dtype.
        rank: of this process, whose files have its number.
        warn: called with one line about files that cannot be used.
    """

    def __init__(self, folder: Path, rank: int, warn: Callable[[str], object]) -> None:
        super().__init__()
        self.shard_bytes = SHARD_BYTES
        self.folder, self._rank, self._warn = folder, rank, warn
        self._files: dict[int, safe_open] = {}  # type: ignore[valid-type]

    def __getitem__(self, sample: int) -> torch.Tensor:
        file = self._files.get(sample)
        return self._rows[sample] if file is None else file.get_tensor(str(sample))  # type: ignore[no-any-return, attr-defined]

    def flush(self) -> None:
        """Write the states that are only in memory.

        Raises:
            OSError, SafetensorError: the disk is full or cannot be written.
        """
        if not self._rows:
            return
        number = 0
        while (target := self.folder / f"rank-{self._rank}-{number}").exists():
            number += 1
        rows = {str(sample): states.contiguous() for sample, states in self._rows.items()}
        write_folder(target, lambda temporary: save_file(rows, temporary / _STATES))
        file = safe_open(target / _STATES, "pt")  # type: ignore[no-untyped-call]
        self._files |= dict.fromkeys(self._rows, file)
        self._rows = {}

    def read(self, lengths: Sequence[int], width: int, dtype: torch.dtype, part: tuple[int, int]) -> list[int]:
        """Take over files of earlier processes. Returns the samples found.

        Args:
            lengths: tokens of every sample; states of another shape or dtype are left alone.
            part: (i, n): of all files in order, take the i-th and every n-th after it.
        """
        entries = sorted(entry for entry in self.folder.glob("rank-*") if entry.is_dir())
        for entry in entries[part[0] :: part[1]]:
            try:
                verify_folder(entry, (_STATES,))
                file = safe_open(entry / _STATES, "pt")  # type: ignore[no-untyped-call]
                fits = {
                    int(name)
                    for name in file.keys()  # noqa: SIM118  (no mapping)
                    if name.isdecimal()
                    and int(name) < len(lengths)
                    and _fits(file.get_slice(name), [int(lengths[int(name)]), width], dtype)
                }
            except (OSError, CheckpointError, SafetensorError) as error:
                self._warn(f"{entry}: these states cannot be used and are computed anew ({error})")
                continue
            self._files |= dict.fromkeys(fits, file)
        return sorted(self._files)


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _fits(states: object, shape: list[int], dtype: torch.dtype) -> bool:
    return states.get_shape() == shape and states.get_dtype() == _NAMES[dtype]  # type: ignore[attr-defined, no-any-return]


def keep_only(folder: Path, key: str | None) -> None:
    """Remove all states in `folder` but those under `key`; under None the folder itself."""
    if key is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.glob("*"):
        if entry.name != key:
            shutil.rmtree(entry, ignore_errors=True)
