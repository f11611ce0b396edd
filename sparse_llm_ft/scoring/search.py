"""Bisection: finds where a series of tests turns from passing to failing."""

from __future__ import annotations

from collections.abc import Callable


def find_crossing(passes: Callable[[int], bool], size: int) -> int:
    """How many of `size` indices Algorithm 1 has zeroed when it stops, by bisection: at most ceil(log2(size)) tests.

    Algorithm 1 zeroes one index after the other and returns those that are left at the first failure. Zeroing none
    passes by definition, and zeroing all leaves none in any case, so neither is tested.

    If `passes` is monotone, the result equals that of the one-at-a-time loop. If it is not (accuracy on few samples may
    rise again), the result is *a* crossing, not always the first: k - 1 passes or k is 1, and k fails or is `size`.

    Args:
        passes: k, 0 < k < size -> whether the model meets the floor with the k least important indices zeroed.
        size: number of indices, at least 1.

    Returns:
        k in 1 to `size`; ``size - k`` indices are kept.
    """
    low, high = 0, size  # low passes, high fails (or is all there is)
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return high


def most_tests(size: int) -> int:
    """The largest number of tests in `find_crossing`: ceil(log2(size))."""
    return (size - 1).bit_length()
