"""DeepSpeed's configuration from `EngineSettings`."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_llm_ft.engine.rank_bytes import zero_settings
from sparse_llm_ft.engine.settings import (
    BUCKET_ELEMENTS,
    EngineSettings,
    check_deepspeed,
    offload_device,
    refused_by_deepspeed,
)
from sparse_llm_ft.errors import ConfigError


def zero(extra: dict[str, object], trained: int) -> Any:
    settings = EngineSettings(2, "bfloat16", 2, 1, 1.0, 0.0, 0.01, "sgd", {"zero_optimization": extra})
    return settings.to_deepspeed(trained)["zero_optimization"]


def test_the_bucket_of_gradients_is_as_large_as_what_is_trained() -> None:
    assert zero({}, 1000)["stage"] == 2 and zero({}, 1000)["reduce_bucket_size"] == 1000
    assert zero({}, 10**12)["reduce_bucket_size"] == BUCKET_ELEMENTS
    assert zero({"reduce_bucket_size": 7}, 1000)["reduce_bucket_size"] == 7


@pytest.mark.parametrize(
    ("stage", "extra", "flat"),
    [
        (1, {}, True),
        (2, {}, True),
        (0, {}, False),
        (3, {}, False),
        (2, {"wall_clock_breakdown": True, "zero_optimization": {"round_robin_gradients": True}}, True),
        (2, {"steps_per_print": 10, "zero_optimization": {"stage3_max_live_parameters": 1}}, True),
        (2, {"zero_optimization": {"overlap_comm": True}}, False),
        (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, False),
        (2, {"communication_data_type": "fp32"}, False),
        (1, {"data_types": {"grad_accum_dtype": "bf16"}}, False),
    ],
)
def test_gradients_are_deepspeeds_where_the_user_sets_how_it_keeps_them(stage: int, extra: Any, flat: bool) -> None:
    settings = EngineSettings(stage, "bfloat16", 2, 1, 1.0, 0.0, 0.01, "sgd", extra)
    assert settings.has_flat_gradients(BUCKET_ELEMENTS) == flat
    assert not settings.has_flat_gradients(BUCKET_ELEMENTS + 1)


def test_deepspeeds_own_names_are_known() -> None:
    check_deepspeed(zero_extra(stage3_max_reuse_distance=0, max_live_parameters=10), 3, "bfloat16")
    with pytest.raises(ConfigError, match="stage3_max_reuse_distence: unknown key; did you mean stage3_max_reuse_dist"):
        check_deepspeed(zero_extra(stage3_max_reuse_distence=0), 3, "bfloat16")


def zero_extra(**settings: object) -> dict[str, object]:
    return {"zero_optimization": settings}


HALF, DISK = {"device": "cpu", "ratio": 0.5}, {"device": "nvme", "nvme_path": "/tmp"}
ACCUMULATED = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("extra", "stage", "line"),
    [
        (
            zero_extra(compute_grad_norm=False),
            3,
            "zero_optimization: DeepSpeed refuses this (compute_grad_norm=false is",
        ),
        (zero_extra(offload_optimizer=HALF), 3, "zero_optimization.offload_optimizer.ratio: 0.5 needs an optimizer of"),
        (zero_extra(offload_optimizer=DISK), 3, "zero_optimization.offload_optimizer.device: nvme needs an optimizer"),
        (zero_extra(zenflow={"topk_ratio": 0.1}), 2, "zero_optimization.zenflow: needs an optimizer of DeepSpeed's"),
        (
            ACCUMULATED,
            1,
            "data_types.grad_accum_dtype: fp32, and deepspeed.zero_stage is 1; expected deepspeed.zero_st",
        ),
        (ACCUMULATED, 0, "data_types.grad_accum_dtype: fp32, and deepspeed.zero_stage is 0"),
    ],
)
def test_what_the_engine_cannot_use_is_refused(extra: dict[str, object], stage: int, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_deepspeed(extra, stage, "bfloat16")
    assert str(refused.value).startswith(f"deepspeed.{line}")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (zero_extra(offload_optimizer="cpu"), ".zero_optimization.offload_optimizer: 'cpu' is not allowed"),
        ({"tensorboard": {"enabled": "x"}}, ".tensorboard.enabled: 'x' is not allowed; expected true or false"),
        ({"tensorboard": {"enable": True}}, ".tensorboard.enable: True is not allowed; expected no such key"),
        (
            {"communication_data_type": "fp99"},
            ".communication_data_type: 'fp99' is not allowed (ValueError: Invalid comm",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp99"}},
            ": data_types: DeepSpeed refuses this ('fp99' is not a valid",
        ),
        ({"flops_profiler": {"enabled": "no"}}, ".flops_profiler: {'enabled': 'no'} is not allowed (TypeError"),
        ({"nebula": {"enabled": True}}, ".nebula: {'enabled': True} is not allowed (DeepSpeedConfigError: Nebula"),
        ({"sparse_gradients": True}, ".sparse_gradients: True is not allowed ("),
    ],
)
def test_what_deepspeed_does_not_take_is_one_line_before_weights_are_loaded(
    extra: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_deepspeed(extra, 2, "bfloat16")
    assert str(refused.value).startswith(f"deepspeed{message}")
    assert "Input should" not in str(refused.value)


def test_the_first_of_several_wrong_settings_is_named() -> None:
    """A set's order differs between ranks, whose hash seeds differ."""
    wrong = {"tensorboard": {"enabled": "x"}, "nebula": {"enabled": True}, "communication_data_type": "fp99"}
    for key in wrong:
        extra = {key: wrong[key]} | wrong
        with pytest.raises(ConfigError, match=rf"^deepspeed\.{key}"):
            check_deepspeed(extra, 2, "bfloat16")


@pytest.mark.parametrize(
    ("extra", "stage", "dtype"),
    [
        (zero_extra(compute_grad_norm=False), 2, "bfloat16"),
        (ACCUMULATED, 2, "bfloat16"),
        (ACCUMULATED | zero_extra(offload_optimizer={"device": "cpu"}), 1, "bfloat16"),
        (ACCUMULATED, 0, "float32"),
        ({"steps_per_print": 5, "wall_clock_breakdown": True, "csv_monitor": {"enabled": False}}, 2, "float32"),
    ],
)
def test_what_fits_the_stage_is_not_refused(extra: dict[str, object], stage: int, dtype: Any) -> None:
    check_deepspeed(extra, stage, dtype)


def test_a_refusal_while_the_engine_is_built_is_one_line_too() -> None:
    with (
        pytest.raises(ConfigError, match=r"^deepspeed: prescale_gradients: DeepSpeed refuses this \(not yet supported"),
        refused_by_deepspeed({"prescale_gradients": True}),
    ):
        raise AssertionError("not yet supported")
    with pytest.raises(AssertionError), refused_by_deepspeed({}):  # then it is no user's fault
        raise AssertionError("ours")


@pytest.mark.parametrize(("offload", "device"), [(None, "none"), ({}, "none"), ({"device": "cpu"}, "cpu")])
def test_where_the_optimizers_state_is(offload: dict[str, str] | None, device: str) -> None:
    extra = {} if offload is None else zero_extra(offload_optimizer=offload)
    settings = EngineSettings(2, "bfloat16", 2, 1, 1.0, 0.0, 0.01, "sgd", extra)
    assert offload_device(zero_settings(settings, 100)) == device


def test_deepspeed_times_nothing_by_itself() -> None:
    """Its throughput timer waits for the GPU before and after every micro-batch."""
    from deepspeed.utils.config import get_timers_config

    settings = EngineSettings(2, "bfloat16", 1, 1, 1.0, 0.0, 0.1, "sgd", {})
    assert get_timers_config({}).enabled and not get_timers_config(settings.to_deepspeed()).enabled
