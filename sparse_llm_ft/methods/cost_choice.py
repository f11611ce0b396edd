"""Which adapters may stay under a budget of arithmetic (ours; no paper has it).

A set of K adapters costs a step what its lowest one makes it cost (model/step_cost.py). Of all sets within the budget,
the one with the largest sum of omega is wanted. For every lowest layer l the best set is the K largest omegas in the
layers from l up. A higher l chooses from fewer adapters, so its sum is not larger. The lowest layer l* whose cost is
within the budget therefore has the best set of all: the K largest omegas from l* up. l* does not depend on omega, so
which adapters may stay is known before training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparse_llm_ft.errors import ConfigError


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


def allowed(depths: Sequence[int], shares: Mapping[int, float], keep: int, budget: float) -> Allowed:
    """The adapters that may stay.

    Args:
        depths: layer index of each adapter, which never falls.
        shares: layer index -> a step's cost with `keep` survivors from this layer up, divided by that with all
            adapters; it never rises with the index.
        keep: K.
        budget: largest share.

    Raises:
        ConfigError: no layer within the budget has K adapters from it up.
    """
    counts = {layer: sum(depth >= layer for depth in depths) for layer in shares}
    within = [layer for layer in sorted(shares) if shares[layer] <= budget]
    if not within or counts[within[0]] < keep:
        least = min(share for layer, share in shares.items() if counts[layer] >= keep)
        room = f"{counts[within[0]]} of method.keep's {keep} adapters" if within else "no adapter"
        raise ConfigError(
            "method.budget",
            f"{budget:g} of a step with all adapters leaves room for {room}",
            f"expected {math.ceil(least * 1000) / 1000:g} or more, or a smaller method.keep",
        )
    return Allowed(len(depths) - counts[within[0]], within[0], shares[within[0]])
