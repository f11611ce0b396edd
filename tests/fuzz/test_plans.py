"""Any JSON as a plan or a phase: what is read is what was written, or one line; and nothing is built to a claim."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.inputs import VALUES, is_one_line, wounded
from sparse_llm_ft.adapters import TUNERS, tuner_of
from sparse_llm_ft.adapters.targets import check_modules
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json
from sparse_llm_ft.phase import CutRule, Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, PlanError

TARGETS = {"h.0.q": (6, 4), "h.0.k": (6, 4), "h.0.v": (6, 4)}
PLAN = AdapterPlan(
    {
        "h.0.q": ModuleAdapter(2, 4.0, rows=IndexMask(6, (1, 3, 4)), cols=IndexMask(4, (0, 2))),
        "h.0.k": ModuleAdapter(2, 4.0, group="g"),
        "h.0.v": None,
    },
    trained=("score",),
)
PHASE = Phase(
    "train",
    PLAN,
    steps=3,
    target_plan=PLAN,
    subset=Subset(0.5, None, 1),
    scoring=ScoringSpec("derivation"),
    cut=CutRule(1, 2),
).with_batch(2, 8)


def survives(kind: type, data: Any, shapes: dict | None) -> None:
    try:
        value = kind.from_dict(data, shapes)
    except PlanError as error:
        assert is_one_line(error)
    else:
        written = json.loads(json.dumps(value.to_dict()))
        assert kind.from_dict(written, shapes).to_dict() == value.to_dict()


@given(VALUES | wounded(PLAN.to_dict()), st.sampled_from([None, TARGETS]))
def test_plans(data: Any, shapes: dict | None) -> None:
    survives(AdapterPlan, data, shapes)


@given(VALUES | wounded(PHASE.to_dict()), st.sampled_from([None, TARGETS]))
def test_phases(data: Any, shapes: dict | None) -> None:
    survives(Phase, data, shapes)


def test_the_unwounded_are_good() -> None:
    assert AdapterPlan.from_dict(PLAN.to_dict(), TARGETS) == PLAN
    assert Phase.from_dict(json.loads(json.dumps(PHASE.to_dict())), TARGETS) == PHASE


@given(st.integers(0, 10**13), st.binary(max_size=3))
@example(10**12, b"")
def test_a_mask_is_no_larger_than_its_bytes(size: int, bits: bytes) -> None:
    import base64

    try:
        kept = IndexMask.from_dict({"size": size, "bits": base64.b64encode(bits).decode()})
    except PlanError as error:
        assert is_one_line(error)
    else:
        assert kept.size <= 8 * len(bits) and IndexMask.from_dict(kept.to_dict()) == kept


@given(
    st.dictionaries(
        st.sampled_from([*TARGETS, "other"]),
        st.none() | st.builds(ModuleAdapter, st.integers(1, 70_000).filter(lambda r: r <= 2**16), st.just(1.0)),
        min_size=1,
    ),
    st.sampled_from([name for name, tuner in TUNERS.items() if tuner.bounded_rank] + ["unknown"]),
)
def test_a_plan_that_fits_has_matrices_within_its_modules(modules: dict, tuner: Any) -> None:
    try:
        plan = AdapterPlan(modules, tuner=tuner)
        check_modules(plan, TARGETS)
    except PlanError as error:
        assert is_one_line(error)
    else:
        assert all(max(shape) <= 6 for shape in tuner_of(plan).shapes(plan, TARGETS).values())


@given(st.text(max_size=40) | VALUES.map(lambda value: json.dumps(value)))
@example("[" * 200_000)
@example('{"a":' * 200_000)
@example("9" * 5000)
@example("1e999")
@example("NaN")
@example("-Infinity")
@example('{"a": 1, "a": 2}')
def test_json(text: str) -> None:
    try:
        value = parse_json(text)
    except ParseError:
        return
    assert parse_json(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e999", '{"a": 1, "a": 1}', "9" * 5000])
def test_what_is_no_strict_json_is_refused(text: str) -> None:
    with pytest.raises(ParseError):
        parse_json(text)
