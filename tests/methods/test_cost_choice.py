"""Which adapters may stay under a budget, against all subsets; and what WeightLoRA makes of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from helpers.method_settings import TARGETS, config, state
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.chain import Chain, build_methods
from sparse_llm_ft.methods.cost_choice import allowed
from sparse_llm_ft.model.step_cost import StepCost, step_flops
from sparse_llm_ft.optim import keep_largest
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import uniform_plan

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
            allowed(depths, shares, keep, budget)
        least = min(share(depths[c[0]], keep) for c in itertools.combinations(range(n), keep))
        named = float(str(error.value).partition("expected ")[2].split()[0])
        assert 0 <= named - least <= 0.001
        assert allowed(depths, shares, keep, named).share <= named
        return
    reach = allowed(depths, shares, keep, budget)
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
        ({"choose": "cost", "budget": 1.5}, "method.budget: 1.5"),
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
