"""Activations that backward computes again from what is kept anyway, in place of keeping them too.

A function that makes an output by element-wise arithmetic marks it with a `Recipe`. A later function that needs this
output in its backward keeps the recipe's inputs, which the first function keeps as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn


class Recomputed:
    """Computes an activation again, once for all functions that need it in one backward pass.

    It holds no tensor between passes, so activation checkpointing may free the recipe's inputs.
    """

    def __init__(self, compute: Callable[..., torch.Tensor]) -> None:
        self._compute = compute
        self._value: torch.Tensor | None = None
        self._users, self._left = 0, 0

    def add_user(self) -> None:
        """Count one function that will ask for the value in its backward."""
        self._users += 1

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The value; the last of the counted functions frees it."""
        if self._value is None:
            self._value, self._left = self._compute(*inputs), self._users
        value, self._left = self._value, self._left - 1
        if self._left <= 0:
            self._value = None
        return value


@dataclass(frozen=True, eq=False)
class Recipe:
    """How an activation is computed from others.

    Attributes:
        inputs: without a graph; they share memory with what the first function keeps.
        version: of the activation when it was made; a later one has been changed in place.
    """

    inputs: tuple[torch.Tensor, ...]
    value: Recomputed
    version: int


def mark(output: torch.Tensor, compute: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`output`, with the recipe ``compute(*inputs)`` if a backward pass can follow."""
    if output.requires_grad and not torch.compiler.is_compiling():
        kept = tuple(value.detach() if value.requires_grad else value for value in inputs)
        output._sparse_llm_ft_recipe = Recipe(kept, Recomputed(compute), output._version)  # type: ignore[attr-defined]
    return output


def attach(value: torch.Tensor, recipe: Recipe) -> None:
    """Give `value`, another tensor on the memory of the recipe's output, the recipe."""
    value._sparse_llm_ft_recipe = replace(recipe, version=value._version)  # type: ignore[attr-defined]


def carry_through_hooks(module: nn.Module) -> None:
    """Keep the recipes of what `module` is given and returns, whatever tensors its present hooks put in their place.

    DeepSpeed's hooks at stage 3 pass on other tensors on the same memory.
    """
    given: list[Recipe | None] = []
    made: list[Recipe | None] = []

    def take(_: nn.Module, args: tuple[object, ...]) -> None:
        given[:] = [recipe_of(value) if isinstance(value, torch.Tensor) else None for value in args]

    def give(_: nn.Module, args: tuple[object, ...]) -> None:
        for value, recipe in zip(args, given, strict=True):
            if recipe is not None:
                assert isinstance(value, torch.Tensor)
                attach(value, recipe)
        given.clear()

    def take_output(_: nn.Module, args: object, output: object) -> None:
        made[:] = [recipe_of(output) if isinstance(output, torch.Tensor) else None]

    def give_output(_: nn.Module, args: object, output: object) -> None:
        (recipe,) = made
        if recipe is not None:
            assert isinstance(output, torch.Tensor)
            attach(output, recipe)
        made.clear()

    module.register_forward_pre_hook(take, prepend=True)
    module.register_forward_pre_hook(give)
    module.register_forward_hook(take_output, prepend=True)
    module.register_forward_hook(give_output)


def recipe_of(value: torch.Tensor) -> Recipe | None:
    """The recipe of an activation; None if it has none, or no longer is what the recipe gives."""
    if torch.compiler.is_compiling():
        return None
    found: Recipe | None = getattr(value, "_sparse_llm_ft_recipe", None)
    return found if found is not None and found.version == value._version else None
