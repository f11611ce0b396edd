"""What a plan accepts, what it refuses, and what it counts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from sparse_llm_ft.adapters import count_parameters
from sparse_llm_ft.plan import (
    AdapterPlan,
    IndexMask,
    ModuleAdapter,
    PlanError,
    group_name,
    module_kind,
    uniform_plan,
    with_omega,
)

ADAPTER = ModuleAdapter(r=4, lora_alpha=8.0, omega=0.25, train_omega=True)
PLAN = AdapterPlan({"a.q": ADAPTER, "a.k": None, "b.q": ModuleAdapter(r=1, lora_alpha=3.5)}, lora_dropout=0.125)


def module(**changes):
    given = {"r": 2, "lora_alpha": 4.0, "omega": 1.0, "train_omega": False, "group": None, "rows": None, "cols": None}
    return given | changes


def plan_dict(**changes):
    modules = {"layers.3.q_proj": module()}
    given = {
        "version": 3,
        "lora_dropout": 0.0,
        "tuner": "sparse_lora",
        "options": {},
        "trained": [],
        "masking": "compact",
        "modules": modules,
    }
    return given | changes


def test_a_plan_survives_its_own_json():
    read = AdapterPlan.from_dict(json.loads(json.dumps(PLAN.to_dict())))
    assert read == PLAN
    assert list(read.modules) == ["a.q", "a.k", "b.q"]


def test_to_dict_is_a_copy():
    PLAN.to_dict()["modules"]["a.q"]["r"] = 99
    assert PLAN.active["a.q"].r == 4


def test_active_keeps_the_order_and_leaves_out_the_untouched():
    assert list(PLAN.active) == ["a.q", "b.q"]


@pytest.mark.parametrize("version", [0, 2, "3", None])
def test_another_version_is_refused(version):
    with pytest.raises(PlanError, match="version"):
        AdapterPlan.from_dict(plan_dict(version=version))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "plan",
        {},
        {"version": 3, "modules": {}},
        plan_dict(extra=1),
        plan_dict(modules=[]),
        plan_dict(lora_dropout="0.1"),
        plan_dict(lora_dropout=None),
        plan_dict(tuner=["lora"]),
        plan_dict(options=[]),
        plan_dict(trained="classifier"),
        plan_dict(trained=[1]),
    ],
)
def test_anything_but_the_known_keys_is_refused(data):
    with pytest.raises(PlanError):
        AdapterPlan.from_dict(data)


@pytest.mark.parametrize(
    "value",
    [
        {k: v for k, v in module().items() if k != "omega"},
        module(scaling=2.0),
        [2, 4.0],
        3,
        module(r=True),
        module(r=0),
        module(r=-1),
        module(r=2.0),
        module(r="2"),
        module(r=None),
        module(lora_alpha=math.nan),
        module(lora_alpha=math.inf),
        module(lora_alpha=True),
        module(lora_alpha="8"),
        module(omega=math.nan),
        module(omega=-math.inf),
        module(omega=None),
        module(train_omega=1),
        module(train_omega="yes"),
        module(group="a.b"),
        module(group=3),
        module(rows=[0, 1]),
        module(rows={"size": 9, "bits": "AA=="}),
        module(cols={"size": 3, "bits": "AA=="}),
        module(cols={"size": 3, "bits": "not base64"}),
        module(cols={"size": 3, "bits": "CA=="}),
    ],
    ids=repr,
)
def test_a_wrong_module_is_refused_by_name(value):
    with pytest.raises(PlanError, match=r"module 'layers\.3\.q_proj'"):
        AdapterPlan.from_dict(plan_dict(modules={"layers.1.q_proj": module(), "layers.3.q_proj": value}))


@pytest.mark.parametrize("changes", [{"r": True}, {"r": 0}, {"lora_alpha": math.nan}, {"omega": math.inf}])
def test_an_adapter_refuses_the_same_when_made_in_code(changes):
    with pytest.raises(PlanError, match=next(iter(changes))):
        replace(ADAPTER, **changes)


@pytest.mark.parametrize("modules", [{}, {"a.q": None, "a.k": None}])
def test_a_plan_without_adapters_is_refused(modules):
    with pytest.raises(PlanError, match="at least one module"):
        AdapterPlan(modules)


@pytest.mark.parametrize("dropout", [-0.01, 1.0, 1.5, math.nan, math.inf])
def test_dropout_lies_in_0_to_1(dropout):
    with pytest.raises(PlanError, match="lora_dropout"):
        AdapterPlan({"a.q": ADAPTER}, dropout)
    with pytest.raises(PlanError, match="lora_dropout"):
        AdapterPlan.from_dict(plan_dict(lora_dropout=dropout))


def test_negative_omega_is_a_state_not_an_error():
    assert ModuleAdapter(r=1, lora_alpha=1.0, omega=-0.5).omega == -0.5


def test_parameters_are_the_values_of_a_b_and_a_trained_omega():
    # a.q: A is 4 × 6, B is 10 × 4, omega is 1 value: 24 + 40 + 1. b.q: A is 1 × 3, B is 7 × 1: 10.
    shapes = {"a.q": (10, 6), "a.k": (100, 100), "b.q": (7, 3)}
    assert ADAPTER.matrices((10, 6)) == 64
    assert count_parameters(PLAN, shapes) == 75


def test_uniform_plan_cuts_the_rank_to_the_smaller_side_and_keeps_the_scaling():
    targets = {"wide": (3, 50), "tall": (50, 5), "large": (50, 60), "equal": (8, 8)}
    plan = with_omega(uniform_plan(targets, r=8, lora_alpha=20.0, lora_dropout=0.1))
    assert {name: a.r for name, a in plan.active.items()} == {"wide": 3, "tall": 5, "large": 8, "equal": 8}
    assert [a.scaling for a in plan.active.values()] == pytest.approx([2.5] * 4)
    assert list(plan.modules) == list(targets)
    assert plan.lora_dropout == 0.1
    assert all(a.train_omega and a.omega == 1.0 for a in plan.active.values())
    assert not any(a.train_omega for a in uniform_plan(targets, 8, 20.0).active.values())


def test_masks_and_groups_survive_json_and_count_once():
    kept = IndexMask(70, (0, 1, 8, 69))
    masked = ModuleAdapter(r=3, lora_alpha=6.0, group="q-70x9", rows=kept, cols=IndexMask(9, (2,)))
    plan = AdapterPlan({"a.q": masked, "b.q": masked, "c.q": ModuleAdapter(2, 4.0)}, trained=("classifier",))
    assert AdapterPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.groups == {"q-70x9": ["a.q", "b.q"]}
    assert plan.matrix_owners() == {"shared.q-70x9": "a.q", "c.q": "c.q"}
    shapes = dict.fromkeys(plan.modules, (70, 9))
    assert masked.shape((70, 9)) == (4, 1)
    assert count_parameters(plan, shapes) == 3 * (4 + 1) + 2 * (70 + 9)
    assert plan.describe() == "1 own and 2 shared adapters"


@pytest.mark.parametrize("indices", [(), (3,), (-1,), (1, 1), (2, 1)])
def test_kept_indices_ascend_within_their_size(indices):
    with pytest.raises(PlanError):
        IndexMask(3, indices)


def test_a_mask_that_keeps_all_is_none():
    assert IndexMask.of(3, (0, 1, 2)) is None and IndexMask.of(3, (0, 2)) == IndexMask(3, (0, 2))


def test_members_of_a_group_are_alike_but_for_omega():
    one = ModuleAdapter(r=2, lora_alpha=4.0, group="g")
    AdapterPlan({"a": one, "b": replace(one, omega=0.5)})
    with pytest.raises(PlanError, match="group 'g'"):
        AdapterPlan({"a": one, "b": replace(one, r=3)})


def test_the_kind_of_a_name():
    assert module_kind("model.layers.3.self_attn.q_proj") == "self_attn.q_proj"
    assert module_kind("bert.encoder.layer.0.attention.output.dense") == "attention.output.dense"
    assert module_kind("layers.2.experts.7.w1") == "experts.w1"
    assert module_kind("pooler.dense") == "dense"
    assert module_kind("lone") == "lone"
    assert group_name("self_attn.k_proj", (4, 8)) == "self_attn-k_proj-4x8"
