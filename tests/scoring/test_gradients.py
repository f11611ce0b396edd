"""SNIP and IMP scores against autograd's own weight gradients."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from helpers.scored_models import RowObjective, linears, llama, rows_for
from sparse_llm_ft.scoring.contracts import WorkShard
from sparse_llm_ft.scoring.gradients import gradient_importance
from sparse_llm_ft.scoring.importance import Importance, dense_weight

OBJECTIVE = RowObjective()


def by_autograd(model: nn.Module, modules: dict, batches: list, measure: str) -> dict[str, Importance]:
    """Weights trained for once: |W.grad|, summed over all batches first."""
    for module in modules.values():
        module.weight.requires_grad_(True)
    sum(OBJECTIVE.loss(model, batch) for batch in batches).backward()
    found = {}
    for name, module in modules.items():
        size = (module.weight.grad * (module.weight.detach() if measure == "imp" else 1)).abs()
        found[name] = Importance(size.sum(1), size.sum(0))
        module.weight.requires_grad_(False).grad = None
    return found


def batches_of(model: nn.Module, size: int = 5) -> list[dict]:
    rows = rows_for(model, count=12, wrong=6)
    return [OBJECTIVE.batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def assert_equal(found: dict[str, Importance], expected: dict[str, Importance]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        for side in ("rows", "cols"):
            values = getattr(expected[name], side)
            torch.testing.assert_close(getattr(found[name], side), values, rtol=1e-4, atol=1e-5 * float(values.max()))


@pytest.mark.parametrize("measure", ["snip", "imp"])
def test_scores_are_those_of_autograds_weight_gradients(measure: str) -> None:
    model = llama()
    modules, batches = linears(model), batches_of(model)
    assert len({tuple(m.weight.shape) for m in modules.values()}) > 3  # grouped-query k and v among them
    found = gradient_importance(model, modules, batches, OBJECTIVE, measure)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert_equal(found, by_autograd(model, modules, batches, measure))


def test_gradients_are_summed_before_the_absolute_value() -> None:
    model = llama()
    modules, batches = linears(model, "0.mlp.down_proj"), batches_of(model)
    alone = [gradient_importance(model, modules, [batch], OBJECTIVE, "snip") for batch in batches]
    together = gradient_importance(model, modules, batches, OBJECTIVE, "snip")
    (name,) = modules
    assert (together[name].rows < sum(one[name].rows for one in alone) - 1e-3).all()


def test_trainable_parameters_get_no_gradient_and_modes_stay() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(True)  # gradients flow below the hooked layers too
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    modules, batches = linears(model), batches_of(model)
    found = gradient_importance(model, modules, batches, OBJECTIVE, "snip")
    assert [module.training for module in model.modules()] == modes
    assert model.model.embed_tokens.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert_equal(found, by_autograd(model, modules, batches, "snip"))


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_layers_and_in_lockstep_do_the_same_passes(size: int, lockstep: bool) -> None:
    model = llama()
    modules, batches = linears(model), batches_of(model)
    expected = gradient_importance(model, modules, batches, OBJECTIVE, "imp")
    found: dict[str, Importance] = {}
    traces = []
    for rank in range(size):
        trace: list[str] = []
        names = {module: name for name, module in modules.items()}

        @contextmanager
        def gather(module, trace=trace, names=names):
            trace.append(names[module])
            yield

        handle = model.register_forward_hook(lambda *_, trace=trace: trace.append("forward"))
        own = gradient_importance(
            model, modules, batches, OBJECTIVE, "imp", WorkShard(rank, size, lockstep=lockstep, gather=gather)
        )
        handle.remove()
        assert not set(own) & set(found)
        found |= own
        traces.append(trace)
    assert_equal(found, expected)
    passes = [trace.count("forward") / len(batches) for trace in traces]
    if lockstep:
        assert all(trace == traces[0] for trace in traces) and passes[0] == -(-3 // size)
    else:
        assert sum(passes) == 3 and max(passes) == -(-3 // size)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_in_lockstep_all_ranks_go_backward_through_the_same_layers() -> None:
    model = llama()
    modules, batches = linears(model), batches_of(model, size=12)
    reached = []
    for rank in range(2):
        calls: list[int] = []
        handles = [
            layer.register_full_backward_hook(lambda *_, i=i, calls=calls: calls.append(i))
            for i, layer in enumerate(model.model.layers)
        ]
        gradient_importance(model, modules, batches, OBJECTIVE, "snip", WorkShard(rank, 2, lockstep=True))
        for handle in handles:
            handle.remove()
        reached.append(calls)
    assert reached[0] == reached[1]


class InPlace(nn.Module):
    """No numbered layers; an output is changed in place, and one layer has no influence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(3, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.first(torch.nn.functional.one_hot(input_ids % 5, 5).float().mean(1))
        hidden *= 3.0
        return self.second(hidden.relu_())


@pytest.mark.parametrize("size", [1, 2])
def test_layers_without_number_and_in_place_changes(size: int) -> None:
    torch.manual_seed(0)
    model = InPlace().requires_grad_(False)
    modules = {name: getattr(model, name) for name in ("first", "second", "unused")}
    ids = torch.randint(0, 40, (8, 3))
    batches = [{"input_ids": ids, "labels": torch.arange(8) % 4}]
    found: dict[str, Importance] = {}
    for rank in range(size):
        found |= gradient_importance(model, modules, batches, OBJECTIVE, "snip", WorkShard(rank, size))
    unused = found.pop("unused")
    assert unused.rows.tolist() == [0.0] * 2 and unused.cols.tolist() == [0.0] * 3
    del modules["unused"]
    assert_equal(found, by_autograd(model, modules, batches, "snip"))


def test_four_bit_weights_score_as_the_dense_ones_they_stand_for() -> None:
    from bitsandbytes.nn import Linear4bit

    model = llama(2)
    batches = batches_of(model)
    for layer in model.model.layers:
        plain = layer.mlp.gate_proj
        four_bit = Linear4bit(16, 24, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        four_bit.weight.data = plain.weight.data.clone()
        four_bit.support_avx512bf16_for_cpu = False
        layer.mlp.gate_proj = four_bit.to("cpu")
    modules = linears(model, "gate_proj", "q_proj")
    found = gradient_importance(model, modules, batches, OBJECTIVE, "imp")
    for layer in model.model.layers:
        dense = nn.Linear(16, 24, bias=False)
        dense.weight.data = dense_weight(layer.mlp.gate_proj)
        layer.mlp.gate_proj = dense
    assert_equal(found, by_autograd(model, linears(model, "gate_proj", "q_proj"), batches, "imp"))
