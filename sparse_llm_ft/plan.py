"""`AdapterPlan`: which target module has which adapter. Methods write it; tuner, engine, export and report read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

Shape = tuple[int, int]
"""(out_features, in_features) of a target module, as its weight is stored."""

PLAN_VERSION = 1


class PlanError(ValueError):
    """A plan that contradicts itself or the model it is applied to."""


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module: ``y = W x + omega * (lora_alpha / r) * B A x``.

    Attributes:
        r: rank; A has shape ``(r, in_features)``, B ``(out_features, r)``.
        lora_alpha: numerator of the scaling.
        omega: the adapter's weight. Its start value where `train_omega`, else a constant of the forward pass.
        train_omega: whether omega is a trained parameter (WeightLoRA, eq. 3).
    """

    r: int
    lora_alpha: float
    omega: float = 1.0
    train_omega: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise PlanError(f"r is {self.r!r}; a module's rank must be an integer of at least 1")
        for name in ("lora_alpha", "omega"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise PlanError(f"{name} is {value!r:.40}; it must be a finite number")
        if not isinstance(self.train_omega, bool):
            raise PlanError(f"train_omega is {self.train_omega!r}; it must be true or false")

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, without omega."""
        return self.lora_alpha / self.r

    def parameters(self, shape: Shape) -> int:
        """Number of trained values on a module of `shape`: A, B and, where it is trained, omega."""
        return self.r * (shape[0] + shape[1]) + int(self.train_omega)


@dataclass(frozen=True)
class AdapterPlan:
    """For every target module its own adapter, or None where the base layer stays untouched.

    Attributes:
        modules: full module name in the base model -> its adapter. The order is the model's.
        lora_dropout: dropout probability on the adapters' input.
    """

    modules: Mapping[str, ModuleAdapter | None]
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not any(self.modules.values()):
            raise PlanError("a plan needs at least one module with an adapter")
        if not _is_finite(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise PlanError(f"lora_dropout is {self.lora_dropout!r}; it must lie in [0, 1)")

    @property
    def active(self) -> dict[str, ModuleAdapter]:
        """The modules that have an adapter, in the model's order."""
        return {name: adapter for name, adapter in self.modules.items() if adapter is not None}

    def parameters(self, shapes: Mapping[str, Shape]) -> int:
        """Number of trained values, given every active module's shape."""
        return sum(adapter.parameters(shapes[name]) for name, adapter in self.active.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same plan back."""
        modules = {name: None if a is None else asdict(a) for name, a in self.modules.items()}
        return {"version": PLAN_VERSION, "lora_dropout": self.lora_dropout, "modules": modules}

    @classmethod
    def from_dict(cls, data: Any) -> AdapterPlan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: a missing or unknown key, a wrong type, or another version, naming the module.
        """
        if not isinstance(data, dict) or set(data) != {"version", "lora_dropout", "modules"}:
            raise PlanError("a plan is an object with the keys version, lora_dropout and modules")
        if type(data["version"]) is not int or data["version"] != PLAN_VERSION:
            raise PlanError(f"plan version {data['version']!r} is not supported; this release reads {PLAN_VERSION}")
        if not isinstance(data["modules"], dict):
            raise PlanError("a plan's modules must be an object")
        if not _is_finite(data["lora_dropout"]):
            raise PlanError(f"a plan's lora_dropout is {data['lora_dropout']!r:.40}; it must be a number")
        return cls(
            {name: _module_from_dict(name, value) for name, value in data["modules"].items()},
            float(data["lora_dropout"]),
        )


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _module_from_dict(name: str, value: Any) -> ModuleAdapter | None:
    if value is None:
        return None
    known = {field.name for field in fields(ModuleAdapter)}
    if not isinstance(value, dict) or set(value) != known:
        raise PlanError(f"module {name!r} needs exactly the keys {', '.join(sorted(known))}")
    try:
        return ModuleAdapter(**value)
    except PlanError as error:
        raise PlanError(f"module {name!r}: {error}") from None


def uniform_plan(
    targets: Mapping[str, Shape], r: int, lora_alpha: float, lora_dropout: float = 0.0, train_omega: bool = False
) -> AdapterPlan:
    """The same adapter on every target; the rank is cut to the smaller side of a smaller matrix.

    A cut rank keeps the scaling ``lora_alpha / r`` of the others.

    Args:
        targets: module name -> (out_features, in_features).
    """
    modules = {}
    for name, shape in targets.items():
        rank = min(r, *shape)
        modules[name] = ModuleAdapter(r=rank, lora_alpha=lora_alpha * rank / r, train_omega=train_omega)
    return AdapterPlan(modules, lora_dropout)
