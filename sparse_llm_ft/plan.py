"""`AdapterPlan`: which module has which adapter. Methods write plans; tuners, engine, export and report read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Literal, NamedTuple, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from sparse_llm_ft.plan_masks import EntryBits, EntryMasks, IndexMask, PlanError

Shape = tuple[int, int]
"""(out_features, in_features) of a target module, however its weight is stored."""

PLAN_VERSION = 3

Masking = Literal["compact", "optimizer"]
"""Where masks are applied: in the layers, whose A and B have only the kept rows and columns, or in the optimizer."""

FULL_MODEL = ""
"""In `AdapterPlan.trained`: the base model itself, which is full fine-tuning."""

MAX_RANK = 2**16
"""More than any adapter needs, and little enough to allocate if a plan from outside claims it."""

MAX_KEYS = 10_000


def check_fields(kind: type, data: object) -> None:
    """Refuse a mapping that has not exactly the fields of dataclass `kind`, strictly of their types.

    Raises:
        PlanError: naming the field.
    """
    types = _field_types(kind)
    if not isinstance(data, Mapping) or data.keys() != types.keys():
        raise PlanError(f"{kind.__name__} is an object with the keys {', '.join(types)}")
    for name, known in types.items():
        try:
            known.validate_python(data[name], strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            path, message = ".".join(map(str, (name, *problem["loc"]))), problem["msg"]
            raise PlanError(f"{path:.60} is {problem['input']!r:.40}; {message[:1].lower()}{message[1:]}") from None


@cache
def _field_types(kind: type) -> dict[str, TypeAdapter[object]]:
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _few(value: object) -> object:
    """Refuse a dict of very many keys before each wrong value in it becomes an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise ValueError(f"more than {MAX_KEYS:,} keys")
    return value


FEW_KEYS = BeforeValidator(_few)
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module: ``y = W x + omega * (lora_alpha / r) * scatter_rows(v * B (u * A x[cols]))``.

    Attributes:
        r: rank; A has shape ``(r, kept columns)``, B ``(kept rows, r)``.
        lora_alpha: numerator of the scaling.
        omega: the adapter's weight: the initial value if `train_omega`, else a constant of the forward pass.
        train_omega: whether omega is a trained parameter (WeightLoRA, eq. 3).
        group: modules of one group share one A and one B (LoRA-drop); a name without dots. None: the module has its
            own.
        rows, cols: which outputs the adapter writes and which inputs it reads (Partial-LoRA, eq. 6); None: all.
        train_vectors: whether the module trains two vectors of its own, u (r) between A and B and v (kept rows) behind
            B, which start at 1 (Tied-LoRA). False: u = v = 1.
        entries: single entries of A and B that are trained, the others being 0; in place of `rows` and `cols`, and
            under `masking` optimizer alone. None: all.
    """

    r: Annotated[int, Field(ge=1, le=MAX_RANK)]
    lora_alpha: Finite
    omega: Finite = 1.0
    train_omega: bool = False
    group: Annotated[str, Field(pattern=r"^[^.]+$")] | None = None
    rows: IndexMask | None = None
    cols: IndexMask | None = None
    train_vectors: bool = False
    entries: EntryMasks | None = None

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))
        if self.entries is not None and (self.rows is not None or self.cols is not None):
            raise PlanError("an adapter has a mask of rows or columns beside one of entries")

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
    """An adapter of its own, a shared one, or none (None) for every target module.

    Attributes:
        modules: full module name in the base model -> its adapter. The order is the model's.
        lora_dropout: dropout probability on the adapters' input.
        tuner: name of the layers that carry the adapters: this package's own, or PEFT's (adapters/tuners.py).
        options: further numbers that the tuner needs (AdaLoRA's schedule).
        trained: modules of the base that are fully trained beside the adapters: a fresh classification head, or
            `FULL_MODEL`.
        rows: modules of `trained` of whose weight only these rows are trained: tokens of an embedding.
        masking: where masks are applied.
    """

    modules: Mapping[str, ModuleAdapter | None]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tuner: str = "sparse_lora"
    options: Annotated[Mapping[str, Finite], FEW_KEYS] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    masking: Masking = "compact"
    rows: Mapping[str, IndexMask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))
        if not any(self.modules.values()) and not self.trained:
            raise PlanError("a plan needs at least one module with an adapter, or one fully trained module")
        if not self.rows.keys() <= set(self.trained):
            raise PlanError("a plan trains rows of a module that it does not train")
        if self.masking == "compact" and any(adapter.entries for adapter in self.active.values()):
            raise PlanError("masking compact cannot leave single entries out")
        self._check_groups()

    def _check_groups(self) -> None:
        """Refuse a group whose members have different adapters; only omega, u and v are each module's own."""
        for group, names in self.groups.items():
            alike = {
                (a.r, a.lora_alpha, a.rows, a.cols, a.entries)
                for name in names
                if (a := self.modules[name]) is not None
            }
            if len(alike) > 1:
                raise PlanError(f"group {group!r}: its modules differ in rank, lora_alpha or mask")

    @property
    def active(self) -> dict[str, ModuleAdapter]:
        """The modules that have an adapter, in the model's order."""
        return {name: adapter for name, adapter in self.modules.items() if adapter is not None}

    @property
    def layers(self) -> dict[str, ModuleAdapter]:
        """The active adapters as their layers are built: without masks if the optimizer applies them."""
        return {name: self.built(adapter) for name, adapter in self.active.items()}

    def built(self, adapter: ModuleAdapter) -> ModuleAdapter:
        """One of the plan's adapters as its layer is built, see `layers`."""
        return adapter if self.masking == "compact" else replace(adapter, rows=None, cols=None, entries=None)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group -> the modules that share its adapter, sorted: PEFT sorts what it saves, and a group's first module has
        its tensors.
        """
        found: dict[str, list[str]] = {}
        active = self.active
        for name in sorted(active):
            group = active[name].group
            if group is not None:
                found.setdefault(group, []).append(name)
        return found

    @property
    def owners(self) -> dict[str, str]:
        """Active module -> the name of its A and B: its own, or its group's (``shared.<group>``)."""
        return {name: name if a.group is None else f"{SHARED}.{a.group}" for name, a in self.active.items()}

    def matrix_owners(self) -> dict[str, str]:
        """Every pair of A and B once: its name (`owners`) -> the first module that uses it."""
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
            return self.describe_trained()
        return f"{own} own and {shared} shared adapters" if shared else f"{own} adapters"

    def describe_trained(self) -> str:
        """For people: ``score``, ``3 rows of model.embed_tokens, lm_head``."""
        return ", ".join(f"{len(self.rows[n].indices)} rows of {n}" if n in self.rows else n for n in self.trained)

    def to_dict(self) -> dict[str, object]:
        """JSON values, from which `from_dict` makes the same plan."""
        return {
            "version": PLAN_VERSION,
            "lora_dropout": self.lora_dropout,
            "tuner": self.tuner,
            "options": dict(self.options),
            "trained": list(self.trained),
            "masking": self.masking,
            **({"rows": {name: kept.to_dict() for name, kept in self.rows.items()}} if self.rows else {}),
            "modules": {name: None if a is None else _module_to_dict(a) for name, a in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, data: object, shapes: Mapping[str, Shape] | None = None) -> AdapterPlan:
        """Read what `to_dict` wrote.

        Args:
            shapes: module -> (out_features, in_features) of the real modules, whose sizes masks must have: no mask is
                built at a size that is only claimed. None: any names and sizes.

        Raises:
            PlanError: a missing or unknown key, a wrong type, or another version, naming the module.
        """
        keys = {"version", *(known.name for known in fields(cls))}
        if not isinstance(data, dict) or "version" not in data:
            raise PlanError(f"a plan is an object with the keys {', '.join(sorted(keys))}")
        if type(data["version"]) is not int or data["version"] != PLAN_VERSION:
            raise PlanError(f"plan version {data['version']!r:.40} is not supported; this release reads {PLAN_VERSION}")
        if set(data) | {"rows"} != keys:  # rows are written if there are some
            raise PlanError(f"a plan is an object with the keys {', '.join(sorted(keys))}")
        if not isinstance(data["modules"], dict) or not isinstance(data["trained"], list):
            raise PlanError("a plan's modules must be an object, and its trained a list of module names")
        return cls(
            {name: _module_from_dict(name, value, shapes) for name, value in data["modules"].items()},
            data["lora_dropout"],
            data["tuner"],
            data["options"],
            tuple(data["trained"]),
            data["masking"],
            {name: IndexMask.from_dict(kept) for name, kept in _rows(data).items()},
        )


def _rows(data: Mapping[str, object]) -> dict[str, object]:
    rows = data.get("rows", {})
    if not isinstance(rows, dict) or len(rows) > MAX_KEYS:
        raise PlanError("a plan's rows must be an object of module names")
    return rows


SHARED = "shared"
"""First part of the names of a group's shared parameters."""


def _module_to_dict(adapter: ModuleAdapter) -> dict[str, object]:
    masks = {name: kept.to_dict() for name in ("rows", "cols") if (kept := getattr(adapter, name)) is not None}
    values = {known.name: getattr(adapter, known.name) for known in fields(adapter)} | masks
    if adapter.entries is not None:
        values["entries"] = {"a": adapter.entries.a.to_dict(), "b": adapter.entries.b.to_dict()}
    return {name: value for name, value in values.items() if value or name not in _WRITTEN_IF_SET}


def _entries_from_dict(data: object) -> EntryMasks | None:
    if data is None:
        return None
    if not isinstance(data, dict) or set(data) != {"a", "b"}:
        raise PlanError(f"{data!r:.60} are not masks of entries")
    return EntryMasks(EntryBits.from_dict(data["a"]), EntryBits.from_dict(data["b"]))


_WRITTEN_IF_SET = frozenset({"train_vectors", "entries"})
"""Fields of `ModuleAdapter` that few plans have."""


def _module_from_dict(name: str, value: object, shapes: Mapping[str, Shape] | None) -> ModuleAdapter | None:
    if shapes is not None and name not in shapes:
        raise PlanError(f"the plan names module {name!r:.60}, which is not a target module of the model")
    if value is None:
        return None
    known = {field.name for field in fields(ModuleAdapter)}
    if not isinstance(value, dict) or set(value) | _WRITTEN_IF_SET != known:
        raise PlanError(f"module {name!r:.60} needs the keys {', '.join(sorted(known - _WRITTEN_IF_SET))}")
    try:
        sides = (None, None) if shapes is None else shapes[name]
        masks = {
            key: None if value[key] is None else IndexMask.from_dict(value[key], side)
            for key, side in zip(("rows", "cols"), sides, strict=True)
        }
        return ModuleAdapter(**(value | masks | {"entries": _entries_from_dict(value.get("entries"))}))
    except PlanError as error:
        raise PlanError(f"module {name!r:.60}: {error}") from None


def uniform_plan(
    targets: Mapping[str, Shape], r: int, lora_alpha: float, lora_dropout: float = 0.0, trained: tuple[str, ...] = ()
) -> AdapterPlan:
    """The same adapter on every target. A rank never exceeds the smaller side of its matrix.

    A reduced rank keeps the scaling ``lora_alpha / r`` of the others.

    Args:
        targets: module name -> (out_features, in_features).
        trained: see `AdapterPlan`.
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
    """The parts of a module's name: ``model.layers.3.self_attn.q_proj`` has stack ``model.layers``, number 3 and rest
    ``self_attn.q_proj``. The outermost number counts. A name without a number has its parent as stack, number None and
    its last part as rest.
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
    """A module's name within its layer: ``model.layers.3.self_attn.q_proj`` -> ``self_attn.q_proj``. Further numbers,
    such as an expert's, are left out.
    """
    return ".".join(part for part in ModuleName.parse(name).rest.split(".") if not part.isdecimal()) or name


def group_name(kind: str, shape: Shape) -> str:
    """The group of modules of one kind and shape; only modules of equal shape can share."""
    return f"{kind.replace('.', '-')}-{shape[0]}x{shape[1]}"


def is_matrix(name: str) -> bool:
    """Whether a trained tensor is the A or B of an adapter, by its short name."""
    return name.endswith((".lora_A", ".lora_B"))
