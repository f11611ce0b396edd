"""The planner's bytes against what autograd and the allocator really hold on the CPU, and its formulas by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.memory import grown_micro_batch, state_bytes, step_bytes
from sparse_llm_ft.model.head_loss import head_targets
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.loading import DTYPES, empty_model, enable_checkpointing
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, uniform_plan, with_omega

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from watching import FORWARD, Meter, step_memory

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
    assert step_bytes(ModelConfig(name=folder, dtype="float32"), PLANS[name], length).kept == pytest.approx(
        real, rel=0.03
    )


@pytest.mark.parametrize("name", PLANS)
def test_eager_attention_counts_with_its_maps(folder, name):
    """Within 3 % of a real run with transformers' eager attention, which is well above a fused one."""
    real = really_saved(PLANS[name], 64, attn_implementation="eager")
    config = ModelConfig(name=folder, dtype="float32", attn_implementation="eager")
    assert step_bytes(config, PLANS[name], 64).kept == pytest.approx(real, rel=0.03)
    assert real > 1.2 * step_bytes(ModelConfig(name=folder, dtype="float32"), PLANS[name], 64).kept


def test_adapters_on_the_top_layer_alone_save_a_fraction(folder):
    """Layers below the first adapter keep nothing: of 4 layers' bytes about a quarter is left, and the logits'."""
    config = ModelConfig(name=folder, dtype="float32")
    everywhere, top = step_bytes(config, PLANS["all"], 32).kept, step_bytes(config, TOP, 32).kept
    bottom = AdapterPlan({name: ModuleAdapter(4, 8.0) if ".0." in name else None for name in TARGETS})
    assert top < 0.35 * everywhere
    assert top < step_bytes(config, bottom, 32).kept <= everywhere


def test_saved_bytes_grow_with_the_length(folder):
    config = ModelConfig(name=folder, dtype="float32")
    assert 2 * step_bytes(config, TOP, 16).kept < step_bytes(config, TOP, 32).kept * 1.01


def test_checkpointing_keeps_the_inputs_of_the_layers_and_what_lies_outside(folder):
    length = 24
    config = ModelConfig(name=folder, dtype="float32", gradient_checkpointing=True)
    planned = step_bytes(config, PLANS["all"], length).kept
    # What checkpoints hold beside saved tensors: the positions, and their cosines and sines; and the loss itself.
    rotary = length * 8 + 2 * length * (WIDTH // 4) * 4 + 4
    assert planned == really_saved(PLANS["all"], length, gradient_checkpointing=True) + rotary
    values = (LAYERS + 1) * WIDTH + WIDTH  # the layers' inputs and the last norm's; the loss's gradient
    assert planned - rotary == pytest.approx(4 * length * values, rel=0.02)
    assert planned < 0.25 * step_bytes(ModelConfig(name=folder, dtype="float32"), PLANS["all"], length).kept


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("vocabulary", [64, 2048], ids=["small head", "large head"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_peak_is_that_of_a_real_step(tmp_path, samples, vocabulary, gradient_checkpointing):
    """What torch's allocator holds between the passes and at the most, to the byte but for what follows."""
    sizes = LlamaConfig(**{**CONFIG.to_dict(), "vocab_size": vocabulary})
    sizes.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="float32", gradient_checkpointing=gradient_checkpointing)
    for plan in PLANS.values():
        model = AutoModelForCausalLM.from_config(sizes).requires_grad_(False)
        make_lean(model)
        if gradient_checkpointing:
            enable_checkpointing(model)
        model = add_adapters(model, plan, autocast_adapter_dtype=False).train()
        tokens, meter = torch.zeros((samples, 64), dtype=torch.long), Meter()

        def step(model=model, tokens=tokens, meter=meter):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                with meter.part(FORWARD), head_targets(tokens):
                    loss = model(input_ids=tokens, use_cache=False).logits
                loss.backward()

        step()  # the gradients exist from then on
        real, planned = step_memory(step), step_bytes(config, plan, 64, samples=samples)
        # Checkpoints of the layers with a graph keep the state of the CPU's generator, which no GPU holds.
        layers = len({name.split(".")[2] for name in plan.active})
        state = layers * torch.get_rng_state().nbytes if gradient_checkpointing else 0
        assert planned.kept == real.after_forward - state
        # Dropout's masks are drawn in a larger type within an operation.
        assert planned.peak == pytest.approx(real.peak - state, rel=0.06 if plan.lora_dropout else 1e-9)


def test_checkpointing_keeps_nothing_below_the_lowest_adapter(folder):
    config = ModelConfig(name=folder, dtype="float32", gradient_checkpointing=True)
    everywhere, top = (step_bytes(config, PLANS[name], 32).kept for name in ("all", "top"))
    assert everywhere - top == 3 * 32 * WIDTH * 4  # the inputs of three layers


def test_planning_leaves_the_plan_alone_and_gives_the_same_twice(folder):
    config, before = ModelConfig(name=folder), TOP.to_dict()
    assert step_bytes(config, TOP, 8).kept == step_bytes(config, TOP, 8).kept
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


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("most", [1, 3, 4, 7, 64, 1000])
@pytest.mark.parametrize("room", [0, 99, 130, 500, 10**6])
def test_the_grown_micro_batch_is_the_largest_that_fits(micro, most, room):
    """A peak that grows by 30 per sample above 40, and from the tenth sample on by 7."""
    asked = []

    def peak(samples):
        asked.append(samples)
        return 40 + 30 * min(samples, 10) + 7 * max(samples - 10, 0)

    grown = grown_micro_batch(micro, most, room, peak)
    assert grown == max([micro, *(size for size in range(micro, most + 1) if peak(size) <= room)])
    asked.clear()
    grown_micro_batch(micro, most, room, peak)
    assert len(asked) <= 2 * max(most // micro, 1).bit_length()
