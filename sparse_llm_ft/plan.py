"""`AdapterPlan`: which target module has which adapter. Methods write it; tuner, engine, export and report read it."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from sparse_llm_ft.errors import one_line

Shape = tuple[int, int]
"""(out_features, in_features) of a target module, as its weight is stored."""

PLAN_VERSION = 3

Masking = Literal["compact", "optimizer"]
"""Where masks live: in the layers, whose A and B have only the kept rows and columns, or in the sharded optimizer."""

FULL_MODEL = ""
"""In `AdapterPlan.trained`: the base model itself, which is full fine-tuning."""


MAX_RANK = 2**16
"""More than any adapter needs, and little enough to be allocated where a plan claims it."""


class PlanError(ValueError):
    """A plan that contradicts itself or the model it is applied to; said in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class IndexMask:
    """Which rows of B, or columns of A, exist: ascending indices out of `size`.

    Attributes:
        size: out_features (rows) or in_features (columns) of the module.
    """

    size: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indices:
            raise PlanError("a mask keeps at least one row and one column")
        if self.indices[0] < 0 or self.indices[-1] >= self.size:
            raise PlanError(f"kept indices must lie in 0 to {self.size - 1}")
        if any(a >= b for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise PlanError("kept indices must ascend")

    @classmethod
    def of(cls, size: int, indices: Sequence[int]) -> IndexMask | None:
        """None, that is no mask, where all are kept."""
        return None if len(indices) == size else cls(size, tuple(indices))

    def to_dict(self) -> dict[str, Any]:
        """One bit an index, packed: plans of large models are read and written at every phase."""
        bits = bytearray((self.size + 7) // 8)
        for index in self.indices:
            bits[index // 8] |= 1 << index % 8
        return {"size": self.size, "bits": base64.b64encode(bits).decode()}

    @classmethod
    def from_dict(cls, data: Any, side: int | None = None) -> IndexMask:
        """Read what `to_dict` wrote. A size is believed only as far as there are bits for it.

        Args:
            side: the size that it must have; None: any.

        Raises:
            PlanError: it is something else.
        """
        if not isinstance(data, dict) or set(data) != {"size", "bits"} or type(data["size"]) is not int:
            raise PlanError(f"{data!r:.60} is no mask")
        size = data["size"]
        if side is not None and size != side:
            raise PlanError(f"a mask of size {size!r:.40} where its matrix has {side}")
        try:
            bits = base64.b64decode(data["bits"], validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise PlanError(f"{data!r:.60} is no mask") from None
        if len(bits) != (size + 7) // 8:
            raise PlanError(f"a mask of size {size!r:.40} has {len(bits)} bytes")
        return cls(size, tuple(i for i in range(len(bits) * 8) if bits[i // 8] >> i % 8 & 1))


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module: ``y = W x + omega * (lora_alpha / r) * scatter_rows(B A x[cols])``.

    Attributes:
        r: rank; A has shape ``(r, kept columns)``, B ``(kept rows, r)``.
        lora_alpha: numerator of the scaling.
        omega: the adapter's weight. Its start value where `train_omega`, else a constant of the forward pass.
        train_omega: whether omega is a trained parameter (WeightLoRA, eq. 3).
        group: modules of one group share one A and one B (LoRA-drop); None: its own.
        rows, cols: which outputs the adapter writes and which inputs it reads (Partial-LoRA, eq. 6); None: all.
    """

    r: int
    lora_alpha: float
    omega: float = 1.0
    train_omega: bool = False
    group: str | None = None
    rows: IndexMask | None = None
    cols: IndexMask | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 1 <= self.r <= MAX_RANK:
            raise PlanError(f"r is {self.r!r:.40}; a module's rank must be an integer of 1 to {MAX_RANK:,}")
        for name in ("lora_alpha", "omega"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise PlanError(f"{name} is {value!r:.40}; it must be a finite number")
        if not isinstance(self.train_omega, bool):
            raise PlanError(f"train_omega is {self.train_omega!r:.40}; it must be true or false")
        if self.group is not None and (not isinstance(self.group, str) or not self.group or "." in self.group):
            raise PlanError(f"group is {self.group!r:.40}; it must be a name without dots")

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, without omega."""
        return self.lora_alpha / self.r

    def shape(self, shape: Shape) -> Shape:
        """(kept rows, kept columns) on a module of `shape`: the sides of B and A."""
        return (
            len(self.rows.indices) if self.rows else shape[0],
            len(self.cols.indices) if self.cols else shape[1],
        )

    def matrices(self, shape: Shape) -> int:
        """Number of values in A and B on a module of `shape`."""
        return self.r * sum(self.shape(shape))


@dataclass(frozen=True)
class AdapterPlan:
    """For every target module its own adapter, a shared one, or None where the base layer stays untouched.

    Attributes:
        modules: full module name in the base model -> its adapter. The order is the model's.
        lora_dropout: dropout probability on the adapters' input.
        tuner: name of the layers that carry the adapters: this package's own, or PEFT's (adapters/tuners.py).
        options: further numbers that the tuner needs (AdaLoRA's schedule).
        trained: modules of the base that are trained whole beside the adapters: a fresh classification head, or
            `FULL_MODEL`.
        masking: where the masks of the adapters live.
    """

    modules: Mapping[str, ModuleAdapter | None]
    lora_dropout: float = 0.0
    tuner: str = "sparse_lora"
    options: Mapping[str, float] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    masking: Masking = "compact"

    def __post_init__(self) -> None:
        if not any(self.modules.values()) and not self.trained:
            raise PlanError("a plan needs at least one module with an adapter, or one trained whole")
        if not _is_finite(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise PlanError(f"lora_dropout is {self.lora_dropout!r:.40}; it must lie in [0, 1)")
        if not isinstance(self.tuner, str):
            raise PlanError(f"tuner is {self.tuner!r:.40}; it must be a name")
        for key, value in self.options.items():
            if not _is_finite(value):
                raise PlanError(f"option {key!r:.40} is {value!r:.40}; it must be a finite number")
        if self.masking not in get_args(Masking):
            raise PlanError(f"masking is {self.masking!r:.40}; known: {', '.join(get_args(Masking))}")
        self._check_groups()

    def _check_groups(self) -> None:
        """All members of a group have the same adapter, but for omega, which is each module's own."""
        for group, names in self.groups.items():
            alike = {(a.r, a.lora_alpha, a.rows, a.cols) for name in names if (a := self.modules[name]) is not None}
            if len(alike) > 1:
                raise PlanError(f"group {group!r}: its modules differ in rank, lora_alpha or mask")

    @property
    def active(self) -> dict[str, ModuleAdapter]:
        """The modules that have an adapter, in the model's order."""
        return {name: adapter for name, adapter in self.modules.items() if adapter is not None}

    @property
    def layers(self) -> dict[str, ModuleAdapter]:
        """The active adapters as their layers are built: whole ones where masks live in the optimizer."""
        if self.masking == "compact":
            return self.active
        return {name: replace(adapter, rows=None, cols=None) for name, adapter in self.active.items()}

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group -> the modules that share its adapter."""
        found: dict[str, list[str]] = {}
        for name, adapter in self.active.items():
            if adapter.group is not None:
                found.setdefault(adapter.group, []).append(name)
        return found

    @property
    def owners(self) -> dict[str, str]:
        """Active module -> under whose name its A and B are kept: its own, or its group's (``shared.<group>``)."""
        return {name: name if a.group is None else f"{SHARED}.{a.group}" for name, a in self.active.items()}

    def matrix_owners(self) -> dict[str, str]:
        """Each pair of A and B once: owner -> the first module that uses it."""
        first: dict[str, str] = {}
        for name, owner in self.owners.items():
            first.setdefault(owner, name)
        return first

    def describe(self) -> str:
        """For people: ``18 adapters``, ``3 own and 15 shared adapters``, ``classifier``, ``all parameters``."""
        if FULL_MODEL in self.trained:
            return "all parameters"
        shared = sum(a.group is not None for a in self.active.values())
        own = len(self.active) - shared
        if not self.active:
            return ", ".join(self.trained)
        return f"{own} own and {shared} shared adapters" if shared else f"{own} adapters"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same plan back."""
        return {
            "version": PLAN_VERSION,
            "lora_dropout": self.lora_dropout,
            "tuner": self.tuner,
            "options": dict(self.options),
            "trained": list(self.trained),
            "masking": self.masking,
            "modules": {name: None if a is None else _module_to_dict(a) for name, a in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, data: Any, shapes: Mapping[str, Shape] | None = None) -> AdapterPlan:
        """Read what `to_dict` wrote.

        Args:
            shapes: of the modules there are: masks must be of their sizes, so that none is built at a size that is only
                claimed. None: any names and sizes.

        Raises:
            PlanError: a missing or unknown key, a wrong type, or another version, naming the module.
        """
        keys = {"version", *(known.name for known in fields(cls))}
        if not isinstance(data, dict) or "version" not in data:
            raise PlanError(f"a plan is an object with the keys {', '.join(sorted(keys))}")
        if type(data["version"]) is not int or data["version"] != PLAN_VERSION:
            raise PlanError(f"plan version {data['version']!r:.40} is not supported; this release reads {PLAN_VERSION}")
        if set(data) != keys:
            raise PlanError(f"a plan is an object with the keys {', '.join(sorted(keys))}")
        if not isinstance(data["modules"], dict) or not isinstance(data["options"], dict):
            raise PlanError("a plan's modules and options must be objects")
        if not isinstance(data["trained"], list) or not all(isinstance(name, str) for name in data["trained"]):
            raise PlanError("a plan's trained must be a list of module names")
        if not _is_finite(data["lora_dropout"]):
            raise PlanError(f"a plan's lora_dropout is {data['lora_dropout']!r:.40}; it must be a number")
        return cls(
            {name: _module_from_dict(name, value, shapes) for name, value in data["modules"].items()},
            float(data["lora_dropout"]),
            data["tuner"],
            data["options"],
            tuple(data["trained"]),
            data["masking"],
        )


SHARED = "shared"
"""First part of the names of parameters that a group shares."""


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _module_to_dict(adapter: ModuleAdapter) -> dict[str, Any]:
    masks = {name: kept.to_dict() for name in ("rows", "cols") if (kept := getattr(adapter, name)) is not None}
    return {known.name: getattr(adapter, known.name) for known in fields(adapter)} | masks


def _module_from_dict(name: str, value: Any, shapes: Mapping[str, Shape] | None) -> ModuleAdapter | None:
    if shapes is not None and name not in shapes:
        raise PlanError(f"the plan names module {name!r:.60}, which is no target module of the model")
    if value is None:
        return None
    known = {field.name for field in fields(ModuleAdapter)}
    if not isinstance(value, dict) or set(value) != known:
        raise PlanError(f"module {name!r:.60} needs exactly the keys {', '.join(sorted(known))}")
    try:
        sides = (None, None) if shapes is None else shapes[name]
        masks = {
            key: None if value[key] is None else IndexMask.from_dict(value[key], side)
            for key, side in zip(("rows", "cols"), sides, strict=True)
        }
        return ModuleAdapter(**(value | masks))
    except PlanError as error:
        raise PlanError(f"module {name!r:.60}: {error}") from None


def uniform_plan(
    targets: Mapping[str, Shape], r: int, lora_alpha: float, lora_dropout: float = 0.0, trained: tuple[str, ...] = ()
) -> AdapterPlan:
    """The same adapter on every target; the rank is cut to the smaller side of a smaller matrix.

    A cut rank keeps the scaling ``lora_alpha / r`` of the others.

    Args:
        targets: module name -> (out_features, in_features).
        trained: as in `AdapterPlan`.
    """
    modules = {}
    for name, shape in targets.items():
        rank = min(r, *shape)
        modules[name] = ModuleAdapter(r=rank, lora_alpha=lora_alpha * rank / r)
    return AdapterPlan(modules, lora_dropout, trained=trained)


def with_omega(plan: AdapterPlan) -> AdapterPlan:
    """The plan with a trained omega, starting at 1, on every adapter."""
    modules = {name: a and replace(a, omega=1.0, train_omega=True) for name, a in plan.modules.items()}
    return replace(plan, modules=modules)


class ModuleName(NamedTuple):
    """The parts of a module's name: ``model.layers.3.self_attn.q_proj`` is stack ``model.layers``, number 3, rest
    ``self_attn.q_proj``. The outermost number counts. A name without number is its parent, None and its last part.
    """

    stack: str
    number: int | None
    rest: str

    @classmethod
    def parse(cls, name: str) -> ModuleName:
        """Split the full name of a module."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                return cls(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
        return cls(".".join(parts[:-1]), None, parts[-1])

    @property
    def block(self) -> str:
        """Name of the numbered layer that holds the module."""
        return f"{self.stack}.{self.number}".removeprefix(".")


def module_kind(name: str) -> str:
    """What a module is in its layer: ``model.layers.3.self_attn.q_proj`` -> ``self_attn.q_proj``. Further numbers, an
    expert's for instance, are left out.
    """
    return ".".join(part for part in ModuleName.parse(name).rest.split(".") if not part.isdecimal()) or name


def group_name(kind: str, shape: Shape) -> str:
    """The group in which modules of one kind share: only those of equal shape can."""
    return f"{kind.replace('.', '-')}-{shape[0]}x{shape[1]}"
