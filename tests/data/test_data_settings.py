"""Ways to pass the data: which exclude each other, and which do not."""

from __future__ import annotations

import pytest

from sparse_llm_ft.config import RunConfig, parse_config
from sparse_llm_ft.errors import ConfigError

REFUSED: dict[str, tuple[dict, str]] = {
    "cached": (
        {"task": {"streaming": True}, "training": {"prefix_cache": "memory"}},
        "training.prefix_cache: memory, but streamed samples have no numbers to keep them under; expected off",
    ),
    "both": ({"task": {"streaming": True, "packing": True}}, "task.streaming: true beside task.packing, which needs"),
    "no steps": (
        {"task": {"streaming": True}, "training": {"max_steps": None}},
        "training.max_steps: not given, and task.streaming is true; expected a number of steps",
    ),
    "drop": (
        {"task": {"streaming": True}, "method": {"name": "lora_drop"}},
        "task.streaming: true, and lora_drop draws",
    ),
    "sparse": ({"task": {"streaming": True}, "method": "sparse_adapter"}, "true, and sparse_adapter draws a part of"),
    "partial": (
        {"task": {"streaming": True}, "method": {"name": "partial_lora"}},
        "true, and partial_lora draws a part",
    ),
    "second": (
        {
            "task": {"streaming": True},
            "method": [{"name": "weight_lora", "keep": 2, "steps": 2}, {"name": "partial_lora"}],
        },
        "true, and partial_lora draws a part",
    ),
    "head": (
        {"task": {"packing": True, "mode": "sequence_classification"}},
        "task.packing: true, and task.mode is seq",
    ),
    "seq2seq": (
        {"task": {"packing": True, "mode": "seq2seq_lm"}},
        "and task.mode is seq2seq_lm; expected false, or mode",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ways_to_pass_the_data_that_exclude_each_other_are_refused(name: str, settings: dict) -> None:
    changes, message = REFUSED[name]
    for section, values in changes.items():
        settings[section] = settings[section] | values if section != "method" else values
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def test_the_same_settings_alone_are_not(settings: dict) -> None:
    for change in ({"packing": True}, {"packing": True, "mode": "causal_lm"}, {"streaming": True}):
        assert isinstance(parse_config(settings | {"task": settings["task"] | change}), RunConfig)
    random = {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5, "selection": "random"}
    tree = settings | {"task": settings["task"] | {"streaming": True}, "method": random}
    assert isinstance(parse_config(tree), RunConfig)
