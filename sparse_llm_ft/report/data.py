"""What a run's folder says of it, typed: settings, logged steps, phases and their scores, summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json, read_json, read_yaml
from sparse_llm_ft.plan import AdapterPlan, PlanError, Shape

Pair = tuple[float, float]
"""One value for a module's rows (outputs) and one for its columns (inputs)."""


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl.

    Attributes:
        omega: module -> its weight, in a phase that trains omega; else None.
    """

    step: int
    phase: str
    loss: float
    samples: int
    tokens_per_second: float
    trainable_parameters: int
    active_adapters: int
    validation_loss: float | None = None
    omega: Mapping[str, float] | None = None


@dataclass(frozen=True)
class LoraOutputScores:
    """LoRA-drop: mean squared adapter output `g`, and `y`, its share within the modules of one type."""

    g: Mapping[str, float]
    y: Mapping[str, float]
    kept: frozenset[str]


@dataclass(frozen=True)
class PartialScores:
    """Partial-LoRA: which fraction of each module's rows and columns was kept, and how measures agree on them.

    Attributes:
        importance: the measure that decided.
        overlap: pair of measures -> module -> shared fraction of their most important rows, columns.
    """

    importance: str
    ratios: Mapping[str, Pair]
    overlap: Mapping[str, Mapping[str, Pair]]


@dataclass(frozen=True)
class OmegaScores:
    """WeightLoRA: omega of each adapter when the choice was made."""

    omega: Mapping[str, float]


Scores = LoraOutputScores | PartialScores | OmegaScores


@dataclass(frozen=True)
class Choice:
    """Which modules kept an adapter of their own, and the values that decided.

    Attributes:
        symbol: ``omega`` (WeightLoRA) or ``y`` (LoRA-drop).
    """

    symbol: str
    values: Mapping[str, float]
    kept: frozenset[str]


@dataclass(frozen=True)
class PhaseRecord:
    """One file of ``phases/``.

    Attributes:
        shapes: module -> (out_features, in_features).
        scores: what was measured at the phase's end; None where nothing was, or the phase has not ended.
        delta_norms: module -> Frobenius norm of its trained residual at the phase's end.
    """

    index: int
    name: str
    start_step: int
    plan: AdapterPlan
    shapes: Mapping[str, Shape]
    scores: Scores | None = None
    delta_norms: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PhaseTotals:
    """A phase in numbers. What only the summary of a finished run knows is None before."""

    name: str
    adapters: int
    trainable_parameters: int
    steps: int
    samples: int
    tokens_per_second: float
    optimizer_bytes: int | None = None
    seconds: float | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None


@dataclass(frozen=True)
class RunReport:
    """Everything the report knows of one run.

    Attributes:
        settings: the resolved config, flat: dotted name -> value.
        steps: the logged steps, ascending.
        phases: in order; may end before the phase that is being trained.
        before, after: metrics; empty where nothing was measured.
    """

    folder: Path
    method: str
    model: str
    task: str
    finished: bool
    settings: Mapping[str, Any]
    steps: Sequence[Step]
    phases: Sequence[PhaseRecord]
    totals: Sequence[PhaseTotals]
    before: Mapping[str, float]
    after: Mapping[str, float]
    world_size: int | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def choice(self) -> Choice | None:
        """The first choice among modules that the run has made."""
        for i, phase in enumerate(self.phases):
            if isinstance(phase.scores, LoraOutputScores):
                return Choice("y", phase.scores.y, phase.scores.kept)
            if isinstance(phase.scores, OmegaScores):
                omega, after = phase.scores.omega, self.phases[i + 1 :]
                kept = after[0].plan.active if after else (name for name, value in omega.items() if value > 0)
                return Choice("omega", omega, frozenset(kept))
        return None

    @property
    def partial_scores(self) -> PartialScores | None:
        """What Partial-LoRA measured, if the run has come to it."""
        return next((phase.scores for phase in self.phases if isinstance(phase.scores, PartialScores)), None)

    @property
    def kept_fractions(self) -> Mapping[str, Pair] | None:
        """Which part of its rows and columns each module's mask keeps; before the masks are drawn, what was derived."""
        for phase in self.phases:
            active = phase.plan.active
            if any(adapter.rows or adapter.cols for adapter in active.values()):
                kept = {
                    name: (adapter.shape(phase.shapes[name]), phase.shapes[name]) for name, adapter in active.items()
                }
                return {name: (of[0] / full[0], of[1] / full[1]) for name, (of, full) in kept.items()}
        return (self.partial_scores.ratios or None) if self.partial_scores else None

    @property
    def residual_norms(self) -> Mapping[str, float] | None:
        """Of the last phase where they were measured."""
        return next((phase.delta_norms for phase in reversed(self.phases) if phase.delta_norms), None)

    @classmethod
    def read(cls, folder: str | Path) -> RunReport:
        """Read a run's output_dir; the run need not be finished.

        Raises:
            UserError: the folder holds no run, or a file of it that cannot be read, naming it.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no config.yaml; expected a run's output_dir")
        config = _mapping(folder / "config.yaml")
        steps = list(_steps(folder / "metrics.jsonl"))
        phases = [_phase(path) for path in sorted((folder / "phases").glob("*.json"))]
        summary_file = folder / "summary.json"
        summary = _mapping(summary_file) if summary_file.is_file() else None
        try:
            metrics = summary["metrics"] if summary else {}
            return cls(
                folder,
                method=str(summary["method"]) if summary else _method_name(config["method"]),
                model=str(config["model"]["name"]),
                task=str(config["task"]["name"]),
                finished=summary is not None,
                settings=dict(leaves(config)),
                steps=steps,
                phases=sorted(phases, key=lambda phase: phase.index),
                totals=[_totals(entry) for entry in summary["phases"]] if summary else _totals_so_far(steps),
                before=metrics.get("before") or {},
                after=metrics.get("after") or {},
                world_size=summary["world_size"] if summary else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = summary_file.name if summary else "config.yaml"
            raise _unreadable(folder / name, error) from None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, with their dotted names; of a list of methods by the methods' names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                yield from leaves({k: v for k, v in item.items() if k != "name"}, f"{prefix}{key}.{item['name']}.")
        else:
            yield f"{prefix}{key}", value


def _steps(path: Path) -> Iterator[Step]:
    """All whole lines of updates that were made. The last line may be torn: the run may be writing it, or have been
    killed while it did.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line, constants=True)
            if not record.get("skipped"):
                yield _step(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if number == len(lines) and isinstance(error, ParseError):
                return
            raise UserError(f"{path}:{number}: not a logged step ({error})") from None


def _step(line: Mapping[str, Any]) -> Step:
    return Step(
        int(line["step"]),
        str(line["phase"]),
        float(line["loss"]),
        int(line["samples"]),
        float(line["tokens_per_second"]),
        int(line["trainable_parameters"]),
        int(line["active_adapters"]),
        float(line["validation_loss"]) if line.get("validation_loss") is not None else None,
        _floats(line["omega"]) if line.get("omega") else None,
    )


def _phase(path: Path) -> PhaseRecord:
    data = _mapping(path)
    try:
        norms = data["delta_norms"]
        return PhaseRecord(
            int(data["index"]),
            str(data["name"]),
            int(data["start_step"]),
            AdapterPlan.from_dict(data["plan"]),
            {name: (int(rows), int(columns)) for name, (rows, columns) in data["shapes"].items()},
            _scores(data["scores"]) if data["scores"] else None,
            _floats(norms) if norms else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
        raise _unreadable(path, error) from None


def _scores(data: Mapping[str, Any]) -> Scores | None:
    kind = data["kind"]
    if kind == "lora_output":
        return LoraOutputScores(_floats(data["g"]), _floats(data["y"]), frozenset(data["kept"]))
    if kind == "omega":
        return OmegaScores(_floats(data["omega"]))
    if kind == "partial" and not data["ratios"]:
        return None  # importance alone was measured, for masks whose ratios were given
    if kind == "partial":
        overlap = {str(pair): _pairs(values) for pair, values in data["overlap"].items()}
        return PartialScores(str(data["importance"]), _pairs(data["ratios"]), overlap)
    raise ValueError(f"scores of kind {kind!r}")


def _totals(entry: Mapping[str, Any]) -> PhaseTotals:
    return PhaseTotals(
        str(entry["name"]),
        int(entry["adapters"]),
        int(entry["trainable_parameters"]),
        int(entry["steps"]),
        int(entry["samples"]),
        float(entry["tokens_per_second"]),
        int(entry["optimizer_bytes_per_rank"]),
        float(entry["seconds"]),
        int(entry["micro_batch_size"]),
        int(entry["global_batch_size"]),
    )


def _totals_so_far(steps: Sequence[Step]) -> list[PhaseTotals]:
    """What the logged steps say of the phases of a run that has no summary yet."""
    found: list[PhaseTotals] = []
    step = samples = 0
    for name, group in groupby(steps, key=lambda line: line.phase):
        lines = list(group)
        last = lines[-1]
        speed = sum(line.tokens_per_second for line in lines) / len(lines)
        found.append(
            PhaseTotals(
                name, last.active_adapters, last.trainable_parameters, last.step - step, last.samples - samples, speed
            )
        )
        step, samples = last.step, last.samples
    return found


def _method_name(method: Any) -> str:
    """Of one method, or of several in their order."""
    return " + ".join(_method_name(one) for one in method) if isinstance(method, list) else str(method["name"])


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path) if path.suffix == ".yaml" else read_json(path, constants=True)
    except (OSError, ParseError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not readable (expected a mapping)")
    return data


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _pairs(values: Mapping[str, Any]) -> dict[str, Pair]:
    return {name: (float(rows), float(columns)) for name, (rows, columns) in values.items()}


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not readable ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    )
