"""A module's place in the model: its layer and its type, read from its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparse_llm_ft.plan import ModuleName


@dataclass(frozen=True)
class ModuleGrid:
    """Modules as a table: layers in the model's order × types in order of first appearance.

    Attributes:
        layers: label of each layer: its number, behind the stack's name if there are several stacks (encoder and
            decoder); ``#position`` if the name has no number.
        kinds: module types, for instance ``q_proj``.
        places: module -> (layer index, type index).
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]

    def of_kind(self, kind: int) -> list[str]:
        """The modules of one type, by layer."""
        return sorted(
            (name for name, place in self.places.items() if place[1] == kind),
            key=lambda n: self.places[n][0],
        )


def module_grid(names: Iterable[str]) -> ModuleGrid:
    """Place every module of `names`, in the model's order.

    ``model.layers.3.self_attn.q_proj`` is layer 3, type ``q_proj``. A type is the shortest ending of the name that
    no other type has (``attention.output.dense`` beside ``output.dense``). Modules without a number share a layer if
    they share a parent.
    """
    split = {name: _split(name) for name in names}
    kinds = _short_kinds(dict.fromkeys(tail for _, _, tail in split.values()))
    layers = list(dict.fromkeys((stack, number) for stack, number, _ in split.values()))
    stacks = dict.fromkeys(stack for stack, number in layers if number is not None)
    labels = []
    for position, (stack, number) in enumerate(layers):
        prefix = f"{_short_stack(stack, list(stacks))} " if len(stacks) > 1 else ""
        labels.append(f"#{position}" if number is None else f"{prefix}{number}")
    row = {layer: i for i, layer in enumerate(layers)}
    column = {kind: i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    places = {name: (row[stack, number], column[kinds[tail]]) for name, (stack, number, tail) in split.items()}
    return ModuleGrid(tuple(labels), tuple(column), places)


def _split(name: str) -> tuple[str, int | None, str]:
    """Stack, layer number and type; a number at the name's end is the type, not a layer."""
    stack, number, rest = ModuleName.parse(name)
    return (stack, number, rest) if rest else (stack, None, str(number))


def _short_kinds(tails: Iterable[str]) -> dict[str, str]:
    """Tail -> its shortest ending, in whole parts, that no other tail has."""
    endings = {tail: [tail.split(".", i)[-1] for i in range(tail.count("."), -1, -1)] for tail in tails}
    counts = Counter(ending for of_one in endings.values() for ending in of_one)
    return {tail: next((e for e in of_one if counts[e] == 1), tail) for tail, of_one in endings.items()}


def _short_stack(stack: str, stacks: list[str]) -> str:
    """The first part of a stack's name that the others do not share."""
    parts = stack.split(".")
    for part in parts:
        if all(part not in other.split(".") for other in stacks if other != stack):
            return part
    return stack
