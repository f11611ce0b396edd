"""Which adapters may stay under a budget, against all subsets; and what WeightLoRA makes of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from helpers.method_settings import TARGETS, config, state
from sparse_llm_ft.config.budget import Budget
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.chain import Chain, build_methods
from sparse_llm_ft.methods.cost_choice import allowed, lowest_within
from sparse_llm_ft.model.step_cost import StepCost, step_flops
from sparse_llm_ft.optim import keep_largest
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, uniform_plan

LAYERS = 4
COST = StepCost(
    tuple(f"layers.{i}" for i in range(LAYERS)),
    {name: int(name.split(".")[1]) for name in TARGETS} | {"embed": 0, "score": LAYERS},
    forward=(100_000.0,) * LAYERS,
    backward=(120_000.0,) * LAYERS,
    head=50_000.0,
    tokens=(10,) * LAYERS,
)
METHOD = {"name": "weight_lora", "keep": 3, "steps": 5, "choose": "cost"}


def first(method: dict, trained: tuple[str, ...] = ()) -> tuple[Chain, Phase]:
    chain = build_methods(config(method), 20, COST)
    return chain, chain.first(uniform_plan(TARGETS, 2, 6.0, trained=trained), TARGETS)


@pytest.mark.parametrize("seed", range(40))
def test_no_set_within_the_budget_has_a_larger_sum_of_omega(seed: int) -> None:
    draw = random.Random(seed)
    layers, n, work = draw.randint(1, 4), draw.randint(2, 7), draw.choice([0.0, 0.3])
    depths = sorted(draw.randrange(layers) for _ in range(n))
    forward, backward = ([draw.random() for _ in range(layers)] for _ in range(2))
    keep, budget, head = draw.randint(1, n - 1), draw.uniform(0.4, 1.0), draw.random()
    omega = {f"{i}": draw.gauss(0.5, 1.0) for i in range(n)}

    def share(lowest: int, count: int) -> float:
        whole = step_flops(forward, backward, head, depths[0], work * n)
        return step_flops(forward, backward, head, lowest, work * count) / whole

    shares = {layer: share(layer, min(keep, sum(d >= layer for d in depths))) for layer in set(depths)}
    sets = [
        (sum(omega[f"{i}"] for i in chosen), chosen)
        for chosen in itertools.combinations(range(n), keep)
        if share(depths[chosen[0]], keep) <= budget
    ]
    if not sets:
        with pytest.raises(ConfigError, match=r"^method\.budget") as error:
            allowed(depths, shares, keep, Budget(step_time=budget))
        least = min(share(depths[c[0]], keep) for c in itertools.combinations(range(n), keep))
        named = float(str(error.value).partition("expected ")[2].split()[0])
        assert 0 <= named - least <= 0.001
        assert allowed(depths, shares, keep, Budget(step_time=named)).share <= named
        return
    reach = allowed(depths, shares, keep, Budget(step_time=budget))
    kept = keep_largest({name: value for name, value in omega.items() if int(name) >= reach.first}, keep)
    assert sorted(kept, key=int) == [f"{i}" for i in max(sets)[1]]
    assert reach.share <= budget and depths[reach.first] == reach.layer


def test_a_budget_of_one_allows_all_and_a_smaller_one_the_upper_layers() -> None:
    _, phase = first(METHOD | {"budget": 1})
    assert phase.cut is not None and phase.cut.first == 0 and phase.cut.choose == "omega"
    chain, phase = first(METHOD | {"budget": 0.75})
    assert phase.cut is not None and phase.cut.first == 6  # layers 2 and 3, with three adapters each
    line = chain.outlook(phase, TARGETS)
    assert line is not None and "survivors may be from layers.2 up" in line and "method.budget 0.75" in line
    # By hand: 3 of 12 adapters, the largest on (12, 8): 6 * 2 * 20 * 10 = 2400, and 6 * 2 * 16 * 10 on (8, 8).
    works = [6 * 2 * sum(shape) * 10 for shape in TARGETS.values()]
    whole = 4 * 100_000 + 4 * 120_000 + 100_000 + sum(works)
    assert f"at most {(4 * 100_000 + 2 * 120_000 + 100_000 + 2400 + 2400 + 1920) / whole:.3f}" in line


@pytest.mark.parametrize(
    ("budget", "room"), [(0.3, "no adapter"), (0.64, "3 of method.keep's 4 adapters"), (0.66, "3 of method.keep's")]
)
def test_a_budget_without_room_is_refused_with_the_least_that_has(budget: float, room: str) -> None:
    with pytest.raises(ConfigError) as error:
        first(METHOD | {"keep": 4, "budget": budget})
    assert str(error.value).startswith(f"method.budget: {budget} of a step with all adapters leaves room for {room}")
    least = float(str(error.value).partition("expected ")[2].split()[0])
    _, phase = first(METHOD | {"keep": 4, "budget": least})
    assert phase.cut is not None and phase.cut.first == 6


def test_ranks_that_grow_cost_what_all_adapters_do() -> None:
    (_, plain), (_, plus) = (
        first(METHOD | {"name": name, "budget": 0.75}) for name in ("weight_lora", "weight_lora_plus")
    )
    assert plain.cut is not None and plus.cut is not None
    assert (plain.cut.first, plus.cut.first) == (6, 9)


def test_embeddings_that_are_trained_leave_nothing_to_save() -> None:
    first(METHOD | {"budget": 0.75}, trained=("score",))
    with pytest.raises(ConfigError, match=r"leaves room for no adapter; expected 0\.9\d+ or more"):
        first(METHOD | {"budget": 0.75}, trained=("embed",))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"choose": "cost"}, "method.budget: left out, and method.choose is cost; expected a share such as 0.7"),
        ({"budget": 0.5}, "method.budget: 0.5, and method.choose is omega; expected choose: cost, or no budget"),
        ({"choose": "random", "budget": 0.5}, "method.budget: 0.5, and method.choose is random; expected choose: cost"),
        ({"choose": "cost", "budget": 1.5}, "method.budget.step_time: 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config({"name": "weight_lora", "keep": 3, "steps": 5} | method)
    assert str(error.value).startswith(message)


def test_the_change_says_where_the_lowest_survivor_is() -> None:
    chain, phase = first(METHOD | {"budget": 0.9})
    before = state(phase)
    for name in phase.plan.active:
        before.tensors[f"{name}.lora_omega"].fill_(1.0 if name.startswith("layers.3") else 0.0)
    following = chain.next(phase, before, None, TARGETS)
    assert following is not None
    line = chain.remark(phase, following[0], TARGETS)
    assert line is not None and line.startswith("the lowest survivor is in layers.3: a step costs 0.6")
    assert chain.outlook(following[0], TARGETS) is None
    assert chain.remark(replace(phase, cut=None), following[0], TARGETS) is None


@pytest.mark.parametrize("seed", range(40))
def test_both_limits_hold_and_no_lower_layer_meets_them(seed: int) -> None:
    draw = random.Random(seed)
    layers = sorted(draw.sample(range(40), draw.randint(1, 12)))
    shares = dict(zip(layers, sorted((draw.random() for _ in layers), reverse=True), strict=True))
    needs = dict(zip(layers, sorted(draw.choices(range(1, 9), k=len(layers)), reverse=True), strict=True))
    memory, step_time = draw.randint(1, 9), draw.uniform(0.01, 1.0)
    for budget in (
        Budget(memory=memory, step_time=step_time),
        Budget(memory=memory),
        Budget(step_time=step_time),
    ):
        within = [
            layer
            for layer in layers
            if (budget.step_time is None or shares[layer] <= step_time)
            and (budget.memory is None or needs[layer] <= memory)
        ]
        assert lowest_within(shares, budget, needs.__getitem__) == min(within, default=None)
    assert lowest_within(shares, Budget(memory=1)) == layers[0], "what cannot be planned is not limited"


def bytes_from(plan: AdapterPlan) -> int:
    """Memory that falls by 10 with every layer below the lowest adapter; 100 with adapters everywhere."""
    return 100 - 10 * min(int(name.split(".")[1]) for name in plan.active)


@pytest.mark.parametrize(("memory", "first_allowed"), [(100, 0), (95, 3), (85, 6), (70, 9)])
def test_a_memory_budget_allows_the_layers_whose_survivors_fit(memory: int, first_allowed: int) -> None:
    chain = build_methods(config(METHOD | {"budget": {"memory": memory}}), 20, COST, bytes_from)
    phase = chain.first(uniform_plan(TARGETS, 2, 6.0), TARGETS)
    assert phase.cut is not None and phase.cut.first == first_allowed
    both = build_methods(config(METHOD | {"budget": {"memory": memory, "step_time": 0.75}}), 20, COST, bytes_from)
    phase = both.first(uniform_plan(TARGETS, 2, 6.0), TARGETS)
    assert phase.cut is not None and phase.cut.first == max(6, first_allowed)


def test_a_memory_budget_that_nothing_fits_is_refused_and_one_that_cannot_be_planned_waits() -> None:
    settings = config(METHOD | {"budget": {"memory": 50}})
    with pytest.raises(ConfigError, match=r"^method\.budget: .*, but 3 adapters in the uppermost layers need"):
        build_methods(settings, 20, COST, bytes_from).first(uniform_plan(TARGETS, 2, 6.0), TARGETS)
    phase = build_methods(settings, 20, COST).first(uniform_plan(TARGETS, 2, 6.0), TARGETS)
    assert phase.cut is not None and phase.cut.first == 0


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("budget", "lowest"), [({"memory": 85}, 2), (0.75, 2), ({"memory": 70, "step_time": 0.99}, 3)])
def test_lora_drop_has_adapters_from_the_lowest_layer_within_the_budget(
    share: bool, budget: object, lowest: int
) -> None:
    method = {"name": "lora_drop", "share": share, "threshold": 1.0, "budget": budget}
    chain = build_methods(config(method), 20, COST, bytes_from)
    pilot = chain.first(uniform_plan(TARGETS, 2, 6.0), TARGETS)
    assert len(pilot.plan.active) == len(TARGETS), "the pilot measures all"
    following = chain.next(pilot, state(pilot), dict.fromkeys(TARGETS, 1.0), TARGETS)
    assert following is not None
    after = following[0].plan
    assert set(after.active) == {name for name in TARGETS if COST.depths[name] >= lowest}
    line = chain.remark(pilot, following[0], TARGETS)
    assert line is not None and f"adapters from layers.{lowest} up" in line
    foreseen = chain.foresee(pilot, TARGETS)
    assert foreseen is not None and set(foreseen[0].plan.active) == set(after.active)


def test_lora_drop_refuses_before_the_pilot_what_no_layer_is_within() -> None:
    method = {"name": "lora_drop", "budget": {"memory": 50}}
    with pytest.raises(ConfigError, match=r"^method\.budget: .* a step with adapters in layers\.3 alone costs"):
        build_methods(config(method), 20, COST, bytes_from).first(uniform_plan(TARGETS, 2, 6.0), TARGETS)


def test_a_number_is_a_share_of_time_and_is_written_as_one() -> None:
    given = config(METHOD | {"budget": 0.5}).method[0]
    assert given.budget == Budget(step_time=0.5) and given.model_dump(mode="json")["budget"] == 0.5
    both = config(METHOD | {"budget": {"memory": "40GiB", "step_time": 0.6}}).method[0]
    assert both.model_dump(mode="json")["budget"] == {"memory": 40 * 2**30, "step_time": 0.6}
    assert both.memory_budget == 40 * 2**30


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ({}, "method.budget: "),
        ({"memory": "much"}, "method.budget.memory: 'much'"),
        ({"memroy": 1}, "method.budget.memroy: unknown key; did you mean memory"),
        ({"step_time": 2}, "method.budget.step_time: 2"),
    ],
)
def test_wrong_budgets_are_one_line(budget: dict, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(METHOD | {"budget": budget})
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("choose", "own"), [("importance", {2, 3}), ("top", {2, 3}), ("random", {2, 3}), ("inverted", set())]
)
def test_lora_drop_chooses_among_the_layers_that_the_budget_allows(share: bool, choose: str, own: set[int]) -> None:
    """Layers 0 and 2 are important, and the budget allows 2 and 3: as many keep their own, not what is left of them."""
    method = {"name": "lora_drop", "share": share, "threshold": 0.6, "budget": 0.75, "choose": choose}
    chain = build_methods(config(method), 20, COST)
    pilot = chain.first(uniform_plan(TARGETS, 2, 6.0), TARGETS)
    scores = {name: (8.0, 1.0, 3.0, 2.0)[COST.depths[name]] for name in TARGETS}
    if choose == "inverted" and not share:  # no adapter from layer 2 up; layer 1's costs more than the budget
        with pytest.raises(ConfigError, match=r"^method\.budget"):
            chain.next(pilot, state(pilot), scores, TARGETS)
        return
    following = chain.next(pilot, state(pilot), scores, TARGETS)
    assert following is not None
    after = following[0].plan.active
    assert {COST.depths[name] for name in after} == {2, 3}
    assert {COST.depths[name] for name, adapter in after.items() if adapter.group is None} == own
