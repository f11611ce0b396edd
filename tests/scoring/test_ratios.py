"""Ratios that are given: one for all, falling with depth, a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.partial_lora import read_table
from sparse_llm_ft.scoring.ratios import balanced, pyramidal, ratios_from_table, with_share

NAMES = ["h.0.q_proj", "h.0.v_proj", "h.1.q_proj", "pooler"]


def test_balanced_and_pyramidal() -> None:
    assert balanced(NAMES, 0.3) == dict.fromkeys(NAMES, (0.3, 0.3))
    assert pyramidal([*NAMES, "h.11.q_proj"], 0.5) == dict(
        zip([*NAMES, "h.11.q_proj"], [(p, p) for p in (0.5, 0.5, 0.25, 0.5, 0.5**12)], strict=True)
    )
    assert pyramidal(NAMES, 1.0) == balanced(NAMES, 1.0) and pyramidal(NAMES, 0.0) == balanced(NAMES, 0.0)


def test_ratios_are_multiplied_to_train_a_share() -> None:
    shapes = {"a": (10, 30), "b": (20, 40)}
    ratios = {"a": (0.1, 0.2), "b": (0.4, 0.0)}
    sizes = 10 + 30 + 20 + 40

    def trained(found: dict[str, tuple[float, float]]) -> float:
        return sum(p * size for name in shapes for p, size in zip(found[name], shapes[name], strict=True)) / sizes

    assert trained(ratios) == pytest.approx(0.15)
    for share in (0.03, 0.15, 0.29):  # at 0.3 b's rows are whole
        factor = share / 0.15
        found = with_share(ratios, shapes, share)
        assert found == {n: pytest.approx((r * factor, c * factor)) for n, (r, c) in ratios.items()}
    bounded = with_share(ratios, shapes, 0.4)
    assert bounded["b"] == (1.0, 0.0) and trained(bounded) == pytest.approx(0.4)
    assert bounded["a"][1] == pytest.approx(2 * bounded["a"][0])
    assert with_share(ratios, shapes, 0.7) == {"a": (1.0, 1.0), "b": (1.0, 0.0)}
    assert with_share(dict.fromkeys(shapes, (0.0, 0.0)), shapes, 0.5) == dict.fromkeys(shapes, (0.0, 0.0))
    assert with_share(ratios, shapes, 0.0) == {"a": pytest.approx((0, 0)), "b": pytest.approx((0, 0))}


@pytest.mark.parametrize(
    "text",
    [
        "q_proj: 0.5\n0.v_proj: [0.25, 1]\nh.1.q_proj: 0\npooler: 1.0\n",
        '{"q_proj": 0.5, "0.v_proj": [0.25, 1], "h.1.q_proj": 0, "pooler": 1.0}',
    ],
)
def test_a_table_of_names_and_endings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ratios.yaml"
    path.write_text(text)
    found = ratios_from_table(read_table(str(path)), NAMES)
    assert found == {
        "h.0.q_proj": (0.5, 0.5),
        "h.0.v_proj": (0.25, 1.0),
        "h.1.q_proj": (0.0, 0.0),
        "pooler": (1.0, 1.0),
    }
    assert list(found) == NAMES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q_proj: 0.5\n", "no entry for module 'h.0.v_proj'"),
        ("q_proj: 1\nv_proj: 1\npooler: 1\nproj: 1\n", "'proj' is not a target module"),
        ("q_proj: 1.5\n", "q_proj is 1.5"),
        ("q_proj: [0.1, 0.2, 0.3]\n", "q_proj is [0.1, 0.2, 0.3]"),
        ("q_proj: .nan\n", "q_proj is nan"),
        ("q_proj: true\n", "q_proj is True"),
        ("q_proj: half\n", "q_proj is 'half'"),
        ("q_proj: 1\nq_proj: 0.5\n", "stands twice"),
        ("? [1]\n: 1\n", "ratios.yaml"),
        ("- 1\n", "is not a table"),
        ("", "is not a table"),
        ("1: 0.5\n", "the key 1 is no text"),
        ("q_proj: [\n", "not YAML or JSON"),
        (b"\xff\xfe\x00", "not YAML or JSON"),
    ],
)
def test_errors_name_the_setting_and_the_entry(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "ratios.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        ratios_from_table(read_table(str(path)), NAMES)
    assert str(error.value).startswith("method.ratios: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(str(tmp_path / "none.yaml"))
