"""SNIP and IMP importance of rows and columns, from gradients of frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, Never

import torch
from torch import nn

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.model.linear import LinearLayer, sides
from sparse_llm_ft.objectives.base import Objective, evaluating
from sparse_llm_ft.scoring.blocks import group_by_block
from sparse_llm_ft.scoring.contracts import ALONE, WorkShard
from sparse_llm_ft.scoring.importance import Importance, dense_weight


class _Call:
    """One call of a linear layer: its input, and its output before anything changes it."""

    def __init__(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.name, self.x, self.y = name, x, y


def gradient_importance(
    model: nn.Module,
    modules: Mapping[str, LinearLayer],
    batches: Sequence[Batch],
    objective: Objective[Never],
    measure: Literal["snip", "imp"],
    shard: WorkShard = ALONE,
) -> dict[str, Importance]:
    """Collective if lockstep. ``|∂L/∂W|`` (SNIP) or ``|W ⊙ ∂L/∂W|`` (IMP), summed along the rows and along the columns.

    L is the loss summed over all `batches`, so gradients are summed before the absolute value. With x the input of a
    layer and δ the gradient of its output, ``∂L/∂W = Σ δᵀ x``: this works for frozen and 4-bit weights, and writes no
    ``.grad``. Each pass over the batches covers one numbered layer per rank, which limits memory to a float32 copy of
    its weights.

    With N ranks, rank k takes layer i * N + k in pass i. In lockstep every rank lets gradients begin at the pass's
    lowest layer: so all go backward through the same layers, in equally many passes.

    Args:
        modules: name -> linear layer.
        batches: on the model's device.

    Returns:
        The scores of this rank's modules; the caller checks that they are finite.
    """
    found: dict[str, Importance] = {}
    with evaluating(model):
        for shares in _passes(modules, shard):
            own = shares.get(shard.rank, [])
            together = [name for share in shares.values() for name in share]
            hooked = list(dict.fromkeys([*next(iter(shares.values())), *own])) if shard.lockstep else own
            if not hooked:
                continue
            chosen = {name: modules[name] for name in hooked}
            gradients = _weight_gradients(model, chosen, set(own), batches, objective)
            for name in together if shard.lockstep else own:  # the same gathers in the same order on every rank
                with shard.gather(modules[name]):
                    if name in gradients:
                        found[name] = _scores(gradients.pop(name), modules[name], measure)
    return found


def _passes(modules: Mapping[str, LinearLayer], shard: WorkShard) -> Iterator[dict[int, list[str]]]:
    """For every pass, rank -> its modules; the first share belongs to the lowest layer."""
    groups, unnumbered = group_by_block(modules)
    layers = list(groups.values())
    for start in range(0, len(layers), shard.size):
        yield dict(enumerate(layers[start : start + shard.size]))
    for i, name in enumerate(unnumbered):  # their order is unknown, so each has a pass of its own
        yield {i % shard.size: [name]}


def _weight_gradients(
    model: nn.Module,
    hooked: Mapping[str, LinearLayer],
    wanted: set[str],
    batches: Sequence[Batch],
    objective: Objective[Never],
) -> dict[str, torch.Tensor]:
    """Module -> ∂L/∂W of shape (d_out, d_in), float32, for the modules `wanted`."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        with torch.enable_grad(), _observed(hooked) as calls:
            loss = objective.loss(model, batch)
            if not calls:
                continue
            deltas = torch.autograd.grad(loss, [call.y for call in calls], allow_unused=True)
        for call, delta in zip(calls, deltas, strict=True):
            if delta is None or call.name not in wanted:
                continue
            term = delta.flatten(0, -2).float().T @ call.x.flatten(0, -2).float()
            total[call.name] = total[call.name].add_(term) if call.name in total else term
    for name in wanted - total.keys():  # a layer without influence on the loss
        total[name] = torch.zeros(*sides(hooked[name]))
    return total


@contextmanager
def _observed(modules: Mapping[str, LinearLayer]) -> Iterator[list[_Call]]:
    """A context with a list of the modules' calls; their outputs require gradients even if nothing below does."""
    calls: list[_Call] = []

    def observe(name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        y = output if output.requires_grad else output.detach().requires_grad_()
        calls.append(_Call(name, args[0].detach(), y))
        return y.clone()  # the model may change it in place, and the gradient of y itself is wanted

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(lambda _, args, output, name=name: observe(name, args, output))
            stack.callback(handle.remove)
        yield calls


def _scores(gradient: torch.Tensor, module: nn.Module, measure: str) -> Importance:
    if measure == "imp":
        gradient = gradient * dense_weight(module).to(gradient.device)
    size = gradient.abs()
    return Importance(size.sum(1).cpu(), size.sum(0).cpu())
