"""The methods of configs/ on the four families at their published sizes: adapters, and bytes kept for backward.

Nothing has weights: the architectures are traced on the meta device. Every layer keeps the same, and each takes its
time: what compares two plans does so on the lowest layers alone, and on all of them under `make test-long`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.families import FAMILIES, files, parsed, settings
from sparse_llm_ft.adapters import count_parameters, find_targets
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.memory import state_bytes, step_bytes
from sparse_llm_ft.engine.settings import check_deepspeed
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.model.loading import empty_model
from sparse_llm_ft.plan import AdapterPlan, Shape, uniform_plan

LENGTH, STEPS = 512, 1000
METHODS = list(files("methods"))
CHECKPOINTED = (("llama-3-8b", "lora"), ("qwen2.5-7b", "lora_drop"))
"""Those of `make test`: a checkpointed step of all layers takes longest."""


def fewer_kept(method: Any, keep: int) -> Any:
    """A method section that keeps `keep` adapters where it keeps the files' 100, which few layers do not have."""
    if isinstance(method, list):
        return [fewer_kept(part, keep) for part in method]
    return method | {"keep": keep} if "keep" in method else method


@dataclass
class Planned:
    """Models without weights, of so many layers or of all (None), and what has been planned on them."""

    folder: Path
    depth: int | None
    bytes_of: dict[tuple[str, str, bool], int]

    def layers(self, name: str) -> int:
        return self.depth or FAMILIES[name][1]["num_hidden_layers"]

    def model(self, name: str, gradient_checkpointing: bool = False) -> ModelConfig:
        if not (self.folder / name).is_dir():
            settings(name, num_hidden_layers=self.layers(name)).save_pretrained(self.folder / name)
        return ModelConfig(name=str(self.folder / name), gradient_checkpointing=gradient_checkpointing)

    def first(
        self, name: str, method: str, task: str = "glue/cola", targets: list[str] | None = None
    ) -> tuple[AdapterPlan, dict[str, Shape]]:
        """The plan that a run's first phase trains, and every target module's shape."""
        place: dict[str, Any] = {"adapter": {"target_modules": targets}} if targets else {}
        if self.depth:
            place["method"] = fewer_kept(files("methods")[method]["method"], self.depth)
        model = {"model": {"name": self.model(name).name}}
        config = parsed(model, files("tasks")[task], files("methods")[method], place)
        adapter = config.adapter
        found = find_targets(empty_model(config.model), adapter.target_modules)
        plan = uniform_plan(found, adapter.r, adapter.lora_alpha, lora_dropout=adapter.lora_dropout)
        return build_methods(config, STEPS).first(plan, found).plan, found

    def kept(self, name: str, plan: AdapterPlan, gradient_checkpointing: bool = False) -> int:
        """`step_bytes`'s, each plan traced once: many methods begin with the same."""
        key = name, json.dumps(plan.to_dict()), gradient_checkpointing
        if key not in self.bytes_of:
            self.bytes_of[key] = step_bytes(self.model(name, gradient_checkpointing), plan, LENGTH).kept
        return self.bytes_of[key]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return Planned(tmp_path_factory.mktemp("families"), None, {})


@pytest.fixture(
    scope="module", params=[pytest.param(8, id="low"), pytest.param(None, id="whole", marks=pytest.mark.long)]
)
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return Planned(tmp_path_factory.mktemp("planned"), request.param, {})


@pytest.mark.parametrize(
    ("name", "linear_layers", "values"),
    [
        ("llama-2-7b", 224, 6.74e9),
        ("llama-3-8b", 224, 8.03e9),
        ("mistral-7b", 224, 7.25e9),
        ("qwen2.5-7b", 196, 7.62e9),
    ],
)
def test_the_families_have_their_published_sizes(
    name: str, linear_layers: int, values: float, published: Planned
) -> None:
    empty = empty_model(published.model(name))
    assert sum(parameter.numel() for parameter in empty.parameters()) == pytest.approx(values, rel=1e-3)
    targets = find_targets(empty, "all-linear")
    assert len(targets) == linear_layers and not any("lm_head" in target for target in targets)
    assert empty.get_input_embeddings().weight is not empty.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("method", "task", "values"),
    [
        ("lora_drop", "glue/rte", 4.2e6),  # LoRA-drop, Table 4, LoRA
        ("lora_drop", "dialogsum", 8.4e6),  # LoRA-drop, Table 2, LoRA
        ("lora_drop", "e2e_nlg", 4.2e6),  # LoRA-drop, Table 5, LoRA
        ("partial_lora", "glue/sst2", 4.2e6),  # Partial-LoRA, Table 1, LoRA
    ],
)
def test_llama_2_has_as_many_values_in_lora_as_the_papers(
    method: str, task: str, values: float, published: Planned
) -> None:
    """Before anything is masked or shared: which modules, and what rank."""
    plan, targets = published.first("llama-2-7b", method, task, ["q_proj", "v_proj"])
    assert count_parameters(plan, targets) == pytest.approx(values, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_lora_can_keep_its_adapters_in_every_family(name: str, published: Planned) -> None:
    plan, _ = published.first(name, "weight_lora")
    keep = files("methods")["weight_lora"]["method"]["keep"]
    assert keep < len(plan.active) and all(adapter.train_omega for adapter in plan.active.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_grouped_queries_make_a_second_shape_of_shared_adapters(name: str, published: Planned) -> None:
    """One pair for q_proj and one for v_proj, whose outputs are as many as there are key heads."""
    plan, targets = published.first(name, "tied_lora")
    sizes = FAMILIES[name][1]
    width = sizes["hidden_size"]
    narrow = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    assert len(plan.groups) == 2
    assert {targets[module] for module in plan.active} == {(width, width), (narrow, width)}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if name == "llama-3-8b" or method == "lora" else pytest.mark.long)
        for name in FAMILIES
        for method in METHODS
    ],
)
def test_every_first_plan_keeps_what_its_tuner_does(method: str, name: str, planned: Planned) -> None:
    """As much as LoRA on the same modules where the layers are this package's, but for Tied-LoRA's vectors. PEFT's keep
    up to four times as much, and its DoRA whole matrices.
    """
    plan, _ = planned.first(name, method)
    everywhere = method == "full" or files("methods")[method]["adapter"]["target_modules"] == "all-linear"
    plain, _ = planned.first(name, "lora" if everywhere else "lora_drop")
    ratio = planned.kept(name, plan) / planned.kept(name, plain)
    if plan.tuner == "sparse_lora" and method != "full":
        assert ratio == pytest.approx(1, rel=0.05)
    else:
        assert ratio > 4 if method == "dora" else 1 < ratio < 4


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if (name, method) in CHECKPOINTED else pytest.mark.long)
        for name in FAMILIES
        for method in ("lora", "lora_drop")
    ],
)
def test_checkpointing_keeps_a_fraction_of_what_lies_within_the_layers(
    method: str, name: str, published: Planned
) -> None:
    plan, _ = published.first(name, method)
    kept, checkpointed = published.kept(name, plan), published.kept(name, plan, gradient_checkpointing=True)
    assert 0 < checkpointed < 0.1 * kept


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_keeps_what_attention_and_element_wise_parts_need(name: str, published: Planned) -> None:
    """Per token: two residuals, queries, keys, values, attention's output, gate and up of every layer; the last norm's
    input, and the loss's gradient. Log-sum-exps and norms are less than 1 %. Nothing is kept for the adapters.
    """
    plan, _ = published.first(name, "lora")
    sizes = FAMILIES[name][1]
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    keys = d // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    values = sizes["num_hidden_layers"] * (4 * d + 2 * keys + 2 * f) + 2 * d
    assert published.kept(name, plan) == pytest.approx(2 * LENGTH * values, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_adapters_keep_less(name: str, planned: Planned) -> None:
    """The upper half of the layers about half; q_proj and v_proj as much as all, and so do weighed adapters."""
    everywhere, targets = planned.first(name, "lora")
    some, fewer = planned.first(name, "lora_drop")
    weighed, _ = planned.first(name, "weight_lora")
    layers = planned.layers(name)
    upper = replace(
        everywhere,
        modules={
            m: a if int(m.split(".layers.")[1].split(".")[0]) >= layers // 2 else None
            for m, a in everywhere.modules.items()
        },
    )
    kept = planned.kept(name, everywhere)
    assert planned.kept(name, upper) < 0.55 * kept
    assert kept * 0.99 < planned.kept(name, some) <= kept <= planned.kept(name, weighed) < 1.01 * kept
    assert state_bytes(some, fewer, 2, 8) < 0.5 * state_bytes(everywhere, targets, 2, 8)
    assert state_bytes(upper, targets, 2, 8) == state_bytes(everywhere, targets, 2, 8) // 2


def test_deepspeed_knows_every_setting() -> None:
    for tree in files("deepspeed").values():
        config = parsed({"model": {"name": "org/base"}, "task": {"name": "custom"}, "method": "lora"}, tree)
        check_deepspeed(config.deepspeed.extra, config.deepspeed.zero_stage, config.model.dtype)
