"""Masking a layer's input or output is zeroing columns or rows of its weight; passed blocks are not computed again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from helpers.scored_models import RowObjective, bart, bert, deberta, linears, llama, rows_for
from sparse_llm_ft.objectives.base import evaluating
from sparse_llm_ft.scoring.ablation import AblationEvaluator, zeroed
from sparse_llm_ft.scoring.blocks import PrefixCache, find_blocks, group_by_block, layer_of

MODELS = {"llama": llama, "bert": bert, "deberta": deberta, "bart": bart}


def with_zero_weights(linear: nn.Linear, side: str, keep: torch.Tensor) -> nn.Linear:
    changed = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    changed.load_state_dict(linear.state_dict())
    with torch.no_grad():
        if side == "rows":
            changed.weight[~keep] = 0
        else:
            changed.weight[:, ~keep] = 0
    return changed


@pytest.mark.parametrize("side", ["rows", "cols"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (4, 1)])
def test_masking_equals_zeroing_the_weight(side: str, bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    size = shape[0] if side == "rows" else shape[1]
    for x in (torch.randn(3, shape[1]), torch.randn(3, 5, shape[1])):
        for kept in range(size + 1):
            keep = torch.randperm(size) < kept
            with zeroed(linear, side, keep, linear.bias), torch.no_grad():
                found = linear(x)
            torch.testing.assert_close(found, with_zero_weights(linear, side, keep)(x).detach())
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))  # and nothing is left behind


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_masking_a_four_bit_layer_equals_zeroing_what_its_codes_stand_for(side: str) -> None:
    from bitsandbytes.nn import Linear4bit

    from sparse_llm_ft.scoring.importance import dense_weight

    torch.manual_seed(0)
    layer = Linear4bit(64, 8, quant_type="nf4", compute_dtype=torch.float32)
    layer.support_avx512bf16_for_cpu = False
    layer = layer.to("cpu").requires_grad_(False)
    dense = nn.Linear(64, 8)
    dense.load_state_dict({"weight": dense_weight(layer), "bias": layer.bias})
    keep = torch.rand(8 if side == "rows" else 64) < 0.5
    x = torch.randn(3, 64)
    with zeroed(layer, side, keep, layer.bias):
        found = layer(x)
    torch.testing.assert_close(found, with_zero_weights(dense, side, keep)(x), rtol=1e-4, atol=1e-4)


def test_names_tell_the_layer() -> None:
    layer = layer_of("model.layers.3.mlp.experts.5.up_proj")
    assert layer is not None
    assert layer == ("model.layers", 3, "mlp.experts.5.up_proj") and layer.block == "model.layers.3"
    assert layer_of("encoder.layer.0.attention.self.query").block == "encoder.layer.0"
    assert layer_of("2").block == "2" and layer_of("pooler.dense") is None
    groups, rest = group_by_block(["a.10.x", "a.9.x", "pooler", "a.10.y"])
    assert groups == {"a.10": ["a.10.x", "a.10.y"], "a.9": ["a.9.x"]} and rest == ["pooler"]


def test_blocks_are_found_in_order_and_under_a_wrapper() -> None:
    model = llama(11)
    blocks = find_blocks(model, ["model.layers.3.self_attn.q_proj"])
    assert list(blocks) == [f"model.layers.{i}" for i in range(11)]
    assert list(blocks.values()) == list(model.model.layers)
    wrapper = nn.Module()
    wrapper.base_model = nn.Module()
    wrapper.base_model.inner = model
    assert find_blocks(wrapper, ["model.layers.3.self_attn.q_proj"]) == blocks
    with pytest.raises(KeyError, match=r"'h\.layers'"):
        find_blocks(model, ["h.layers.0.q"])


def make_evaluator(model: nn.Module) -> AblationEvaluator:
    rows = rows_for(model, count=10, wrong=0)
    objective = RowObjective()
    return AblationEvaluator(model, objective, [objective.batch(rows[:7]), objective.batch(rows[7:])], "accuracy")


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_passed_blocks_change_nothing_and_are_not_computed(kind: str) -> None:
    model = MODELS[kind]()
    evaluator = make_evaluator(model)
    names = linears(model)
    blocks = find_blocks(model, names)
    order = evaluator.call_order(blocks)
    assert order is not None and set(order) == set(blocks)
    runs: Counter[str] = Counter()
    for name, block in blocks.items():  # counted inside: a block that is passed still runs its hooks
        next(iter(linears(block).values())).register_forward_hook(lambda *_, name=name: runs.update([name]))
    whole = [evaluator.score(i, "loss") for i in range(2)]
    evaluator.cache = PrefixCache(blocks, 2)
    for passed, name in enumerate(order, start=1):
        assert evaluator.cache.advance([name], lambda i: evaluator.score(i, "accuracy"))
        runs.clear()
        for i in range(2):
            assert torch.equal(evaluator.score(i, "loss"), whole[i])
        assert set(runs) == set(order[passed:])
        held = evaluator.cache._outputs
        assert len(held) == len({layer_of(name).stack for name in order[:passed]})
    evaluator.cache.clear()
    assert all("forward" not in vars(block) for block in blocks.values())
    assert torch.equal(evaluator.score(0, "loss"), whole[0])


@torch.no_grad()
def test_several_blocks_are_passed_in_one_go() -> None:
    model = bart()
    evaluator = make_evaluator(model)
    blocks = find_blocks(model, linears(model))
    order = evaluator.call_order(blocks)
    whole = evaluator.score(1, "loss")
    evaluator.cache = PrefixCache(blocks, 2)
    before = evaluator.forwards
    assert evaluator.cache.advance(
        order[:3], lambda i: evaluator.score(i, "loss")
    )  # 2 of the encoder, 1 of the decoder
    assert evaluator.forwards - before == 2
    assert torch.equal(evaluator.score(1, "loss"), whole)


def test_evaluating_gives_every_module_its_mode_back() -> None:
    model = llama().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes
