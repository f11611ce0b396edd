"""`Phase`: a part of a run that trains one plan, as plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sparse_llm_ft.config.derivation import DerivationSettings
from sparse_llm_ft.config.types import MAX_BATCH
from sparse_llm_ft.plan import AdapterPlan, PlanError, Shape, check_fields

BatchGrowth = Literal["none", "keep_global", "grow_global"]
LrScaling = Literal["none", "sqrt", "linear"]

Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class CutRule:
    """How omega is cut.

    Attributes:
        keep: K.
        steps: T; the last cut comes after this step of the phase, whatever `every` says.
        every, after: optimizer steps between cuts, and before the first.
        choose: ``omega`` or, for RLoRA, ``random``.
        seed: of the random choice.
        first: how many of the plan's adapters, from the lowest up, may not stay.
    """

    keep: Count
    steps: Count
    every: Count = 1
    after: Count = 0
    choose: Literal["omega", "random"] = "omega"
    seed: Count = 0
    first: Count = 0


@dataclass(frozen=True)
class Subset:
    """A stratified part of the training set: a `fraction` of it, or `shots` samples of each class; with neither, what
    the task has for a few-shot set (`default_size`).

    Attributes:
        part: ``half``: only every other sample of each class; ``other_half``: those that ``half`` leaves out.
    """

    fraction: Amount | None
    shots: Count | None
    seed: Count
    part: Literal["all", "half", "other_half"] = "all"


@dataclass(frozen=True)
class ScoringSpec:
    """What is scored at a phase's end, on `Phase.scored`.

    Attributes:
        kind: ``lora_output`` gives `OutputScores`, ``entries`` `EntryScores`, ``derivation`` a `Derivation`.
        derivation: settings of a derivation.
        search: whether to derive ratios, or only to compute importance.
        compare: also compute the other importances, to see how far they agree.
        cache_dir: folder of cached derivations; None: the user's cache folder.
    """

    kind: Literal["lora_output", "entries", "derivation"]
    derivation: DerivationSettings = field(default_factory=DerivationSettings)
    search: bool = True
    compare: bool = False
    cache_dir: str | None = None


@dataclass(frozen=True)
class Phase:
    """A phase as plain values. A checkpoint holds it, so that a resumed run need not derive it again.

    Attributes:
        name: for people, and for the method to recognise its own phases.
        plan: what is trained.
        steps: optimizer steps of the phase; None: `epochs` decides, or the phase lasts to the end of the run.
        epochs: passes over `subset`.
        target_plan: the plan that the phase prepares, if its own plan lacks the adapters (when only a head is fitted).
        method: index of the run's method that the phase belongs to.
        subset: the part of the training set that is used; None: all of it.
        is_warmup: whether the phase precedes the counted part of the run. It has a schedule of its own, and neither
            its steps nor its samples count towards the run's length.
        scoring: what is scored at its end.
        learning_rate: of a warmup phase; None: the run's.
        cut: how omega is cut after each step; None: it is not.
        omega_lr, omega_algorithm: learning rate and optimizer of trained omegas, constant over the phase.
        lora_b_lr_factor: B's learning rate divided by A's (LoRA+).
        batch_growth: how the batch uses memory freed since the phase before.
        lr_scaling: how the learning rate follows a grown global batch.
        micro_batch_size, global_batch_size: set when the phase begins.
        lr_factor: multiplies the schedule's learning rate; set when the phase begins.
    """

    name: str
    plan: AdapterPlan
    steps: Count | None = None
    epochs: Amount | None = None
    target_plan: AdapterPlan | None = None
    method: Count = 0
    subset: Subset | None = None
    is_warmup: bool = False
    scoring: ScoringSpec | None = None
    learning_rate: Amount | None = None
    cut: CutRule | None = None
    omega_lr: Amount = 0.0
    omega_algorithm: Literal["adamw", "sgd"] = "sgd"
    lora_b_lr_factor: Amount = 1.0
    batch_growth: BatchGrowth = "none"
    lr_scaling: LrScaling = "none"
    micro_batch_size: Count = 0
    global_batch_size: Count = 0
    lr_factor: Amount = 1.0

    @property
    def scored(self) -> Subset | None:
        """What scores are taken on: `subset`, or where half of it is trained on, the other half."""
        if self.subset is None or self.subset.part == "all":
            return self.subset
        return replace(self.subset, part="other_half")

    @property
    def open_ended(self) -> bool:
        """Whether it lasts to the end of the run. Such a phase is taken over by the next method of a chain."""
        return self.steps is None and self.epochs is None

    def with_batch(self, micro_batch_size: int, global_batch_size: int, lr_factor: float = 1.0) -> Phase:
        """The phase with these batch sizes."""
        return replace(
            self, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, lr_factor=lr_factor
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `from_dict` makes the same phase."""
        parts = {name: (part := getattr(self, name)) and TypeAdapter(type(part)).dump_python(part) for name in _PARTS}
        return (
            vars(self)
            | parts
            | {"plan": self.plan.to_dict(), "target_plan": self.target_plan and self.target_plan.to_dict()}
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> Phase:
        """Read what `to_dict` wrote.

        Args:
            shapes: as in `AdapterPlan.from_dict`.

        Raises:
            PlanError: a missing or unknown key, a wrong type, a number out of range, a name with other characters.
        """
        plan = partial(AdapterPlan.from_dict, shapes=shapes)
        readers: dict[str, Callable[[Any], object]] = {"plan": plan, "target_plan": plan}
        readers |= {name: partial(_read_part, kind) for name, kind in _PARTS.items()}
        values = dict(data) if isinstance(data, Mapping) else {}
        for name, read in readers.items():
            if values.get(name) is not None:
                values[name] = read(values[name])
        check_fields(cls, values)
        phase = cls(**values)
        if not _NAME.fullmatch(phase.name):
            raise PlanError(f"phase name {phase.name!r:.60}; expected letters, digits, _ and -")
        if not 0 <= phase.micro_batch_size <= phase.global_batch_size <= MAX_BATCH:
            raise PlanError(f"micro-batch {phase.micro_batch_size}, global batch {phase.global_batch_size}")
        return phase


_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
"""A phase's file has its name."""

_PARTS: dict[str, type[CutRule | Subset | ScoringSpec]] = {"cut": CutRule, "subset": Subset, "scoring": ScoringSpec}


def _read_part(kind: type[CutRule | Subset | ScoringSpec], data: Any) -> CutRule | Subset | ScoringSpec:
    if isinstance(data, Mapping) and "derivation" in data:
        data = {**data, "derivation": _read_settings(data["derivation"])}
    check_fields(kind, data)
    return kind(**data)


def _read_settings(data: object) -> DerivationSettings:
    keys = DerivationSettings.model_fields.keys()
    if not isinstance(data, Mapping) or data.keys() != keys:
        raise PlanError(f"derivation is an object with the keys {', '.join(keys)}")
    try:
        return DerivationSettings.model_validate(data, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise PlanError(f"{problem['loc'][0]} is {problem['input']!r:.60}") from None
