"""`Phase`: one stretch of training with one plan, as plain values."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sparse_llm_ft.config.derivation import DerivationSettings
from sparse_llm_ft.config.types import MAX_BATCH
from sparse_llm_ft.plan import AdapterPlan, PlanError, Shape

BatchGrowth = Literal["none", "keep_global", "grow_global"]
LrScaling = Literal["none", "sqrt", "linear"]


@dataclass(frozen=True)
class CutRule:
    """How omega is cut; plain values, so that a phase can be saved.

    Attributes:
        keep: K.
        steps: T; the last cut is made after this step of the phase, whatever `every` says.
        every, after: optimizer steps between cuts, and before the first.
        choose: ``omega`` or, for RLoRA, ``random``.
        seed: of the random choice.
    """

    keep: int
    steps: int
    every: int = 1
    after: int = 0
    choose: Literal["omega", "random"] = "omega"
    seed: int = 0


@dataclass(frozen=True)
class Subset:
    """A stratified part of the training set: a `fraction` of it, or `shots` samples of each class."""

    fraction: float | None
    shots: int | None
    seed: int


@dataclass(frozen=True)
class ScoringSpec:
    """What is measured at a phase's end, on its subset.

    Attributes:
        kind: ``lora_output`` gives `OutputScores`, ``derivation`` a `Derivation`.
        derivation: how a derivation is made.
        search: whether ratios are searched for (Algorithm 1), or only importance is measured.
        compare: also measure the other importances, to see how far they agree.
        cache_dir: where derivations are kept; None: the user's cache folder.
    """

    kind: Literal["lora_output", "derivation"]
    derivation: DerivationSettings = field(default_factory=DerivationSettings)
    search: bool = True
    compare: bool = False
    cache_dir: str | None = None


@dataclass(frozen=True)
class Phase:
    """One phase, as plain values: a checkpoint holds it, so that a resumed run need not derive it again.

    Attributes:
        name: for people, and for the method to know its own phases by.
        plan: what is trained.
        steps: optimizer steps of the phase; None: `epochs` decides, or it goes to the end of the run.
        epochs: passes over `subset`.
        target_plan: the plan that the phase prepares, if its own lacks the adapters (a head is fitted alone).
        method: which of the run's methods the phase belongs to, from 0.
        subset: the part of the training set that is used; None: all of it.
        is_warmup: whether the phase precedes the counted part of the run. It has a schedule of its own, and neither
            its steps nor its samples count towards the run's length.
        scoring: what is measured at its end.
        learning_rate: of a warmup phase; None: the run's.
        cut: how omega is cut after each step, if it is.
        omega_lr, omega_algorithm: step rule of trained omegas, constant over the phase.
        lora_b_lr_factor: learning rate of B over that of A (LoRA+).
        batch_growth: what the memory freed since the phase before is used for.
        lr_scaling: how the learning rate follows a grown global batch.
        micro_batch_size, global_batch_size: filled in when the phase begins.
        lr_factor: multiplies the schedule's learning rate; filled in when the phase begins.
    """

    name: str
    plan: AdapterPlan
    steps: int | None = None
    epochs: float | None = None
    target_plan: AdapterPlan | None = None
    method: int = 0
    subset: Subset | None = None
    is_warmup: bool = False
    scoring: ScoringSpec | None = None
    learning_rate: float | None = None
    cut: CutRule | None = None
    omega_lr: float = 0.0
    omega_algorithm: Literal["adamw", "sgd"] = "sgd"
    lora_b_lr_factor: float = 1.0
    batch_growth: BatchGrowth = "none"
    lr_scaling: LrScaling = "none"
    micro_batch_size: int = 0
    global_batch_size: int = 0
    lr_factor: float = 1.0

    @property
    def open_ended(self) -> bool:
        """Whether it goes to the end of the run: where the next method of a chain takes over."""
        return self.steps is None and self.epochs is None

    def with_batch(self, micro_batch_size: int, global_batch_size: int, lr_factor: float = 1.0) -> Phase:
        """The phase with its batch sizes settled."""
        return replace(
            self, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, lr_factor=lr_factor
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same phase back."""
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
            PlanError: a missing or unknown key, a wrong type, a number out of range, a name that is none.
        """
        _check_fields(cls, data, but=("plan", "target_plan", *_PARTS))
        if not _NAME.fullmatch(data["name"]):
            raise PlanError(f"phase name {data['name']!r:.60}; expected letters, digits, _ and -")
        if not 0 <= data["micro_batch_size"] <= data["global_batch_size"] <= MAX_BATCH:
            raise PlanError(f"micro-batch {data['micro_batch_size']}, global batch {data['global_batch_size']}")
        parts: dict[str, Any] = {}
        for name, kind in _PARTS.items():
            if data[name] is not None:
                parts[name] = _read_part(kind, data[name])
        plan = AdapterPlan.from_dict(data["plan"], shapes)
        target_plan = None if data["target_plan"] is None else AdapterPlan.from_dict(data["target_plan"], shapes)
        return cls(**{**data, **parts, "plan": plan, "target_plan": target_plan})


_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
"""A phase's file is called after it."""

_PARTS: dict[str, type[Any]] = {"cut": CutRule, "subset": Subset, "scoring": ScoringSpec}


def _read_part(kind: type[Any], data: Any) -> Any:
    _check_fields(kind, data, but=("derivation",))
    return kind(**data | {"derivation": _read_settings(data["derivation"])}) if "derivation" in data else kind(**data)


def _read_settings(data: Any) -> DerivationSettings:
    keys = DerivationSettings.model_fields.keys()
    if not isinstance(data, Mapping) or data.keys() != keys:
        raise PlanError(f"derivation is an object with the keys {', '.join(keys)}")
    try:
        return DerivationSettings.model_validate(data, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise PlanError(f"{problem['loc'][0]} is {problem['input']!r:.60}") from None


def _check_fields(kind: type[Any], data: Any, but: Collection[str] = ()) -> None:
    """Refuse an object that has not exactly the fields of a dataclass, of their types; numbers are 0 to 2**63.

    Raises:
        PlanError: naming the field.
    """
    hints = get_type_hints(kind)
    if not isinstance(data, Mapping) or set(data) != set(hints):
        raise PlanError(f"{kind.__name__} is an object with the keys {', '.join(hints)}")
    for name in hints.keys() - set(but):
        value = data[name]
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError:
            raise PlanError(f"{name} is {value!r:.60}") from None
        if isinstance(value, int | float) and not 0 <= value < 2**63:  # which NaN is not
            raise PlanError(f"{name} is {value!r:.60}, which is out of range")
