"""DeepSpeed's configuration from `EngineSettings`."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_llm_ft.engine.settings import BUCKET_ELEMENTS, EngineSettings, check_deepspeed
from sparse_llm_ft.errors import ConfigError


def zero(extra: dict[str, object], trained: int) -> Any:
    settings = EngineSettings(2, "bfloat16", 2, 1, 1.0, 0.0, 0.01, "sgd", {"zero_optimization": extra})
    return settings.to_deepspeed(trained)["zero_optimization"]


def test_the_bucket_of_gradients_is_as_large_as_what_is_trained() -> None:
    assert zero({}, 1000)["stage"] == 2 and zero({}, 1000)["reduce_bucket_size"] == 1000
    assert zero({}, 10**12)["reduce_bucket_size"] == BUCKET_ELEMENTS
    assert zero({"reduce_bucket_size": 7}, 1000)["reduce_bucket_size"] == 7


def test_deepspeeds_own_names_are_known() -> None:
    check_deepspeed({"zero_optimization": {"stage3_max_reuse_distance": 0, "max_live_parameters": 10}})
    with pytest.raises(ConfigError, match="stage3_max_reuse_distence: unknown key; did you mean stage3_max_reuse_dist"):
        check_deepspeed({"zero_optimization": {"stage3_max_reuse_distence": 0}})
