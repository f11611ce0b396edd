"""ZeRO-3's gathers on a trace made by hand: three layers of 100 values, an embedding before them."""

from __future__ import annotations

from types import SimpleNamespace

from sparse_llm_ft.engine.gathers import simulate
from sparse_llm_ft.engine.rank_bytes import Weight
from sparse_llm_ft.engine.step_trace import StepTrace, Use

WEIGHTS = {
    "embed": Weight(1000, 2, False),
    "a": Weight(101, 2, False),
    "b": Weight(100, 2, False),
    "c": Weight(100, 2, False),
    "norm": Weight(10, 2, False),
}


def trace(*names: str) -> StepTrace:
    """Forward through the names and back to the second one; each pass has 50 bytes of its own."""
    uses = [Use("release", (), 0, 0)]
    for backward, order in ((False, names), (True, names[:0:-1])):
        for name in order:
            uses += [Use("fetch", (name,), 0, 50, 0, backward), Use("release", (name,), 0, 0, 0, backward)]
    return StepTrace(0, 50, 0, tuple(uses))


def limits(**changed: int) -> SimpleNamespace:
    settings = {"prefetch_bucket_size": 0, "max_reuse_distance": 0, "max_live_parameters": 10**9}
    return SimpleNamespace(**settings | {"param_persistence_threshold": 10} | changed)


def test_without_prefetch_and_reuse_one_module_at_a_time_is_whole() -> None:
    found = simulate(trace("embed", "a", "b", "c", "norm"), WEIGHTS, limits(), ranks=2)
    # 101 values in two parts are padded to 102; the norm stays gathered and costs no traffic.
    assert found.traffic == 2 * (1000 + 102 + 100 + 100 + 100 + 100 + 102)
    assert found.most == 2000 and found.kept == 0
    assert found.after[:5] == (0, 2000, 0, 204, 0) and max(found.after[2:]) == 204


def test_what_is_soon_read_again_stays() -> None:
    """The last layer is read again at once in backward, the one before after 200 further values."""
    everything = simulate(trace("embed", "a", "b", "c"), WEIGHTS, limits(max_reuse_distance=10**6), ranks=2)
    assert everything.traffic == 2 * (1000 + 102 + 100 + 100)  # nothing is gathered twice
    assert everything.kept == 2 * (102 + 100 + 100)
    near = simulate(trace("embed", "a", "b", "c"), WEIGHTS, limits(max_reuse_distance=50), ranks=2)
    assert near.traffic == everything.traffic + 2 * (102 + 100)  # a and b again
    assert near.kept == 2 * 100


def test_prefetched_weights_share_a_buffer_until_the_last_of_them_is_read() -> None:
    """The embedding, alone, then a, b and c in one buffer of 604 bytes, from which each is copied."""
    found = simulate(trace("embed", "a", "b", "c"), WEIGHTS, limits(prefetch_bucket_size=300), ranks=2)
    assert found.during[1] == 2000 + 604
    assert found.most == 2000 + 604  # the copies come when the embedding is gone
    assert found.during[3] == 604 + 602  # 101 values without padding
    far = simulate(trace("embed", "a", "b", "c"), WEIGHTS, limits(prefetch_bucket_size=100), ranks=2)
    assert far.during[1] == 2000 + 204  # a alone fills it


def test_no_more_values_are_gathered_ahead_than_may_live() -> None:
    found = simulate(
        trace("embed", "a", "b", "c"), WEIGHTS, limits(prefetch_bucket_size=300, max_live_parameters=1000), ranks=2
    )
    assert found.most == 2000


def test_one_rank_gathers_nothing() -> None:
    found = simulate(trace("embed", "a"), WEIGHTS, limits(), ranks=1)
    assert found.most == found.traffic == 0 and set(found.after) == {0}


def test_frozen_embeddings_and_heads_are_gathered_for_one_use_each() -> None:
    """Without the coordinator: nothing is prefetched with them, and they stay for no later use."""
    names = ("embed", "a", "b", "head", "norm")  # the norm is small and stays
    weights = WEIGHTS | {"head": Weight(1000, 2, False)}
    far = limits(max_reuse_distance=10**6, prefetch_bucket_size=10**6)
    for again in (False, True):
        found = simulate(trace(*names), weights, far, ranks=2, tables={"embed": False, "head": again})
        # The layers once, in one buffer: the embedding does not begin their gathering, a does.
        assert found.traffic == 2 * (1000 + 102 + 100) + 2000 * (1 + again)
        assert found.after[1] == 2000 and found.after[2] == 0
        assert found.kept == 2 * (102 + 100)
        head = [use.parameters for use in trace(*names).uses].index(("head",))
        assert found.after[head] == found.kept + 2000 and found.after[head + 1] == found.kept
