"""The crossing found in few tests is the one found one index at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from sparse_llm_ft.scoring.search import most_rounds, section_crossing


def one_at_a_time(passes: Callable[[int], bool], size: int) -> int:
    """Algorithm 1, lines 4-9: while the floor holds, remove one index; returns how many are removed."""
    removed = 0
    while removed < size and passes(removed):
        removed += 1
    return removed


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 64])
@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_a_monotone_metric_gives_the_result_of_the_loop(size: int, width: int) -> None:
    for last in range(size + 1):  # passes up to `last` zeroed; `size` never fails
        asked: list[list[int]] = []

        def passes(cuts: list[int], last: int = last, asked: list = asked) -> list[bool]:
            asked.append(list(cuts))
            assert all(0 < k < size for k in cuts) and cuts == sorted(set(cuts)) and len(cuts) <= width
            return [k <= last for k in cuts]

        found = section_crossing(passes, size, width)
        assert found == one_at_a_time(lambda k, last=last: k <= last, size)
        assert len(asked) <= most_rounds(size, width)


def test_bisection_takes_at_most_log2_of_the_size() -> None:
    for size in (1, 2, 5, 100, 4096):
        asked: list[int] = []

        def passes(cuts: list[int], asked: list = asked) -> list[bool]:
            asked.extend(cuts)
            return [True] * len(cuts)

        assert section_crossing(passes, size) == size
        assert len(asked) <= math.ceil(math.log2(size)) == most_rounds(size, 1)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("script", ["PPFPPFPPPFFF", "PFPFPFPFPFPF", "PFFFFPPPPPPP", "PPPPPPPPPPPF", "PFPPPPPPPPPP"])
def test_a_metric_that_rises_again_gives_some_crossing(script: str, width: int) -> None:
    """`script[k]`: whether the model passes with k indices zeroed."""
    size = len(script)
    found = section_crossing(lambda cuts: [script[k] == "P" for k in cuts], size, width)
    assert 1 <= found <= size
    assert script[found - 1] == "P"
    assert found == size or script[found] == "F"


def test_not_the_first_crossing() -> None:
    script = "PFPPPPPPPFFF"
    assert one_at_a_time(lambda k: script[k] == "P", len(script)) == 1
    assert section_crossing(lambda cuts: [script[k] == "P" for k in cuts], len(script)) == 9
