"""pydantic's problems with a tree of settings, each as one line in the user's own terms."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sparse_llm_ft.config.registry import find_settings, method_names
from sparse_llm_ft.config.schema import RunConfig
from sparse_llm_ft.errors import ConfigError


def as_config_error(error: ValidationError, tree: Mapping[str, Any]) -> ConfigError:
    """The first of pydantic's problems with `tree`, in one line, in the user's own terms."""
    problems = error.errors(include_url=False)
    # A misspelt key also leaves a required one missing: the misspelling is what the user can see.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where, method = _place(problem, tree)
    setting, kind = ".".join(_section(where, method)[0]), problem["type"]
    if kind == "extra_forbidden":
        known = _known_keys(where[:-1], method)
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return ConfigError(setting, "unknown key", hint)
    if kind == "missing" and isinstance(problem["loc"][-1], int):  # the second of a pair
        return ConfigError(setting, "has too few values", "expected two")
    if kind == "missing":
        return ConfigError(setting, "not given", "it has no default")
    if kind == "too_short":
        return ConfigError(setting, "has too few values", f"expected at least {problem['ctx']['min_length']}")
    if kind == "too_long":
        return ConfigError(setting, "has too many values", f"expected at most {problem['ctx']['max_length']}")
    if kind == "unknown_method":
        return ConfigError("method.name", f"{method.get('name')!r} is unknown", problem["msg"])
    expected = wanted(problem)
    # A number or one of a few words is a union, whose parts have a problem each.
    others = [p for p in problems if p["type"] == "literal_error" and p["loc"][:-1] == problem["loc"][:-1]]
    words = "".join(f", or {wanted(p)}" for p in others if p is not problem)
    return ConfigError(setting, f"{problem['input']!r} is not allowed", f"expected {expected}{words}")


def wanted(problem: ErrorDetails) -> str:
    """What would be right, from pydantic's message."""
    message = problem["msg"]
    for beginning in ("Value error, ", "Assertion failed, ", "Input should be "):
        message = message.removeprefix(beginning)
    if "dictionary" in message:
        return "a mapping of settings"
    if problem["type"] == "string_type":  # YAML reads yes, 1 and {text} as something else
        return "text; quote what YAML takes for something else"
    if problem["type"] == "string_too_short":
        return "some text"
    if problem["type"] in ("bool_type", "bool_parsing"):
        return "true or false"
    return message.replace("a valid tuple", "a list, as in [a, b]").replace("String should match", "text that matches")


def _place(problem: ErrorDetails, tree: Mapping[str, Any]) -> tuple[list[str], Mapping[str, Any]]:
    """Where a problem is, without the number of a method, and the method's section."""
    where, item = [str(part) for part in problem["loc"]], 0
    if where[:1] == ["method"] and len(where) > 1 and where[1].isdigit():
        item = int(where.pop(1))
    return where, _method_item(tree, item)


def _method_item(tree: Mapping[str, Any], item: int) -> Mapping[str, Any]:
    """The method section that an error is about: the only one, or one of a list."""
    method = tree.get("method")
    if isinstance(method, list | tuple):
        method = method[item] if item < len(method) else None
    if isinstance(method, str):
        return {"name": method}
    return method if isinstance(method, Mapping) else {}


def _known_keys(section: Sequence[str], method: Mapping[str, Any]) -> list[str]:
    return list(_section(section, method)[1].model_fields)


def _section(where: Sequence[str], method: Mapping[str, Any]) -> tuple[list[str], Any]:
    """The part of a place that is names of settings, and the type of what it leads to. The rest of the place says which
    kind of a union or which item of a list.
    """
    names: list[str] = []
    kind: Any = RunConfig
    for part in where:
        fields = getattr(kind, "model_fields", None)
        if fields is None:
            break
        names.append(part)
        if names == ["method"]:
            kind = find_settings(method["name"]) if method.get("name") in method_names() else None
        else:
            kind = fields[part].annotation if part in fields else None
        kind = next((one for one in get_args(kind) if hasattr(one, "model_fields")), kind)  # of an optional section
    return names, kind
