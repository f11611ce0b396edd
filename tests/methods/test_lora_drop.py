"""LoRA-drop's rule: who keeps an adapter, who shares, and that all begins anew."""

from __future__ import annotations

import pytest

from helpers.method_settings import TARGETS, start, state
from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.phase import Subset

# Shares of q: .1 .2 .3 .4; of k: all equal; of up: all in layer 2.
SCORES = {
    f"layers.{layer}.{kind}": value
    for layer in range(4)
    for kind, value in (("attn.q", float(layer + 1)), ("attn.k", 5.0), ("mlp.up", 7.0 * (layer == 2)))
}


def own(method: dict) -> tuple[set[str], dict[str, list[str]], object]:
    chain, pilot = start({"name": "lora_drop"} | method)
    phase, after = chain.next(pilot, state(pilot), SCORES, TARGETS)
    return {n for n, a in phase.plan.active.items() if a.group is None}, phase.plan.groups, (phase, after)


def test_the_pilot_trains_all_adapters_on_a_sample_and_does_not_count() -> None:
    _, pilot = start({"name": "lora_drop", "sample_fraction": 0.2, "pilot_epochs": 2})
    assert list(pilot.plan.active) == list(TARGETS) and pilot.is_warmup
    assert pilot.epochs == 2 and pilot.subset == Subset(0.2, None, 0) and pilot.scoring.kind == "lora_output"


def test_per_type_the_most_important_layers_keep_their_own_until_their_shares_sum_to_t() -> None:
    """T = 0.7: of q the shares .4 + .3; of k, all equal, three of four; of up the one layer that has any."""
    kept, groups, _ = own({"threshold": 0.7})
    assert kept == {
        "layers.3.attn.q",
        "layers.2.attn.q",
        "layers.0.attn.k",
        "layers.1.attn.k",
        "layers.2.attn.k",
        "layers.2.mlp.up",
    }
    assert groups == {
        "attn-q-8x8": ["layers.0.attn.q", "layers.1.attn.q"],
        "attn-k-4x8": ["layers.3.attn.k"],
        "mlp-up-12x8": ["layers.0.mlp.up", "layers.1.mlp.up", "layers.3.mlp.up"],
    }


def test_all_begins_anew() -> None:
    _, _, (phase, after) = own({})
    assert after.tensors == {} and after.moments == {} and after.optimizer_steps == {}
    assert phase.open_ended and phase.subset is None and not phase.is_warmup and phase.scoring is None


def test_without_sharing_the_others_are_removed() -> None:
    kept, groups, (phase, _) = own({"threshold": 0.7, "share": False})
    assert groups == {} and set(phase.plan.active) == kept and len(kept) == 6


def test_the_top_layers_are_as_many() -> None:
    kept, _, _ = own({"threshold": 0.7, "choose": "top"})
    assert {name for name in kept if name.endswith("attn.q")} == {"layers.2.attn.q", "layers.3.attn.q"}
    assert len(kept) == 6


def test_inverted_shares_the_important_layers_and_the_others_keep_their_own() -> None:
    """Section 4.4: "replace high-importance layers of LoRA with shared LoRA and retain the other LoRA"."""
    important, _, _ = own({"threshold": 0.7})
    kept, groups, _ = own({"threshold": 0.7, "choose": "inverted"})
    assert kept == set(TARGETS) - important and len(kept) == 6
    assert set().union(*groups.values()) == important


def test_inverted_with_five_shares_of_which_two_are_important() -> None:
    y = {f"layers.{i}.q": share for i, share in enumerate((0.5, 0.45, 0.03, 0.01, 0.01))}
    chain, _ = start({"name": "lora_drop", "threshold": 0.9, "choose": "inverted"})
    assert chain.methods[0].choose(y) == {"layers.2.q", "layers.3.q", "layers.4.q"}


def test_inverted_without_sharing_needs_a_layer_that_is_not_important() -> None:
    chain, pilot = start({"name": "lora_drop", "threshold": 1.0, "choose": "inverted", "share": False})
    with pytest.raises(TrainingError, match=r"every layer is among the important ones at method\.threshold 1"):
        chain.next(pilot, state(pilot), dict.fromkeys(TARGETS, 1.0), TARGETS)


def test_a_random_choice_is_as_large_and_reproducible() -> None:
    first, second = (own({"threshold": 0.7, "choose": "random"})[0] for _ in range(2))
    assert first == second and len(first) == 6


def test_a_threshold_of_one_keeps_every_layer_with_a_share() -> None:
    kept, groups, _ = own({"threshold": 1.0})
    assert len([n for n in kept if "attn" in n]) == 8 and "layers.2.mlp.up" in kept and len(kept) == 9
    assert list(groups) == ["mlp-up-12x8"]


def test_a_type_without_output_keeps_by_equal_shares() -> None:
    chain, pilot = start({"name": "lora_drop", "threshold": 0.5})
    scores = {name: 0.0 if name.endswith("attn.k") else value for name, value in SCORES.items()}
    phase, _ = chain.next(pilot, state(pilot), scores, TARGETS)
    assert sum(a.group is None for name, a in phase.plan.active.items() if name.endswith("attn.k")) == 2  # of four


def test_no_output_at_all_is_refused() -> None:
    """A pilot whose updates were all skipped leaves every B at 0, and layers would be chosen by position."""
    chain, pilot = start({"name": "lora_drop", "threshold": 0.5})
    with pytest.raises(TrainingError, match=r"every adapter's output is 0 after the pilot"):
        chain.next(pilot, state(pilot), dict.fromkeys(TARGETS, 0.0), TARGETS)
