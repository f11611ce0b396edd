"""What a run's folder says about the run: settings, logged steps, phases and summary, checked while they are read.

Records of the run's files stay mappings with the files' own keys. The tables below list the keys that the report draws,
each with a function that converts the value or raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json, read_json, read_yaml
from sparse_llm_ft.plan import AdapterPlan

Record = Mapping[str, Any]
"""One object in a file of the run."""
Pair = tuple[float, float]
"""One value for a module's rows (outputs) and one for its columns (inputs)."""
_Converters = Mapping[str, Callable[[Any], Any]]

_INVALID = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What a converter raises for a value that it does not accept, and a missing key."""


T = TypeVar("T")
_Some = Annotated[dict[str, T], Field(min_length=1)]
_Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Side = Annotated[int, Field(ge=1)]

_floats = TypeAdapter(dict[str, float]).validate_python
_some_floats = TypeAdapter(_Some[float]).validate_python
_bytes = TypeAdapter(dict[str, NonNegativeInt]).validate_python
_size = TypeAdapter(NonNegativeInt).validate_python
_pairs = TypeAdapter(dict[str, Pair]).validate_python
_shapes = TypeAdapter(dict[str, tuple[_Side, _Side]]).validate_python
_overlap = TypeAdapter(dict[str, _Some[Pair]]).validate_python
_count = TypeAdapter(_Count).validate_python


def _named_bytes(*names: str) -> Callable[[Any], dict[str, int]]:
    """A converter of bytes by name, which wants these names and takes others too."""

    def convert(value: Any) -> dict[str, int]:
        found = _bytes(value)
        if missing := [name for name in names if name not in found]:
            raise KeyError(missing[0])
        return found

    return convert


def _scores(scores: Record) -> dict[str, Any]:
    if scores["kind"] not in _SCORES:
        raise ValueError(f"scores of kind {scores['kind']!r}")
    return _converted(scores, {"kind": str, **_SCORES[scores["kind"]]})


_STEP = {
    "step": int,
    "phase": str,
    "loss": float,
    "samples": int,
    "tokens_per_second": float,
    "trainable_parameters": int,
    "active_adapters": int,
}
_STEP_EXTRAS: _Converters = {
    "validation_loss": float,
    "omega": _floats,
    "peak_memory_bytes": _size,
    "reserved_memory_bytes": _size,
}
_PLANNED: _Converters = {
    "name": str,
    "micro_batch_size": _size,
    "lines": _named_bytes("base", "adapters", "optimizer", "device_overhead"),
    "peaks": _named_bytes("step"),
}
_PHASE: _Converters = {"index": int, "name": str, "plan": AdapterPlan.from_dict, "shapes": _shapes}
_PHASE_END: _Converters = {"scores": _scores, "delta_norms": _floats}
_SCORES: Mapping[str, _Converters] = {
    "lora_output": {"y": _some_floats, "kept": frozenset},
    "entries": {"samples": int},
    "omega": {"omega": _some_floats},
    "partial": {"ratios": _pairs, "overlap": _overlap},
}

PHASE_NUMBERS = {
    "steps": "optimizer steps",
    "samples": "samples",
    "adapters": "adapters",
    "trainable_parameters": "trainable parameters",
    "optimizer_bytes_per_rank": "optimizer bytes per rank",
    "micro_batch_size": "micro-batch",
    "global_batch_size": "global batch",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
}
"""A phase's numbers in the summary: key -> label."""

MFU = "share of the GPUs' peak (MFU)"
"""Label of ``mfu``, which a summary has for GPUs whose peak is known."""


class Choice(NamedTuple):
    """Which modules kept an adapter of their own, and the values that decided: ``omega`` (WeightLoRA) or ``y``."""

    symbol: str
    values: Mapping[str, float]
    kept: frozenset[str]


@dataclass(frozen=True)
class RunReport:
    """Everything that the report draws of one run.

    Attributes:
        settings: the resolved config, flat: dotted name -> value.
        steps: the logged steps that made an update, ascending.
        phases: the files of ``phases/`` in order, with an `AdapterPlan` as plan; the phase in training may be missing.
        totals: each phase's numbers; before the run is finished without those that only its summary has.
        before, after: metrics; empty where nothing was measured.
        forecast: the phases as planned from the settings and samples; empty where none were.
        process_bytes: what the process held before it loaded the base, on a CPU.
    """

    folder: Path
    method: str
    model: str
    task: str
    finished: bool
    settings: Record
    steps: Sequence[Record]
    phases: Sequence[Record]
    totals: Sequence[Record]
    before: Mapping[str, float]
    after: Mapping[str, float]
    world_size: int | None = None
    forecast: Sequence[Record] = ()
    process_bytes: int = 0

    @property
    def choice(self) -> Choice | None:
        """The run's first choice among modules."""
        for i, phase in enumerate(self.phases):
            scores = phase["scores"] or {}
            if "y" in scores:
                return Choice("y", scores["y"], scores["kept"])
            if "omega" in scores:
                omega, after = scores["omega"], self.phases[i + 1 :]
                kept = after[0]["plan"].active if after else (name for name, value in omega.items() if value > 0)
                return Choice("omega", omega, frozenset(kept))
        return None

    @property
    def partial_scores(self) -> Record | None:
        """What Partial-LoRA derived: ``ratios``, module -> fractions of rows and columns to keep, and ``overlap``, pair
        of measures -> module -> shared fractions of their most important rows and columns.
        """
        scores = [phase["scores"] for phase in self.phases if phase["scores"]]
        return next((one for one in scores if one.get("ratios")), None)  # none where they were given, not derived

    @property
    def kept_fractions(self) -> Mapping[str, Pair] | None:
        """Module -> fractions of rows and columns that its mask keeps; the derived ones before masks are drawn."""
        for phase in self.phases:
            active, shapes = phase["plan"].active, phase["shapes"]
            if any(adapter.rows or adapter.cols for adapter in active.values()):
                kept = {name: adapter.shape(shapes[name]) for name, adapter in active.items()}
                return {name: (of[0] / shapes[name][0], of[1] / shapes[name][1]) for name, of in kept.items()}
        return self.partial_scores["ratios"] if self.partial_scores else None

    @property
    def residual_norms(self) -> Mapping[str, float] | None:
        """Module -> Frobenius norm of its trained residual at the end of the last phase that measured them."""
        return next((phase["delta_norms"] for phase in reversed(self.phases) if phase["delta_norms"]), None)

    @classmethod
    def read(cls, folder: str | Path) -> RunReport:
        """Read a run's output_dir; the run need not be finished.

        Raises:
            UserError: the folder holds no run, or a file that cannot be read, with the file's name.
        """
        folder = Path(folder)
        config_file, summary_file = folder / "config.yaml", folder / "summary.json"
        if not config_file.is_file():
            raise UserError(f"{folder}: no config.yaml; expected a run's output_dir")
        with _reading(config_file) as config:
            methods = config["method"] if isinstance(config["method"], list) else [config["method"]]
            method = " + ".join(str(one["name"]) for one in methods)
            model, task = str(config["model"]["name"]), str(config["task"]["name"])
            settings = dict(leaves(config))
        steps = list(_steps(folder / "metrics.jsonl"))
        phases = [_phase(path) for path in sorted((folder / "phases").glob("*.json"))]
        phases.sort(key=lambda phase: phase["index"])
        run = cls(folder, method, model, task, False, settings, steps, phases, _totals_so_far(steps), {}, {})
        if (forecast_file := folder / "forecast.json").is_file():
            with _reading(forecast_file) as data:
                planned = [_converted(phase, _PLANNED) for phase in data["phases"]]
                process_bytes = _size(data.get("process_bytes") or 0)
            run = replace(run, forecast=planned, process_bytes=process_bytes)
        if not summary_file.is_file():
            return run
        with _reading(summary_file) as summary:
            numbers = dict.fromkeys(PHASE_NUMBERS, _count)
            extras = {"mfu": _count, "base_bytes_per_rank": _size, "adapter_bytes_per_rank": _size}
            totals = [_converted(phase, {"name": str, **numbers}, extras) for phase in summary["phases"]]
            before, after = (_floats(summary["metrics"].get(when) or {}) for when in ("before", "after"))
            world_size = int(summary["world_size"])
        return replace(run, finished=True, totals=totals, before=before, after=after, world_size=world_size)


def leaves(tree: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted name; items of a list of methods go by the method's name."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                yield from leaves({k: v for k, v in item.items() if k != "name"}, f"{prefix}{key}.{item['name']}.")
        else:
            yield f"{prefix}{key}", value


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of updates that were made. A torn last line is left out: the run is writing it, or was killed there."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line, constants=True)
            if not record.get("skipped"):
                yield _converted(record, _STEP, _STEP_EXTRAS)
        except _INVALID as error:
            if number == len(lines) and isinstance(error, ParseError):
                return
            raise UserError(f"{path}:{number}: not a logged step ({_problem(error)})") from None


def _phase(path: Path) -> dict[str, Any]:
    with _reading(path) as data:
        phase = _converted(data, _PHASE, _PHASE_END)
        unknown = phase["plan"].active.keys() - phase["shapes"]
        if unknown:
            raise ValueError(f"no shape of {min(unknown)}")
    return phase


def _totals_so_far(steps: Sequence[Record]) -> list[Record]:
    """The phases' numbers as far as logged steps show them, for a run without summary."""
    found: list[Record] = []
    step = samples = 0
    for name, group in groupby(steps, key=lambda line: line["phase"]):
        lines = list(group)
        last = lines[-1]
        found.append(
            {
                "name": name,
                "adapters": last["active_adapters"],
                "trainable_parameters": last["trainable_parameters"],
                "steps": last["step"] - step,
                "samples": last["samples"] - samples,
                "tokens_per_second": sum(line["tokens_per_second"] for line in lines) / len(lines),
            }
        )
        step, samples = last["step"], last["samples"]
    return found


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the mapping in a JSON or YAML file; an error in it or in reading its keys becomes a `UserError`."""
    try:
        data = read_yaml(path) if path.suffix == ".yaml" else read_json(path, constants=True)
        if not isinstance(data, dict):
            raise TypeError("expected a mapping")
        yield data
    except (OSError, *_INVALID) as error:
        raise UserError(f"{path}: not readable ({type(error).__name__}: {_problem(error)})") from None


def _problem(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        return ": ".join([*map(str, first["loc"]), first["msg"]])
    return (str(error).splitlines() or [""])[0]


def _converted(record: Record, required: _Converters, optional: _Converters | None = None) -> dict[str, Any]:
    """The named values of `record`; an optional one is None where it is missing or null."""
    extras = {key: convert for key, convert in (optional or {}).items() if record.get(key) is not None}
    found = {key: convert(record[key]) for key, convert in {**required, **extras}.items()}
    return {**dict.fromkeys(optional or ()), **found}
