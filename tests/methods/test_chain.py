"""Methods one after the other, what refuses to be composed, and the baselines' plans."""

from __future__ import annotations

import pytest
import torch

from helpers.method_settings import TARGETS, config, derivation, start, state
from sparse_llm_ft.adapters import count_parameters, tuner_of
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.plan import FULL_MODEL, uniform_plan

WEIGHT = {"name": "weight_lora", "keep": 2, "steps": 5}
PLUS = WEIGHT | {"name": "weight_lora_plus"}
BALANCED = {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5}


@pytest.mark.parametrize(
    ("name", "tuner"),
    [
        ("lora", "sparse_lora"),
        ("lora_plus", "sparse_lora"),
        ("lora, peft", "lora"),
        ("lora_plus, peft", "lora"),
        ("rslora", "rslora"),
        ("dora", "dora"),
        ("vera", "vera"),
        ("adalora", "adalora"),
    ],
)
def test_baselines_are_one_phase_of_one_tuner(name: str, tuner: str) -> None:
    name, _, chosen = name.partition(", ")
    extra = {"target_r": 1} if name == "adalora" else {"tuner": chosen} if chosen else {}
    chain, phase = start({"name": name, **extra})
    assert phase.plan.tuner == tuner and list(phase.plan.active) == list(TARGETS) and phase.open_ended
    assert phase.lora_b_lr_factor == (16 if name == "lora_plus" else 1)
    assert chain.next(phase, state(phase), None, TARGETS) is None
    if name == "adalora":
        assert phase.plan.options["total_step"] == 20 and phase.plan.options["tinit"] == 2


def test_rslora_keeps_lora_alpha_where_a_small_matrix_cuts_the_rank() -> None:
    """The factor lora_alpha / sqrt(r) follows from the module's own rank; LoRA keeps lora_alpha / r instead."""
    factors = {}
    for name in ("lora", "rslora"):
        chain = build_methods(config(name, adapter={"r": 8, "lora_alpha": 6}), total_steps=20)
        plan = chain.first(uniform_plan(TARGETS, 8, 6.0), TARGETS).plan
        factors[name] = {a.r: tuner_of(plan).scaling(a) for a in plan.active.values()}
    assert factors == {"lora": {8: 6 / 8, 4: 6 / 8}, "rslora": {8: 6 / 8**0.5, 4: 6 / 2}}


def test_tied_lora_shares_per_type_and_shape_and_full_trains_everything() -> None:
    _, tied = start("tied_lora")
    assert {group: len(names) for group, names in tied.plan.groups.items()} == {
        "attn-q-8x8": 4,
        "attn-k-4x8": 4,
        "mlp-up-12x8": 4,
    }
    _, full = start("full")
    assert not full.plan.active and full.plan.trained == (FULL_MODEL,)


def test_masks_then_weights() -> None:
    """Masked adapters are weighed; for WeightLoRA+ the masked budget is what ranks grow into."""
    chain, select = start([BALANCED, PLUS])
    assert select.name == "select" and select.method == 1
    assert all(a.train_omega for a in select.plan.active.values())
    assert all(a.matrices(TARGETS[n]) < 2 * sum(TARGETS[n]) for n, a in select.plan.active.items())
    before = state(select)
    for i, name in enumerate(TARGETS):
        before.tensors[f"{name}.lora_omega"].fill_(float(i < 2))
    train, after = chain.next(select, before, None, TARGETS)
    budget = sum(a.matrices(TARGETS[name]) for name, a in select.plan.active.items())
    used = sum(a.matrices(TARGETS[name]) for name, a in train.plan.active.items())
    assert len(train.plan.active) == 2 and used <= budget
    for name, adapter in train.plan.active.items():
        old = select.plan.active[name]
        delta = after.tensors[f"{name}.lora_B"] @ after.tensors[f"{name}.lora_A"] * adapter.scaling
        expected = before.tensors[f"{name}.lora_B"] @ before.tensors[f"{name}.lora_A"] * old.scaling
        assert adapter.rows == old.rows and (delta - expected).norm() <= 1e-5 * expected.norm()
    assert chain.next(train, after, None, TARGETS) is None


def test_sharing_then_masks() -> None:
    chain, pilot = start([{"name": "lora_drop", "threshold": 0.5}, {"name": "partial_lora"}])
    scores = {name: float(i + 1) for i, name in enumerate(TARGETS)}
    derive, fresh = chain.next(pilot, state(pilot), scores, TARGETS)
    assert derive.name == "derive" and derive.method == 1 and derive.plan.groups and fresh.tensors == {}
    train, _ = chain.next(derive, state(derive), derivation(), TARGETS)
    assert train.plan.groups == derive.plan.groups
    assert count_parameters(train.plan, TARGETS) < count_parameters(derive.plan, TARGETS)


@pytest.mark.parametrize("masking", ["compact", "optimizer"])
def test_tied_pairs_then_masks(masking: str) -> None:
    """Every layer's v has an entry per row of the shared B, and is masked with it; u has none."""
    masks = {"name": "partial_lora", "masking": masking, "mask_scaling": True}
    chain, derive = start(["tied_lora", masks])
    before = state(derive)
    train, after = chain.next(derive, before, derivation(), TARGETS)
    shapes = tuner_of(train.plan).shapes(train.plan, TARGETS)
    assert {name: tuple(t.shape) for name, t in after.tensors.items()} == shapes
    assert {name: {tuple(m.shape) for m in own.values()} for name, own in after.moments.items()} == {
        name: {shape} for name, shape in shapes.items()
    }
    for name, adapter in train.plan.active.items():
        assert adapter.rows is not None
        kept = list(adapter.rows.indices)
        assert torch.equal(after.tensors[f"{name}.lora_v"], before.tensors[f"{name}.lora_v"][kept])
        for key, moment in after.moments[f"{name}.lora_v"].items():
            assert torch.equal(moment, before.moments[f"{name}.lora_v"][key][kept])


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        (["lora", BALANCED], "lora trains LoRA as it is"),
        ([BALANCED, "full"], "full has no adapters"),
        ([WEIGHT, PLUS], "of weight_lora and weight_lora_plus only one"),
        ([BALANCED, {"name": "sparse_adapter", "rule": "rows_columns"}], "of partial_lora and sparse_adapter only one"),
        ([BALANCED, "sparse_adapter"], "sparse_adapter with rule: entries masks single entries"),
        (["lora_drop", "tied_lora"], "of lora_drop and tied_lora only one"),
        (["lora_drop", WEIGHT], "an omega weighs one adapter"),
        ([BALANCED, "lora_drop"], "must come first"),
        ([WEIGHT, {"name": "partial_lora", "base": "adalora", "adalora": {"target_r": 1}}], "base: adalora"),
    ],
)
def test_what_cannot_be_composed_is_refused_with_the_reason(methods: list, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"method: .* cannot be composed") as error:
        config(methods)
    assert reason in str(error.value)


def test_a_list_of_one_and_a_bare_name_are_the_method() -> None:
    assert config("tied_lora") == config([{"name": "tied_lora"}]) == config({"name": "tied_lora"})
    assert config(["tied_lora", BALANCED]).method_name == "tied_lora + partial_lora"


def test_adalora_and_full_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_stage: 3, but adalora"):
        config({"name": "adalora", "target_r": 1}, deepspeed={"zero_stage": 3})
    with pytest.raises(ConfigError, match="full cannot train a base in nf4"):
        config("full", model={"name": "org/base", "quantization": "nf4"})
