"""Partial-LoRA's rule: what is measured, which masks follow, and what becomes of trained values."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from helpers.method_settings import TARGETS, derivation, start, state
from sparse_llm_ft.adapters import count_parameters
from sparse_llm_ft.config.derivation import DerivationSettings
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset


def masked(method: dict, ratio: tuple[float, float] = (0.5, 0.25)) -> Phase:
    chain, phase = start({"name": "partial_lora"} | method)
    return chain.next(phase, state(phase), derivation(ratio), TARGETS)[0]


def test_a_causal_model_is_measured_before_any_step() -> None:
    _, phase = start({"name": "partial_lora", "importance": "snip", "accuracy_floor": 0.8})
    assert phase.name == "derive" and phase.steps == 0 and not phase.is_warmup
    assert phase.subset == Subset(None, None, 0)
    assert phase.scoring == ScoringSpec("derivation", DerivationSettings(importance="snip", accuracy_floor=0.8))


def test_a_fresh_head_is_fitted_alone_first_and_begins_anew_after() -> None:
    chain, phase = start({"name": "partial_lora", "sample_fraction": 0.05, "head_epochs": 7}, ("classifier",))
    assert phase.name == "head" and not phase.plan.active and phase.plan.trained == ("classifier",)
    assert phase.is_warmup and phase.epochs == 7 and phase.subset == Subset(0.05, None, 0, "half")
    assert phase.scored == Subset(0.05, None, 0, "other_half")
    after, begins = chain.next(phase, state(phase, head=True), derivation(), TARGETS)
    assert list(after.plan.active) == list(TARGETS) and after.plan.trained == ("classifier",)
    assert begins.tensors == {} and after.open_ended and not after.is_warmup


@pytest.mark.parametrize("selection", ["random", "targeted", "inverted", "stochastic"])
def test_masks_have_the_ratios_and_are_reproducible(selection: str) -> None:
    first, second = (masked({"selection": selection}) for _ in range(2))
    assert first.plan == second.plan
    for name, adapter in first.plan.active.items():
        rows, columns = adapter.shape(TARGETS[name])
        assert rows >= 1 and columns >= 1
        if selection != "random":
            assert (rows, columns) == (TARGETS[name][0] // 2, 2 if selection != "inverted" else 6)
    if selection == "targeted":  # in the derivation later indices matter more
        adapter = first.plan.active["layers.0.attn.q"]
        assert adapter.rows.indices == (4, 5, 6, 7) and adapter.cols.indices == (6, 7)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ratio_zero_keeps_one_and_ratio_one_is_plain_lora(ratio: float) -> None:
    phase = masked({}, (ratio, ratio))
    for name, adapter in phase.plan.active.items():
        assert adapter.shape(TARGETS[name]) == ((1, 1) if ratio == 0 else TARGETS[name])
    if ratio == 1:
        assert all(a.rows is None and a.cols is None for a in phase.plan.active.values())


def test_a_lower_bound_and_a_share_of_derived_ratios() -> None:
    bounded = masked({"min_ratio": 0.375, "selection": "targeted"}, (0.25, 0.5))
    for name, adapter in bounded.plan.active.items():
        rows, columns = TARGETS[name]
        assert adapter.shape(TARGETS[name]) == (int(0.375 * rows + 0.5), columns // 2)
    whole = sum(adapter.matrices(TARGETS[name]) for name, adapter in start("lora")[1].plan.active.items())
    shared = masked({"ratio": 0.5, "selection": "targeted"}, (0.25, 0.25))
    kept = sum(adapter.matrices(TARGETS[name]) for name, adapter in shared.plan.active.items())
    assert kept / whole == 0.5


def test_a_head_needs_samples_for_both_halves() -> None:
    with pytest.raises(ConfigError, match=r"method\.shots: 1, and a fresh head .* expected 2 or more"):
        start({"name": "partial_lora", "shots": 1}, ("classifier",))
    start({"name": "partial_lora", "shots": 1})


def test_scaled_masks_make_up_for_the_columns_that_A_lacks() -> None:
    """The scaling times sqrt(p_col) is LoRA's: with A drawn as for all columns, A x has LoRA's variance."""
    plain, scaled = (masked({"mask_scaling": scaling}).plan for scaling in (False, True))
    for name, adapter in plain.active.items():
        kept = adapter.shape(TARGETS[name])[1] / TARGETS[name][1]
        assert adapter.scaling == 3.0 and scaled.active[name].scaling * kept**0.5 == pytest.approx(3.0)
        assert replace(scaled.active[name], lora_alpha=adapter.lora_alpha) == adapter
    assert masked({"mask_scaling": True}, (0.5, 1.0)).plan.active["layers.0.attn.q"].scaling == 3.0


def test_a_scaled_mask_leaves_what_was_trained_as_it_was() -> None:
    """ΔW stays at the kept places, and so does Adam's next step of ΔW: B's gradient grows as its values shrink."""
    masks = {"name": "partial_lora", "selection": "targeted", "mask_scaling": True}
    method = [{"name": "weight_lora", "keep": 3, "steps": 5}, masks]
    chain, select = start(method)
    before = state(select)
    derive, survivors = chain.next(select, before, None, TARGETS)
    train, after = chain.next(derive, survivors, derivation(), TARGETS)
    for name, adapter in train.plan.active.items():
        rows, cols = torch.tensor(adapter.rows.indices), torch.tensor(adapter.cols.indices)
        old, growth = select.plan.active[name].scaling, adapter.scaling / select.plan.active[name].scaling
        assert growth > 1
        was = old * before.tensors[f"{name}.lora_B"] @ before.tensors[f"{name}.lora_A"]
        now = adapter.scaling * after.tensors[f"{name}.lora_B"] @ after.tensors[f"{name}.lora_A"]
        torch.testing.assert_close(now, was[rows][:, cols])
        for part, power, index in (("lora_A", 0, (slice(None), cols)), ("lora_B", 1, (rows,))):
            old_moments, moments = before.moments[f"{name}.{part}"], after.moments[f"{name}.{part}"]
            torch.testing.assert_close(moments["exp_avg"], old_moments["exp_avg"][index] * growth**power)
            torch.testing.assert_close(moments["exp_avg_sq"], old_moments["exp_avg_sq"][index] * growth ** (2 * power))


def test_given_ratios_need_no_measurement(tmp_path) -> None:
    _, balanced = start({"name": "partial_lora", "ratios": "balanced", "ratio": 0.5})
    assert balanced.scoring is None and balanced.open_ended and balanced.plan.active["layers.0.attn.q"].rows
    table = tmp_path / "ratios.json"
    table.write_text(json.dumps({"attn.q": [0.0, 1.0], "attn.k": 1.0, "mlp.up": 0.0}))
    _, listed = start({"name": "partial_lora", "ratios": str(table)})
    shapes = {name: adapter.shape(TARGETS[name]) for name, adapter in listed.plan.active.items()}
    assert shapes["layers.2.attn.q"] == (1, 8) and shapes["layers.2.attn.k"] == (4, 8)
    assert shapes["layers.2.mlp.up"] == (1, 1)


def test_targeted_masks_of_given_ratios_measure_importance_only() -> None:
    _, phase = start({"name": "partial_lora", "ratios": "balanced", "ratio": 0.5, "selection": "targeted"})
    assert phase.scoring is not None and not phase.scoring.search


def test_sparse_adapters_rows_and_columns_are_targeted_snip_at_its_sparsity() -> None:
    chain, phase = start({"name": "sparse_adapter", "rule": "rows_columns", "sparsity": 0.75})
    assert (phase.scoring.derivation.importance, phase.scoring.search) == ("snip", False)
    after, _ = chain.next(phase, state(phase), derivation((1.0, 1.0)), TARGETS)
    assert after.plan.active["layers.0.attn.q"].cols.indices == (6, 7)
    assert after.plan.active["layers.0.attn.k"].rows.indices == (3,)


def test_what_was_trained_is_cut_to_the_mask() -> None:
    """After WeightLoRA the survivors' values and moments go on, at the kept indices."""
    method = [{"name": "weight_lora", "keep": 3, "steps": 5}, {"name": "partial_lora", "selection": "targeted"}]
    chain, select = start(method, ("classifier",))
    assert select.name == "select"
    before = state(select, head=True)
    for i, name in enumerate(TARGETS):
        before.tensors[f"{name}.lora_omega"].fill_(float(i < 3))
    derive, survivors = chain.next(select, before, None, TARGETS)
    assert derive.name == "derive" and derive.method == 1 and derive.steps == 0 and len(derive.plan.active) == 3
    train, after = chain.next(derive, survivors, derivation(), TARGETS)
    assert train.open_ended and train.plan.trained == ("classifier",)
    for name, adapter in train.plan.active.items():
        rows, columns = list(adapter.rows.indices), list(adapter.cols.indices)
        assert torch.equal(after.tensors[f"{name}.lora_A"], before.tensors[f"{name}.lora_A"][:, columns])
        assert torch.equal(after.tensors[f"{name}.lora_B"], before.tensors[f"{name}.lora_B"][rows])
        moments = after.moments[f"{name}.lora_B"]["exp_avg"]
        assert torch.equal(moments, before.moments[f"{name}.lora_B"]["exp_avg"][rows])
    assert torch.equal(after.tensors["classifier.weight"], before.tensors["classifier.weight"])


def test_a_shared_pair_has_one_mask() -> None:
    chain, phase = start(["tied_lora", {"name": "partial_lora", "selection": "targeted"}])
    assert phase.name == "derive" and len(phase.plan.groups) == 3
    after, _ = chain.next(phase, state(phase), derivation(), TARGETS)
    for members in after.plan.groups.values():
        assert len({(after.plan.active[n].rows, after.plan.active[n].cols) for n in members}) == 1
    vectors = 4 * ((2 + 4) + (2 + 2) + (2 + 6))  # of every layer: u, and v at the kept rows
    assert count_parameters(after.plan, TARGETS) == 2 * (4 + 2) + 2 * (2 + 2) + 2 * (6 + 2) + vectors


def test_sharing_survives_the_fitting_of_a_head() -> None:
    """On an encoder LoRA-drop hands on a plan with nothing trained, and a head phase comes between."""
    chain, pilot = start([{"name": "lora_drop", "threshold": 0.5, "share": False}, "partial_lora"], ("classifier",))
    head, fresh = chain.next(pilot, state(pilot, head=True), {n: float(i) for i, n in enumerate(TARGETS)}, TARGETS)
    assert head.name == "head" and not head.plan.active and fresh.tensors == {}
    again = Phase.from_dict(json.loads(json.dumps(head.to_dict())))
    after, _ = chain.next(again, state(again, head=True), derivation(), TARGETS)
    assert 0 < len(after.plan.active) < len(TARGETS) and after.plan.trained == ("classifier",)
    assert after.target_plan is None and any(a.cols for a in after.plan.active.values())


def test_partial_adalora_masks_adalora() -> None:
    method = {"name": "partial_lora", "base": "adalora", "adalora": {"target_r": 1, "tinit": 2}}
    chain, phase = start(method)
    assert phase.plan.tuner == "sparse_lora"  # measured on the base; AdaLoRA begins after
    after, begins = chain.next(phase, state(phase), derivation(), TARGETS)
    assert after.plan.tuner == "adalora" and begins.tensors == {}
    assert after.plan.options["tinit"] == 2 and after.plan.options["total_step"] == 20
    assert after.plan.active["layers.0.attn.q"].rows is not None


GIVEN = {"ratios": "balanced", "ratio": 0.5}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"shots": 4, "sample_fraction": 0.1}, "method.shots: given together with method.sample_fraction"),
        ({"ratios": "balanced"}, "method.ratio: not given, and ratios is balanced"),
        ({"ratios": __file__, "ratio": 0.5}, "method.ratio: has no effect on ratios from a file"),
        ({"ratios": "balanced", "ratio": 0.5, "min_ratio": 0.1}, "method.min_ratio: has no effect under ratios"),
        ({"temperature": 2.0}, "method.temperature: 2.0 has no effect under selection random"),
        (
            GIVEN | {"compare_importance": True, "selection": "targeted"},
            "method.compare_importance: True has no effect",
        ),
        (GIVEN | {"importance": "imp"}, "method.importance: 'imp' has no effect under ratios 'balanced' and selection"),
        (GIVEN | {"flow_preservation": True}, "method.flow_preservation: True has no effect"),
        ({"min_ratio": 1.5}, "method.min_ratio: 1.5 is not allowed"),
        ({"derivation": "all"}, "method.derivation: 'all' is not allowed"),
        ({"base": "adalora", "mask_scaling": True}, "method.mask_scaling: true, and AdaLoRA has one scaling"),
        ({"ratios": "nowhere.json"}, "method.ratios: 'nowhere.json' is not a file"),
        ({"adalora": {"target_r": 1}}, "method.adalora: has no effect under base lora"),
        ({"base": "adalora", "adalora": {"target_r": 2}}, "method.target_r: 2 leaves nothing to prune"),
        ({"base": "dora", "masking": "compact"}, "method.masking: compact, and PEFT's dora has full layers"),
        ({"accuracy_floor": 0.0}, "method.accuracy_floor: 0.0 is not allowed"),
        ({"ratios": "balanced", "ratio": 1.5}, "method.ratio: 1.5 is not allowed"),
        ({"selection": "best"}, "method.selection: 'best' is not allowed"),
    ],
)
def test_settings_that_exclude_each_other_are_named(method: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        start({"name": "partial_lora"} | method)
    assert str(error.value).startswith(message)


def test_a_phase_with_a_measurement_survives_json() -> None:
    _, phase = start({"name": "partial_lora"}, ("classifier",))
    phase = replace(phase, steps=3).with_batch(2, 16, 0.5)
    assert Phase.from_dict(json.loads(json.dumps(phase.to_dict()))) == phase
