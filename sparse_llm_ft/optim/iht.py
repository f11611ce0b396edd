"""StoIHT on omega: keep the K largest after a gradient step, set the others to 0 (WeightLoRA, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sparse_llm_ft.phase import CutRule


def keep_largest(omega: Mapping[str, float], k: int) -> set[str]:
    """Names of the k largest signed values; among equals the earlier name wins."""
    return set(sorted(omega, key=lambda name: -omega[name])[:k])


START = 1.0
"""The value every omega begins with (WeightLoRA, section 3.3)."""


@dataclass
class StoIHT:
    """Applies a `CutRule` step by step.

    While B is 0, omega's gradient is exactly 0, and an adapter that is cut then can never come back. So nothing is cut
    before every omega has moved, that is, before each has had a non-zero gradient (omega has no weight decay). Only the
    last cut, after step T, does not wait: an adapter without a gradient by then ranks below all others.

    Attributes:
        moved: names of the omegas that have had a non-zero gradient.
        kept: names kept by the last cut; empty before the first.
        allowed: names of the omegas that may be kept; None: all. The others are 0 after every cut.
    """

    rule: CutRule
    moved: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    allowed: frozenset[str] | None = None

    def after_step(self, step: int, omega: Mapping[str, float]) -> tuple[dict[str, float], int]:
        """Cut omega, if a cut is due, after optimizer step `step` (from 1) of the phase.

        Args:
            omega: name -> value after the gradient step; every omega began at 1.

        Returns:
            The omegas to overwrite, name -> 0.0 (empty without a cut), and how many adapters this cut swapped in, in
            place of as many others.
        """
        self.moved |= {name for name, value in omega.items() if value != START}
        if not self._due(step, omega):
            return {}, 0
        kept = self._choose(omega)
        swaps = len(kept - self.kept) if self.kept else 0
        self.kept = kept
        return {name: 0.0 for name, value in omega.items() if name not in kept and value != 0.0}, swaps

    def may_cut(self, step: int) -> bool:
        """Whether the rule has a cut after optimizer step `step`; without the omegas it is not known if it waits."""
        rule = self.rule
        return step == rule.steps or (step > rule.after and (step - rule.after) % rule.every == 0)

    def _due(self, step: int, omega: Mapping[str, float]) -> bool:
        return self.may_cut(step) and (step == self.rule.steps or len(self.moved) == len(omega))

    def _choose(self, omega: Mapping[str, float]) -> set[str]:
        if self.rule.choose == "random":
            return set(random.Random(self.rule.seed).sample(sorted(omega), min(self.rule.keep, len(omega))))
        gone = min(omega.values()) - 1.0
        ranked = {n: v if n in self.moved else gone for n, v in omega.items()}
        if self.allowed is not None:
            ranked = {n: v for n, v in ranked.items() if n in self.allowed}
        return keep_largest(ranked, self.rule.keep)

    def to_dict(self) -> dict[str, list[str]]:
        """A checkpoint's part of it, besides the rule: ``moved`` and ``kept``."""
        return {"moved": sorted(self.moved), "kept": sorted(self.kept)}

    @classmethod
    def from_dict(
        cls, rule: CutRule, data: Mapping[str, Iterable[str]] | None, allowed: frozenset[str] | None = None
    ) -> StoIHT:
        """Continue from `to_dict`; None: begin anew."""
        if data is None:
            return cls(rule, allowed=allowed)
        return cls(rule, set(data["moved"]), set(data["kept"]), allowed)
