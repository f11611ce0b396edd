"""A step's arithmetic against what torch counts of a real step, and against a published formula for a Llama."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.model.flops import model_flops
from sparse_llm_ft.model.step_cost import StepCost, step_cost, step_flops
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, uniform_plan

LENGTH, LAYERS, WIDTH, RANK = 12, 4, 32, 2
SIZES = {"vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
BERT = BertConfig(**SIZES, num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)


def encoder() -> tuple[PreTrainedModel, StepCost, dict]:
    model = BertForSequenceClassification._from_config(BERT, attn_implementation="eager").requires_grad_(False)
    targets = {name: shape for name, shape in find_targets(model, "all-linear").items() if "pooler" not in name}
    return model, step_cost(model, targets, LENGTH, LENGTH), targets


def counted(model: PreTrainedModel, plan: AdapterPlan) -> int:
    """What torch counts of a forward and a backward pass with PEFT's own LoRA layers, which keep A x."""
    from peft import LoraConfig, get_peft_model

    names = "|".join(name.replace(".", r"\.") for name in plan.active)
    peft_model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=4, target_modules=f"({names})"))
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        peft_model(input_ids=tokens).logits.sum().backward()
    return counter.get_total_flops()


def test_a_layer_lower_costs_its_backward_pass() -> None:
    """Adapters of one shape in the same place of their layers: the difference is a layer's backward pass."""
    place = "bert.encoder.layer.{}.output.dense"
    steps, costs = [], []
    for layer in range(LAYERS):
        model, cost, targets = encoder()
        plan = AdapterPlan({place.format(layer): ModuleAdapter(RANK, 4.0)})
        steps.append(counted(model, plan))
        costs.append(cost.of(plan, targets))
    differences = [a - b for a, b in itertools.pairwise(steps)]
    assert differences == [cost.backward[0]] * (LAYERS - 1)
    assert differences == [a - b for a, b in itertools.pairwise(costs)]


def test_a_step_with_all_adapters_is_what_torch_counts() -> None:
    """But for the gradient that nothing asks for, of the lowest layer's input, and for pooler and classifier."""
    model, cost, targets = encoder()
    plan = uniform_plan(targets, RANK, 4.0)
    unasked = 3 * 2 * LENGTH * (WIDTH * WIDTH + RANK * WIDTH)  # query, key, value
    behind = 2 * 2 * (WIDTH * WIDTH + 2 * WIDTH)
    assert counted(model, plan) == cost.of(plan, targets) - unasked + behind


def test_a_llama_costs_what_the_formula_of_its_sizes_says() -> None:
    """2 per weight and token in each direction; attention is causal. MFU's arithmetic gives the same."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    cost, sizes = step_cost(model, find_targets(model, ["q_proj"]), LENGTH, LENGTH), model_flops(model)
    assert sizes is not None
    weights = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * 48
    forward, backward = 2 * weights + 2 * LENGTH * WIDTH, 2 * weights + 4 * LENGTH * WIDTH
    for lowest in range(LAYERS + 1):
        expected = LENGTH * (LAYERS * forward + (LAYERS - lowest) * backward + 2 * 2 * WIDTH * 50)
        assert cost.step(lowest, 0.0) == expected == sizes.step(LENGTH, LENGTH**2, LENGTH, lowest)
    assert cost.layers == tuple(f"model.layers.{i}" for i in range(LAYERS))
    assert cost.depths["model.embed_tokens"] == 0 and cost.depths["lm_head"] == LAYERS


def test_what_is_trained_beside_adapters_counts_where_it_is() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    targets = find_targets(model, "all-linear")
    cost = step_cost(model, targets, LENGTH, LENGTH)
    top = {name: ModuleAdapter(RANK, 4.0) if ".3." in name else None for name in targets}
    plain, head, rows = (AdapterPlan(top, trained=names) for names in ((), ("lm_head",), ("model.embed_tokens",)))
    assert cost.of(plain, targets) == cost.of(head, targets)
    assert cost.of(rows, targets) - cost.of(plain, targets) == 3 * cost.backward[0]
    assert cost.layer(3) == "model.layers.3" and cost.layer(4) == "the head"


def test_an_encoder_lies_below_its_decoder() -> None:
    stacks = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=WIDTH, **stacks, **heads))
    cost = step_cost(model, find_targets(model, "all-linear"), 8, 20)
    assert [layer.split(".")[1] for layer in cost.layers] == ["encoder", "encoder", "decoder", "decoder"]
    assert cost.tokens == (20, 20, 8, 8)
    own, mlp = 4 * WIDTH * WIDTH, 2 * WIDTH * 48
    assert cost.forward[0] == 20 * (2 * (own + mlp) + 4 * WIDTH * 20)
    assert cost.forward[3] == 8 * (2 * (2 * own + mlp) + 2 * WIDTH * 8 + 4 * WIDTH * 20)
    assert cost.head == 2 * 50 * WIDTH * 8


def test_of_experts_only_those_that_work_count() -> None:
    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    cost = step_cost(model, ["model.layers.0.self_attn.q_proj"], LENGTH, LENGTH)
    weights = 4 * WIDTH * WIDTH + 4 * WIDTH + 2 * 3 * WIDTH * 48
    assert cost.forward[0] == LENGTH * (2 * weights + 2 * LENGTH * WIDTH)


def test_modules_without_numbers_have_no_layers() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    cost = step_cost(model, [], LENGTH, LENGTH)
    assert cost.layers == () and cost.lowest(["lm_head"]) == 0


@pytest.mark.parametrize(("lowest", "expected"), [(0, 1 + 2 + 3 + 4 + 10 + 7), (1, 1 + 2 + 4 + 10 + 7), (2, 20)])
def test_a_step_by_hand(lowest: int, expected: float) -> None:
    assert step_flops([1, 2], [3, 4], 5, lowest, 7) == expected
