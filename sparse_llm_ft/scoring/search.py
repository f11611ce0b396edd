"""Finding where a run of tests turns from passing to failing, in few tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def section_crossing(passes: Callable[[Sequence[int]], Sequence[bool]], size: int, width: int = 1) -> int:
    """How many of `size` indices Algorithm 1 has zeroed when it stops, by bisection: at most ceil(log2(size)) tests.

    Algorithm 1 zeroes one index after the other and returns those that are left at the first failure. Zeroing none
    passes by definition; zeroing all leaves none whether or not the model still passes, so neither is tested.

    Where `passes` is monotone, the result is that of the one-at-a-time loop. Where it is not (accuracy on few samples
    may rise again), the result is *a* crossing: k - 1 passes, or k is 1, and k does not, or is `size`. It need not be
    the first one.

    Args:
        passes: several k in ascending order, 0 < k < size -> whether the model is still good enough with the k least
            important indices zeroed.
        size: number of indices, at least 1.
        width: tests at a time, which cut what is left into ``width + 1`` parts; 1 is bisection.

    Returns:
        k in 1 to `size`; ``size - k`` indices are kept.
    """
    low, high = 0, size  # low passes, high fails (or is all there is)
    while high - low > 1:
        gap = high - low
        cuts = sorted({low + gap * i // (width + 1) for i in range(1, width + 1)} - {low})
        # Everything below the first failure passes, so the last of those and the failure are a crossing.
        for k, passed in zip(cuts, passes(cuts), strict=True):
            if not passed:
                high = k
                break
            low = k
    return high


def most_rounds(size: int, width: int) -> int:
    """The most rounds that `section_crossing` takes, whatever the tests say."""
    rounds = 0
    while size > 1:
        size = -(-size // (width + 1))
        rounds += 1
    return rounds
