"""DeepSpeed's configuration from `EngineSettings`."""

from __future__ import annotations

from typing import Any

from sparse_llm_ft.engine.engine import BUCKET_ELEMENTS, EngineSettings


def zero(extra: dict[str, object], trained: int) -> Any:
    settings = EngineSettings(2, "bfloat16", 2, 1, 1.0, 0.0, 0.01, "sgd", {"zero_optimization": extra})
    return settings.to_deepspeed(trained)["zero_optimization"]


def test_the_bucket_of_gradients_is_as_large_as_what_is_trained() -> None:
    assert zero({}, 1000)["stage"] == 2 and zero({}, 1000)["reduce_bucket_size"] == 1000
    assert zero({}, 10**12)["reduce_bucket_size"] == BUCKET_ELEMENTS
    assert zero({"reduce_bucket_size": 7}, 1000)["reduce_bucket_size"] == 7
