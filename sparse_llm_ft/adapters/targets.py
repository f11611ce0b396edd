"""Which modules of a model get adapters, and whether a plan fits them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from sparse_llm_ft.adapters.tuners import tuner_of
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.architecture import HEAD_NAMES
from sparse_llm_ft.model.linear import linear_shape
from sparse_llm_ft.plan import AdapterPlan, PlanError, Shape

ALL_LINEAR = "all-linear"


def linear_modules(model: nn.Module) -> dict[str, Shape]:
    """Every linear layer, 4-bit ones included, except heads: name -> (out_features, in_features).

    A layer that already carries adapters has its own name. Heads are the model's output embeddings and the task heads
    of transformers' classification models; they are fully trained or not at all.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict(model.named_modules())
    wrappers = tuple(name + "." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    saved = tuple(name + "." for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper))
    found = {}
    for name, module in modules.items():
        shape = linear_shape(module)
        if shape is None or module is output or name.split(".")[0] in HEAD_NAMES:
            continue
        if name.startswith(wrappers) and not name.endswith(".base_layer"):
            continue  # an adapter's own matrices
        if name.startswith(saved):
            continue  # PEFT's modules_to_save: fully trained
        found[name.removesuffix(".base_layer")] = shape
    return found


def find_targets(
    model: nn.Module, target_modules: str | Sequence[str], reached: Collection[str] | None = None
) -> dict[str, Shape]:
    """The modules that get adapters, in the model's order: name -> (out_features, in_features).

    Args:
        model: the base model, which may be on the meta device.
        target_modules: ``all-linear``, a list of name endings, or a regular expression for whole names.
        reached: the modules that may get adapters (`text_modules`); None: all.

    Raises:
        ConfigError: nothing matches, or an ending of the list matches nothing (it lists the endings that exist), or a
            layer has two names.
    """
    linear = {name: shape for name, shape in linear_modules(model).items() if reached is None or name in reached}
    if target_modules == ALL_LINEAR:
        found = set(linear)
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ConfigError(
                "adapter.target_modules",
                f"{target_modules!r} is not a regular expression ({error})",
                f"expected {ALL_LINEAR}, a list of name endings, or a pattern",
            ) from None
        found = {name for name in linear if pattern.fullmatch(name)}
    else:
        endings = {ending: {n for n in linear if n == ending or n.endswith("." + ending)} for ending in target_modules}
        for ending, names in endings.items():
            if not names:
                raise _no_match(ending, linear, _named(model, ending), model)
        found = set().union(*endings.values())
    if not found:
        matches = re.compile(target_modules).fullmatch if isinstance(target_modules, str) else lambda _: None
        others = {name: module for name, module in model.named_modules() if name and matches(name)}
        raise _no_match(target_modules, linear, others, model)
    _refuse_second_names(model, found)
    return {name: shape for name, shape in linear.items() if name in found}


def _refuse_second_names(model: nn.Module, found: Collection[str]) -> None:
    """A layer that its model has under two names: PEFT would put a wrapper at one, and the other would stay bare."""
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if linear_shape(module) is None or (other := first.setdefault(id(module), name)) == name:
            continue
        if other.removesuffix(".base_layer") in found:
            raise ConfigError(
                "adapter.target_modules",
                f"{other} and {name} are one layer, and an adapter would be on one of them alone",
                "expected other layers",
            )


def check_plan(model: nn.Module, plan: AdapterPlan) -> None:
    """Refuse a plan with modules that the model lacks, or ranks and masks that do not fit their matrices.

    Raises:
        PlanError: naming the first such module.
    """
    for whole in plan.trained:
        if whole and not any(name == whole for name, _ in model.named_modules()):
            raise PlanError(f"the plan fully trains module {whole!r}, which the model lacks")
    check_modules(plan, linear_modules(model))


def _named(model: nn.Module, ending: str) -> dict[str, nn.Module]:
    """The modules whose names end so, of whatever kind."""
    return {name: m for name, m in model.named_modules() if name and (name == ending or name.endswith(f".{ending}"))}


def _no_match(
    wanted: object, linear: dict[str, Shape], others: Mapping[str, nn.Module], model: nn.Module
) -> ConfigError:
    """The error for a name that is of no target, and what it is of instead.

    Args:
        others: the modules of that name.
    """
    setting, found = "adapter.target_modules", f"found: {name_endings(linear)}"
    if not others:
        return ConfigError(setting, f"{wanted!r} matches no linear layer of the model", found)
    name, module = next(iter(others.items()))
    expected = "expected linear layers"
    if module is getattr(model, "get_output_embeddings", lambda: None)():
        what = "is the output head, which never has adapters"
        expected += ", or adapter.modules_to_save to train it whole"
    elif name.split(".")[0] in HEAD_NAMES:
        what = "is the task's head, which is trained whole and never has adapters"
    elif name in linear_modules(model):
        what = "is a layer that no text reaches, which gets no adapters"
    elif inside := [inner for inner in linear if inner.startswith(f"{name}.")]:
        what = (
            f"is of class {type(module).__name__}, which holds the linear layers {name_endings(dict.fromkeys(inside))}"
        )
    else:
        what = f"is of class {type(module).__name__}, not a linear layer"
        expected += ", or adapter.modules_to_save to train it whole"
    return ConfigError(setting, f"{wanted!r} {what}", f"{expected}; {found}")


def check_modules(plan: AdapterPlan, targets: Mapping[str, Shape]) -> None:
    """Refuse a plan with an unknown tuner, modules that are not targets, or ranks and masks that do not fit.

    Raises:
        PlanError: naming the tuner or the first such module.
    """
    tuner = tuner_of(plan)
    for group, names in plan.groups.items():
        if len(shapes := {targets[name] for name in names if name in targets}) > 1:
            raise PlanError(f"group {group!r}: its modules have different shapes ({sorted(shapes)})")
    for name, adapter in plan.modules.items():
        if name not in targets:
            raise PlanError(
                f"the plan names module {name!r}, which is not a linear layer of the model; "
                f"the model has {name_endings(targets)}"
            )
        if adapter is None:
            continue
        out_features, in_features = targets[name]
        for kept, size in ((adapter.rows, out_features), (adapter.cols, in_features)):
            if kept is not None and kept.size != size:
                raise PlanError(f"module {name!r}: a mask of size {kept.size} where its matrix has {size}")
        if (entries := adapter.entries) is not None:
            sizes = (adapter.r * in_features, out_features * adapter.r)
            if (entries.a.size, entries.b.size) != sizes:
                raise PlanError(
                    f"module {name!r}: masks of {entries.a.size} and {entries.b.size} entries where its A and B have "
                    f"{sizes[0]} and {sizes[1]}"
                )
        if tuner.bounded_rank and adapter.r > min(targets[name]):
            raise PlanError(
                f"module {name!r}: rank {adapter.r} is larger than its matrix ({out_features} × {in_features})"
            )


def name_endings(names: Mapping[str, object]) -> str:
    """The distinct last parts of the names, in order: ``q_proj, k_proj, ...``."""
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(endings[:20]) + (", ..." if len(endings) > 20 else "") if endings else "no linear layer at all"
