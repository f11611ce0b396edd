"""The planner's bytes against what autograd really keeps on the CPU, and its formulas by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.memory import activation_bytes, grown_micro_batch, state_bytes
from sparse_llm_ft.model.head_loss import head_targets
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.loading import DTYPES, empty_model, enable_checkpointing
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, uniform_plan, with_omega

LAYERS, WIDTH = 4, 32
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=WIDTH,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
with torch.device("meta"):
    TARGETS = find_targets(LlamaForCausalLM(CONFIG), "all-linear")
TOP = AdapterPlan({name: ModuleAdapter(4, 8.0) if ".3." in name else None for name in TARGETS})
PLANS = {
    "all": uniform_plan(TARGETS, 4, 8.0),
    "omega": with_omega(uniform_plan(TARGETS, 4, 8.0)),
    "dropout": uniform_plan(TARGETS, 4, 8.0, lora_dropout=0.1),
    "top": TOP,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's configuration; there are no weights to load."""
    path = tmp_path_factory.mktemp("llama")
    CONFIG.save_pretrained(path)
    return str(path)


def really_saved(plan, length, dtype="float32", gradient_checkpointing=False, attn_implementation="sdpa"):
    """Bytes that autograd keeps in a forward pass on the CPU: distinct storages, those of parameters left out."""
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=attn_implementation).to(DTYPES[dtype])
    model.requires_grad_(False)
    make_lean(model)
    if gradient_checkpointing:
        enable_checkpointing(model)
    model = add_adapters(model, plan, autocast_adapter_dtype=False).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    tokens = torch.zeros((1, length), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), head_targets(tokens):
        loss = model(input_ids=tokens, use_cache=False).logits
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert loss.requires_grad
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("length", [8, 64])
@pytest.mark.parametrize("name", PLANS)
def test_saved_bytes_are_near_those_of_a_real_run_with_a_fused_kernel(folder, name, length):
    """Within 3 % of torch's flash kernel, whether the maps it avoids would be small or large."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        real = really_saved(PLANS[name], length)
    assert activation_bytes(ModelConfig(name=folder, dtype="float32"), PLANS[name], length) == pytest.approx(
        real, rel=0.03
    )


@pytest.mark.parametrize("name", PLANS)
def test_eager_attention_counts_with_its_maps(folder, name):
    """Within 3 % of a real run with transformers' eager attention, which is well above a fused one."""
    real = really_saved(PLANS[name], 64, attn_implementation="eager")
    config = ModelConfig(name=folder, dtype="float32", attn_implementation="eager")
    assert activation_bytes(config, PLANS[name], 64) == pytest.approx(real, rel=0.03)
    assert real > 1.2 * activation_bytes(ModelConfig(name=folder, dtype="float32"), PLANS[name], 64)


def test_adapters_on_the_top_layer_alone_save_a_fraction(folder):
    """Layers below the first adapter keep nothing: of 4 layers' bytes about a quarter is left, and the logits'."""
    config = ModelConfig(name=folder, dtype="float32")
    everywhere, top = activation_bytes(config, PLANS["all"], 32), activation_bytes(config, TOP, 32)
    bottom = AdapterPlan({name: ModuleAdapter(4, 8.0) if ".0." in name else None for name in TARGETS})
    assert top < 0.35 * everywhere
    assert top < activation_bytes(config, bottom, 32) <= everywhere


def test_saved_bytes_grow_with_the_length(folder):
    config = ModelConfig(name=folder, dtype="float32")
    assert 2 * activation_bytes(config, TOP, 16) < activation_bytes(config, TOP, 32) * 1.01


def test_checkpointing_keeps_the_inputs_of_the_layers_and_what_lies_outside(folder):
    length = 24
    config = ModelConfig(name=folder, dtype="float32", gradient_checkpointing=True)
    planned = activation_bytes(config, PLANS["all"], length)
    assert planned == really_saved(PLANS["all"], length, gradient_checkpointing=True)
    values = (LAYERS + 1) * WIDTH + WIDTH  # the layers' inputs and the last norm's; the loss's gradient
    assert planned == pytest.approx(4 * length * values, rel=0.02)
    assert planned < 0.25 * activation_bytes(ModelConfig(name=folder, dtype="float32"), PLANS["all"], length)


def test_planning_leaves_the_plan_alone_and_gives_the_same_twice(folder):
    config, before = ModelConfig(name=folder), TOP.to_dict()
    assert activation_bytes(config, TOP, 8) == activation_bytes(config, TOP, 8)
    assert TOP.to_dict() == before
    assert set(find_targets(empty_model(config), "all-linear")) == set(TARGETS)


@pytest.mark.parametrize(("stage", "world", "expected"), [(0, 1, 16), (0, 4, 16), (1, 4, 7), (2, 4, 7), (3, 2, 10)])
def test_state_bytes(stage, world, expected):
    """2 + 2 bytes of bfloat16 value and gradient on every rank; 12 of master and moments, shared from stage 1 on.

    One module of 6 × 4 with r = 2 has 2 * (6 + 4) = 20 values.
    """
    plan = AdapterPlan({"a": ModuleAdapter(2, 4.0), "b": None})
    assert state_bytes(plan, {"a": (6, 4), "b": (100, 100)}, stage, world) == 20 * expected


def test_state_bytes_of_what_is_trained_beside_adapters():
    """A whole embedding as adapters; of one with 3 trained rows all have a master, and 3 have moments and an index."""
    adapters = {"a": ModuleAdapter(2, 4.0)}
    shapes, parameters = {"a": (6, 4)}, {"embed.weight": (10, 4), "norm.weight": (4,), "embedding.weight": (9, 9)}
    whole = AdapterPlan(adapters, trained=("embed",))
    assert state_bytes(whole, shapes, 0, 1, parameters) == (20 + 40) * 16
    rows = AdapterPlan(adapters, trained=("embed", "norm"), rows={"embed": IndexMask(10, (1, 2, 9))})
    sharded = (20 + 4) * 12 + 40 * 4 + 12 * (8 + 4)
    assert state_bytes(rows, shapes, 2, 4, parameters) == sharded // 4 + (20 + 40 + 4) * 4
    everything = AdapterPlan({}, trained=("",))
    assert state_bytes(everything, shapes, 0, 1, parameters) == (40 + 4 + 81) * 16


def test_grown_micro_batch_by_hand():
    assert grown_micro_batch(4, before=100, after=40, freed_state=0) == 10
    assert grown_micro_batch(4, before=100, after=40, freed_state=39) == 10
    assert grown_micro_batch(4, before=100, after=40, freed_state=40) == 11
    assert grown_micro_batch(1, before=100, after=51, freed_state=0) == 1
    assert grown_micro_batch(3, before=10, after=0, freed_state=5) == 35


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("after", [0, 1, 50, 100, 1000])
@pytest.mark.parametrize("freed", [-10_000, -1, 0, 1, 500])
def test_a_micro_batch_never_shrinks_and_what_it_grows_to_fits(micro, after, freed):
    grown = grown_micro_batch(micro, 100, after, freed)
    assert grown >= micro
    assert grown == micro or grown * after <= micro * 100 + freed
