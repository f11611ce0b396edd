"""Which adapters may live under a budget of arithmetic and memory (ours; no paper has it).

The lowest adapter of a set decides what the set costs a step: backward passes stop there (model/step_cost.py), and
nothing of the layers below is kept for them. Of all sets within the budget, the one with the largest sum of omega or
importance is wanted. For every lowest layer l it is the best set of the adapters from l up. A higher l chooses from
fewer adapters, so its sum is not larger. The lowest layer l* whose cost is within the budget therefore has the best set
of all. WeightLoRA keeps the K largest omegas from l* up. There l* does not depend on omega, so which adapters may stay
is known before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparse_llm_ft.config.budget import Budget
from sparse_llm_ft.errors import ConfigError

Memory = Callable[[int], int]
"""Index of the lowest layer with an adapter -> bytes that a phase needs on each device; falls as the index rises."""


@dataclass(frozen=True)
class Allowed:
    """Which adapters may stay.

    Attributes:
        first: how many adapters, from the lowest up, may not.
        layer: index of the lowest layer whose adapters may.
        share: a step's cost with survivors from this layer up, divided by that with all adapters.
    """

    first: int
    layer: int
    share: float


def lowest_within(shares: Mapping[int, float], budget: Budget, memory: Memory | None = None) -> int | None:
    """The lowest layer within the budget; None: there is none.

    Args:
        shares: layer index -> a step's cost with adapters from this layer up, divided by that with all adapters; it
            never rises with the index.
        memory: None: not known, and not limited.
    """
    most = 1.0 if budget.step_time is None else budget.step_time
    within = [layer for layer in sorted(shares) if budget.step_time is None or shares[layer] <= most]
    if budget.memory is None or memory is None or not within:
        return within[0] if within else None
    if memory(within[-1]) > budget.memory:
        return None
    low, high = 0, len(within) - 1  # the one at `high` fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if memory(within[middle]) <= budget.memory else (middle + 1, high)
    return within[high]


def allowed(
    depths: Sequence[int], shares: Mapping[int, float], keep: int, budget: Budget, memory: Memory | None = None
) -> Allowed:
    """The adapters that may stay.

    Args:
        depths: layer index of each adapter, which never falls.
        shares, memory: as in `lowest_within`, with `keep` survivors.
        keep: K.

    Raises:
        ConfigError: no layer within the budget has K adapters from it up.
    """
    counts = {layer: sum(depth >= layer for depth in depths) for layer in shares}
    reachable = {layer: share for layer, share in shares.items() if counts[layer] >= keep}
    layer = lowest_within(reachable, budget, memory)
    if layer is not None:
        return Allowed(len(depths) - counts[layer], layer, shares[layer])
    if budget.step_time is not None and lowest_within(reachable, Budget(step_time=budget.step_time)) is None:
        within = [layer for layer in sorted(shares) if shares[layer] <= budget.step_time]
        room = f"{counts[within[0]]} of method.keep's {keep} adapters" if within else "no adapter"
        raise ConfigError(
            "method.budget",
            f"{budget.step_time:g} of a step with all adapters leaves room for {room}",
            f"expected {math.ceil(min(reachable.values()) * 1000) / 1000:g} or more, or a smaller method.keep",
        )
    assert memory is not None, "what is not known is not limited"
    raise ConfigError(
        "method.budget",
        f"{budget}, but {keep} adapters in the uppermost layers need "
        f"{memory(max(reachable)) / 2**30:.3g}GiB with training.micro_batch_size, as planned",
        "expected more memory, a smaller micro-batch or a smaller method.keep",
    )
