"""`TrainState`: the whole state of training, by name and unsharded, for checkpoint, phase change, resume and export."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_llm_ft import __version__
from sparse_llm_ft.checkpoint.record import Count, RunRecord, first_problem
from sparse_llm_ft.errors import CheckpointError, may_pass
from sparse_llm_ft.io.atomic import verify_folder, write_folder
from sparse_llm_ft.io.strict_json_yaml import read_json
from sparse_llm_ft.plan import FEW_KEYS

Tensors = dict[str, torch.Tensor]
"""Parameter name -> value."""

Moments = dict[str, Tensors]
"""Parameter name -> name of the moment (``exp_avg``, ``exp_avg_sq``) -> value."""

STATE_VERSION = 3
TENSORS, STATE = "tensors.safetensors", "state.json"
_VALUE, _CALLBACK = "value", "callback"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class EngineState(TypedDict):
    """What of a `TrainState` lives in an engine (`Engine.state_dict`)."""

    tensors: Tensors
    moments: Moments
    optimizer_steps: dict[str, int]


@dataclass
class TrainState:
    """Every trained tensor with its moments, and everything else that the next step depends on.

    It holds no generators: each step seeds them from (seed, samples, rank).

    Attributes:
        tensors: parameter name -> value, float32, unsharded, on the CPU.
        moments: parameter name -> {"exp_avg": ..., "exp_avg_sq": ...} of the same shape; absent under SGD.
        optimizer_steps: parameter group name -> updates made, for Adam's bias correction.
        phase: the current phase as plain values (`Phase.to_dict`).
        callback, callback_tensors: state of the phase's callback (omega's cuts, AdaLoRA's ranks), if any.
        record: the run's past, for resume and summary.
    """

    tensors: Tensors
    moments: Moments
    optimizer_steps: dict[str, int]
    progress: Progress
    phase: dict[str, Any]
    callback: dict[str, Any] | None = None
    record: RunRecord = field(default_factory=RunRecord.empty)
    callback_tensors: Tensors = field(default_factory=dict)

    @property
    def logged_step(self) -> int:
        """The last step whose line is in metrics.jsonl: that of the state, or the one before (`unvalidated`)."""
        return self.progress.step - (self.record.unvalidated is not None)

    @property
    def engine_state(self) -> EngineState:
        """What `Engine.load_state_dict` takes."""
        return {"tensors": self.tensors, "moments": self.moments, "optimizer_steps": self.optimizer_steps}

    def fresh(self) -> TrainState:
        """The same place in the run with nothing trained: every parameter starts from its initial value."""
        return replace(self, tensors={}, moments={}, optimizer_steps={}, callback=None, callback_tensors={})

    def save(self, folder: Path) -> None:
        """Write the state as safetensors and JSON, atomically and with checksums (`write_folder`)."""

        def fill(temporary: Path) -> None:
            flat = {f"{_VALUE}/{name}": tensor for name, tensor in self.tensors.items()}
            for name, moments in self.moments.items():
                flat |= {f"{key}/{name}": tensor for key, tensor in moments.items()}
            flat |= {f"{_CALLBACK}/{key}": tensor for key, tensor in self.callback_tensors.items()}
            save_file({key: tensor.contiguous() for key, tensor in flat.items()}, temporary / TENSORS)
            (temporary / STATE).write_text(self._text(), encoding="utf-8")

        write_folder(folder, fill)

    def is_saved(self, folder: Path) -> bool:
        """Whether the folder holds an intact checkpoint of this state. Compares everything but the tensors' values."""
        try:
            verify_folder(folder, (TENSORS, STATE))
            return (folder / STATE).read_text(encoding="utf-8") == self._text()
        except (OSError, ValueError, CheckpointError):
            return False

    def _text(self) -> str:
        """The text of state.json: everything but the tensors."""
        data = {
            "version": STATE_VERSION,
            "written_by": __version__,
            "optimizer_steps": self.optimizer_steps,
            "progress": asdict(self.progress),
            "phase": self.phase,
            "callback": self.callback,
            "record": self.record.model_dump(),
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        """Read and verify a checkpoint.

        Raises:
            CheckpointError: a file is missing, damaged, or not of this format; the folder holds other files or links; a
                tensor is not float32 or not finite.
            OSError, SafetensorError: the file server is away; nothing is known of the checkpoint.
        """
        verify_folder(folder, (TENSORS, STATE))
        try:
            data = read_json(folder / STATE, constants=True)  # a metric may have been NaN
            if not isinstance(data, dict) or data.get("version") != STATE_VERSION:
                raise CheckpointError(f"{folder}: {_other_version(data)}")
            flat = load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            if may_pass(error):
                raise
            raise CheckpointError(f"{folder}: not a checkpoint of this format ({error})") from None
        try:
            contents = _Contents.model_validate(data)
            progress = Progress(**contents.progress)
            tensors, moments, callback_tensors = _split(flat)
        except (ValueError, TypeError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise CheckpointError(f"{folder}: not a checkpoint of this format ({problem})") from None
        return cls(
            tensors,
            moments,
            contents.optimizer_steps,
            progress,
            contents.phase,
            contents.callback,
            contents.record,
            callback_tensors,
        )


class _Contents(BaseModel):
    """state.json as it is read. `Phase.from_dict` and `validate_state` check phase and callback."""

    model_config = ConfigDict(strict=True)

    optimizer_steps: Annotated[dict[str, Count], FEW_KEYS]
    progress: Annotated[dict[str, Count], FEW_KEYS]
    phase: dict[str, Any]
    callback: dict[str, Any] | None
    record: RunRecord


def _other_version(data: object) -> str:
    """A line about the release that wrote a state of another format."""
    found = data if isinstance(data, dict) else {}
    author = "an unknown release"
    if "written_by" in found or found.get("version") in (1, 2):  # releases before 0.2 did not name themselves
        author = f"sparse-llm-ft {found.get('written_by', '0.1')!s:.40}"
    return (
        f"format {found.get('version')!r:.40}, written by {author}; "
        f"this release ({__version__}) reads format {STATE_VERSION}"
    )


def _split(flat: Tensors) -> tuple[Tensors, Moments, Tensors]:
    """Values, moments and the callback's tensors. Raises ValueError for any other tensor."""
    tensors: Tensors = {}
    callback_tensors: Tensors = {}
    moments: Moments = {}
    for key, tensor in flat.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{key!r:.100} is {tensor.dtype}, not float32")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key!r:.100} holds a value that is not finite")
        kind, _, name = key.partition("/")
        if kind == _VALUE:
            tensors[name] = tensor
        elif kind == _CALLBACK:
            callback_tensors[name] = tensor
        elif kind in _MOMENTS:
            moments.setdefault(name, {})[kind] = tensor
        else:
            raise ValueError(f"{key!r:.100} is not a tensor of a checkpoint")
    for name, both in moments.items():
        if any(name not in tensors or moment.shape != tensors[name].shape for moment in both.values()):
            raise ValueError(f"the moments of {name!r:.100} are not of its shape")
    return tensors, moments, callback_tensors


@dataclass
class Progress:
    """A run's counters.

    Attributes:
        step: optimizer steps done.
        samples: samples consumed.
        phase: index of the current phase.
        phase_step: optimizer steps done in the current phase.
        phase_skipped: how many of these updates were skipped.
        start_step, start_samples: where the counted part of the run began. A warmup phase before it has its own length
            and schedule, and the data begin anew after it.
    """

    step: int = 0
    samples: int = 0
    phase: int = 0
    phase_step: int = 0
    start_step: int = 0
    start_samples: int = 0
    phase_skipped: int = 0

    @property
    def phase_updates(self) -> int:
        """Updates made in the current phase. Its length and its callback count them, so no last cut is missed."""
        return self.phase_step - self.phase_skipped

    @property
    def counted_steps(self) -> int:
        """Optimizer steps done in the counted part of the run."""
        return self.step - self.start_step

    @property
    def position(self) -> int:
        """Samples consumed in the counted part of the run: its place in the data."""
        return self.samples - self.start_samples
