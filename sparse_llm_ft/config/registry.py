"""The methods by name, and how a ``method`` section becomes a method's settings.

A method's file is imported when its name is used, so settings are checked without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.errors import ConfigError

METHODS: dict[str, str] = {
    "lora": "sparse_llm_ft.methods.peft_baselines:Lora",
    "lora_plus": "sparse_llm_ft.methods.peft_baselines:LoraPlus",
    "rslora": "sparse_llm_ft.methods.peft_baselines:RsLora",
    "dora": "sparse_llm_ft.methods.peft_baselines:Dora",
    "vera": "sparse_llm_ft.methods.peft_baselines:Vera",
    "adalora": "sparse_llm_ft.methods.adalora:AdaLora",
    "full": "sparse_llm_ft.methods.full:Full",
    "tied_lora": "sparse_llm_ft.methods.tied_lora:TiedLora",
    "sparse_adapter": "sparse_llm_ft.methods.sparse_adapter:SparseAdapter",
    "random_masking": "sparse_llm_ft.methods.random_masking:RandomMasking",
    "partial_lora": "sparse_llm_ft.methods.partial_lora:PartialLora",
    "lora_drop": "sparse_llm_ft.methods.lora_drop:LoraDrop",
    "weight_lora": "sparse_llm_ft.methods.weight_lora:WeightLora",
    "weight_lora_plus": "sparse_llm_ft.methods.weight_lora_plus:WeightLoraPlus",
}

GROUP = "sparse_llm_ft.methods"
"""Entry points of this group add methods of other installed packages. They cannot replace one of `METHODS`."""


def method_names() -> list[str]:
    """All names that `method.name` may have."""
    return sorted({*METHODS, *_installed()})


@cache
def find_method(name: str) -> type[Any]:
    """The subclass of `sparse_llm_ft.methods.method.Method` that `name` stands for.

    Raises:
        KeyError: there is no such method.
        ConfigError: the installed package that provides it cannot be loaded.
    """
    if name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        found: type[Any] = getattr(import_module(module), attribute)
        return found
    return _load(_installed()[name])


def find_settings(name: str) -> type[MethodSettings]:
    """The settings class of a method. Raises as `find_method`."""
    settings_class: type[MethodSettings] = find_method(name).settings_class
    return settings_class


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in METHODS}


def _load(point: EntryPoint) -> type[Any]:
    try:
        found = point.load()
    except Exception as error:  # whatever another package's import raises
        reason = f"{point.value} cannot be imported ({type(error).__name__}: {error})"
        raise ConfigError("method.name", f"{point.name!r}: {reason}", "repair or remove that package") from error
    settings_class = getattr(found, "settings_class", None)
    if not (isinstance(settings_class, type) and issubclass(settings_class, MethodSettings)):
        reason = f"{point.value} has no settings_class"
        raise ConfigError("method.name", f"{point.name!r}: {reason}", "expected a subclass of Method")
    return found


def _parse(section: Any) -> MethodSettings:
    if isinstance(section, MethodSettings):
        return section
    if not isinstance(section, Mapping):
        raise PydanticCustomError("dict_type", "Input should be a valid dictionary")
    name = section.get("name")
    try:
        settings_class = find_settings(name)  # type: ignore[arg-type]
    except (KeyError, TypeError):  # TypeError: a name that cannot be hashed
        near = difflib.get_close_matches(str(name), method_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(method_names())
        raise PydanticCustomError("unknown_method", "{hint}known: {known}", {"hint": hint, "known": known}) from None
    return settings_class.model_validate(section)


def _as_list(value: Any) -> Any:
    """One method, or a list of methods or of their names."""
    if isinstance(value, list | tuple):
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return [{"name": value} if isinstance(value, str) else value]


Methods = Annotated[
    tuple[Annotated[MethodSettings, BeforeValidator(_parse)], ...], BeforeValidator(_as_list), Field(min_length=1)
]
"""One method, or several that are applied one after the other."""
