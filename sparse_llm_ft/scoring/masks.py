"""Draws the kept rows of B and columns of A from ratios and importance (Partial-LoRA, eq. 6)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch

from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.plan import Shape
from sparse_llm_ft.scoring.importance import Importance, check_finite, kept_count, ranking

Selection = Literal["random", "targeted", "inverted", "stochastic"]
Indices = tuple[int, ...]


def draw_masks(
    shapes: Mapping[str, Shape],
    ratios: Mapping[str, tuple[float, float]],
    selection: Selection,
    importance: Mapping[str, Importance] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, tuple[Indices, Indices]]:
    """The kept rows of B and columns of A of every module; at least one of each.

    - ``random``: every index with probability p (section 4.2.2). If none is drawn, the one closest to it is kept.
    - ``targeted``: the p * size most important (Targeted-LoRA).
    - ``inverted``: all but those of ``targeted`` (section 5.5), for rows and columns separately; if ``targeted`` keeps
      all, the least important one.
    - ``stochastic``: p * size indices drawn without replacement from softmax(z / temperature), z the importance
      standardised to mean 0 and deviation 1 within the module and side (appendix D does not say how scores are
      scaled; unscaled, one temperature would not fit two modules).

    A module's masks depend on `seed` and its name, not on the other modules.

    Args:
        shapes: module -> (d_out, d_in).
        ratios: module -> (p_row, p_col), each 0 to 1.
        importance: needed by all but ``random``.

    Returns:
        Module -> (rows, columns), ascending.

    Raises:
        ConfigError: a ratio is missing or outside 0 to 1, or the temperature is not positive.
        TrainingError: a score is not finite, naming the module.
        ValueError: the selection needs importance, and it is missing.
    """
    choose = _SELECTIONS[selection]
    if selection != "random":
        missing = [name for name in shapes if importance is None or name not in importance]
        if missing:
            raise ValueError(f"selection {selection!r} needs the importance of module {missing[0]!r}")
    if not temperature > 0:
        raise ConfigError("method.temperature", f"{temperature!r}", "expected a positive number")
    if importance is not None:
        check_finite({name: importance[name] for name in shapes if name in importance})
    masks = {}
    for name, shape in shapes.items():
        pair = []
        for axis, (size, ratio) in enumerate(zip(shape, _pair_of(name, ratios), strict=True)):
            scores = None
            if selection != "random" and importance is not None:
                scores = importance[name].rows if axis == 0 else importance[name].cols
                if len(scores) != size:
                    raise ValueError(f"module {name!r} has {len(scores)} scores on a side of size {size}")
            pair.append(choose(size, ratio, scores, temperature, generator(seed, name, axis)))
        masks[name] = (pair[0], pair[1])
    return masks


def _pair_of(name: str, ratios: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    if name not in ratios:
        raise ConfigError("method.ratios", f"no ratio for module {name!r}", "every target module needs one")
    for ratio in ratios[name]:
        if not 0.0 <= ratio <= 1.0:  # also refuses NaN
            raise ConfigError("method.ratios", f"{ratio!r} for module {name!r}", "expected 0 to 1")
    return ratios[name]


def generator(seed: int, module: str, axis: int) -> np.random.Generator:
    """The random generator of one side of one module: independent of other modules and of the machine."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(module.encode()), axis]))


Choice = Callable[[int, float, torch.Tensor | None, float, np.random.Generator], Indices]
"""(size, p, scores (size,), temperature, generator) -> ascending indices."""


def _random(size: int, p: float, scores: object, temperature: float, generator: np.random.Generator) -> Indices:
    draws = generator.random(size)
    kept = np.flatnonzero(draws < p)
    return _ascending(kept.tolist() or [int(draws.argmin())])


def _targeted(size: int, p: float, scores: torch.Tensor | None, temperature: float, generator: object) -> Indices:
    assert scores is not None
    return _ascending(ranking(scores)[: max(1, kept_count(p, size))].tolist())


def _inverted(size: int, p: float, scores: torch.Tensor | None, temperature: float, generator: object) -> Indices:
    assert scores is not None
    rank = ranking(scores).tolist()
    return _ascending(rank[max(1, kept_count(p, size)) :] or rank[-1:])


def _stochastic(
    size: int, p: float, scores: torch.Tensor | None, temperature: float, generator: np.random.Generator
) -> Indices:
    assert scores is not None
    values = scores.double().numpy()
    deviation = values.std()
    standard = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    # The largest logits plus Gumbel noise are a draw without replacement from the logits' softmax.
    noisy = standard / temperature + generator.gumbel(size=size)
    return _ascending(np.argsort(-noisy, kind="stable")[: max(1, kept_count(p, size))].tolist())


def _ascending(indices: list[int]) -> Indices:
    return tuple(sorted(indices))


_SELECTIONS: dict[str, Choice] = {
    "random": _random,
    "targeted": _targeted,
    "inverted": _inverted,
    "stochastic": _stochastic,
}
