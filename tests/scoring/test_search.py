"""The crossing found in few tests is the one found one index at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from sparse_llm_ft.scoring.search import find_crossing, most_tests


def one_at_a_time(passes: Callable[[int], bool], size: int) -> int:
    """Algorithm 1, lines 4-9: while the floor holds, remove one index; returns how many are removed."""
    removed = 0
    while removed < size and passes(removed):
        removed += 1
    return removed


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 64])
def test_a_monotone_metric_gives_the_result_of_the_loop(size: int) -> None:
    for last in range(size + 1):  # passes up to `last` zeroed; `size` never fails
        asked: list[int] = []

        def passes(k: int, last: int = last, asked: list = asked) -> bool:
            asked.append(k)
            assert 0 < k < size
            return k <= last

        assert find_crossing(passes, size) == one_at_a_time(lambda k, last=last: k <= last, size)
        assert len(asked) <= most_tests(size)


@pytest.mark.parametrize("size", [1, 2, 5, 100, 4096])
def test_bisection_takes_at_most_log2_of_the_size(size: int) -> None:
    asked: list[int] = []

    def passes(k: int) -> bool:
        asked.append(k)
        return True

    assert find_crossing(passes, size) == size
    assert len(asked) <= math.ceil(math.log2(size)) == most_tests(size)


@pytest.mark.parametrize("script", ["PPFPPFPPPFFF", "PFPFPFPFPFPF", "PFFFFPPPPPPP", "PPPPPPPPPPPF", "PFPPPPPPPPPP"])
def test_a_metric_that_rises_again_gives_some_crossing(script: str) -> None:
    """`script[k]`: whether the model passes with k indices zeroed."""
    size = len(script)
    found = find_crossing(lambda k: script[k] == "P", size)
    assert 1 <= found <= size
    assert script[found - 1] == "P"
    assert found == size or script[found] == "F"


def test_not_the_first_crossing() -> None:
    script = "PFPPPPPPPFFF"
    assert one_at_a_time(lambda k: script[k] == "P", len(script)) == 1
    assert find_crossing(lambda k: script[k] == "P", len(script)) == 9
