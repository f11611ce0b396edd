"""Algorithm 1 against its literal loop, counted passes, and the same ratios for every number of ranks."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from helpers.rank_threads import derive_on
from helpers.scored_models import CLASSES, Row, RowObjective, bert, deberta, linears, llama, rows_for, spread
from sparse_llm_ft.errors import TrainingError, UserError
from sparse_llm_ft.scoring import Derivation, DerivationSettings, derive, measure_only, preserve_flow
from sparse_llm_ft.scoring.importance import ranking
from sparse_llm_ft.scoring.layer_search import Job, distribute

OBJECTIVE = RowObjective()
SETTINGS = DerivationSettings(derivation="single", micro_batch_size=10)


@torch.no_grad()
def passes_by_count(model: nn.Module, module: nn.Linear, side: str, scores: torch.Tensor, rows: list, settings) -> list:
    """Literally: for k = 0 to size, whether the model passes with the k least important indices of W zeroed."""

    def total() -> float:
        measure = OBJECTIVE.correct if settings.floor_metric == "accuracy" else OBJECTIVE.losses
        size = settings.micro_batch_size
        return sum(float(measure(model, OBJECTIVE.batch(rows[i : i + size])).sum()) for i in range(0, len(rows), size))

    whole, kept = total(), module.weight.clone()
    order = ranking(scores).flip(0).tolist()
    passed = []
    for k in range(len(order) + 1):
        if k:
            module.weight[order[k - 1] if side == "rows" else (slice(None), order[k - 1])] = 0
        if settings.floor_metric == "accuracy":
            passed.append(total() >= settings.accuracy_floor * whole - 1e-9)
        else:
            passed.append(total() <= whole / settings.accuracy_floor + 1e-9)
    module.weight.copy_(kept)
    return passed


def assert_follows_the_loop(model: nn.Module, modules: dict, rows: list, settings, found: Derivation) -> None:
    monotone = 0
    importance = preserve_flow(found.importance) if settings.flow_preservation else found.importance
    for name, module in modules.items():
        for side, ratio in zip(("rows", "cols"), found.ratios[name], strict=True):
            scores = getattr(importance[name], side)
            size = len(scores)
            passed = passes_by_count(model, module, side, scores, rows, settings)
            zeroed = size - round(ratio * size)
            assert passed[zeroed - 1], (name, side, zeroed, passed)
            assert zeroed == size or not passed[zeroed], (name, side, zeroed, passed)
            if passed == sorted(passed, reverse=True):
                monotone += 1
                first = passed.index(False) if False in passed else size
                assert zeroed == first
    assert monotone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance": "snip"},
        {"importance": "imp", "flow_preservation": True, "accuracy_floor": 0.7},
        {"floor_metric": "loss", "accuracy_floor": 0.5},
    ],
    ids=str,
)
def test_ratios_are_those_of_the_literal_loop(changes: dict) -> None:
    model = llama(2)
    modules = linears(model, "q_proj", "k_proj", "o_proj", "down_proj")
    rows = rows_for(model)
    settings = SETTINGS.model_copy(update=changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = derive(model, modules, rows, OBJECTIVE, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and not found.notes
    assert list(found.ratios) == list(modules)
    assert len({p for pair in found.ratios.values() for p in pair}) >= 3
    assert_follows_the_loop(model, modules, rows, settings, found)


@pytest.mark.parametrize("build", [bert, deberta])
def test_encoders_with_biases_and_a_pooler_outside_the_layers(build) -> None:
    model = build()
    modules = linears(model, "query", "query_proj", "pos_key_proj", "1.output.dense", "pooler.dense")
    rows = rows_for(model)
    found = derive(model, modules, rows, OBJECTIVE, SETTINGS)
    assert any(name.endswith("pooler.dense") for name in found.ratios) and not found.notes
    assert_follows_the_loop(model, modules, rows, SETTINGS, found)


def test_what_the_result_says() -> None:
    model = llama(1)
    rows = rows_for(model, count=24, wrong=3)
    found = derive(model, linears(model, "q_proj"), rows, OBJECTIVE, SETTINGS)
    mu = 21 / 24
    assert found.mu == pytest.approx(mu) and found.samples == found.units == 24
    assert found.standard_error == pytest.approx(math.sqrt(mu * (1 - mu) / 24))
    assert found.majority == OBJECTIVE.majority(rows)
    with torch.no_grad():
        loss = float(OBJECTIVE.loss(model, OBJECTIVE.batch(rows)))
    assert found.loss == pytest.approx(loss / 24, rel=1e-5)
    tensors, metadata = found.to_tensors()
    back = Derivation.from_tensors(tensors, metadata)
    assert back.to_tensors()[1] == metadata and back.ratios == found.ratios and back.settings == SETTINGS
    (name,) = found.importance
    assert torch.equal(back.importance[name].cols, found.importance[name].cols)


def count_layer_runs(model: nn.Module) -> Counter[int]:
    """Layer -> how often it is computed (a layer that is passed computes nothing)."""
    runs: Counter[int] = Counter()
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: runs.update([i]))
    return runs


def test_every_layer_is_computed_exactly_as_often_as_said() -> None:
    """Nothing ever fails, so that every search takes the most tests: log2 of a power of two."""
    model = llama(4)
    modules = linears(model, "q_proj", "k_proj")
    rows = rows_for(model, count=20)  # two micro-batches
    runs = count_layer_runs(model)
    settings = SETTINGS.model_copy(update={"floor_metric": "loss", "accuracy_floor": 1e-9})
    found = derive(model, modules, rows, OBJECTIVE, settings)
    assert set(found.ratios.values()) == {(0.0, 0.0)}
    start = 2 * 2 + 2  # μ and loss of two micro-batches; reference and order of one
    tests = 2 * (4 + 4 + 3 + 4)  # log2 of 16 and 16 (q), 8 and 16 (k), each for two micro-batches
    check, last_time = 1, 2
    expected = {}
    for layer in range(4):
        computed = start + tests * (layer + 1)  # its own searches, and those of the layers below
        computed += last_time * min(layer + 1, 3)  # to pass each layer up to itself
        computed += check * layer  # the check after passing each layer below
        expected[layer] = computed
    assert runs == expected


def test_only_layers_below_a_target_are_passed_and_in_one_go() -> None:
    model = llama(4)
    rows = rows_for(model, count=20)
    runs = count_layer_runs(model)
    derive(model, linears(model, "3.self_attn.q_proj"), rows, OBJECTIVE, SETTINGS)
    assert runs[0] == runs[2] == 6 + 2 and runs[3] > 6 + 2 + 1 + 2


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("measure", ["svd", "imp"])
def test_ratios_do_not_depend_on_the_number_of_ranks(measure: str, lockstep: bool) -> None:
    model = llama(2)
    rows = rows_for(model, count=20)
    settings = SETTINGS.model_copy(update={"importance": measure})
    endings = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    alone, whole = derive_on(1, lockstep, model, endings, rows, settings)
    passes = whole[0].count("forward")
    for size in (2, 3):
        results, traces = derive_on(size, lockstep, model, endings, rows, settings)
        for found in results.values():
            assert found.ratios == alone[0].ratios
            assert found.to_tensors()[1] == alone[0].to_tensors()[1]
            for name, scores in found.importance.items():
                assert torch.equal(scores.rows, alone[0].importance[name].rows)
        counts = [trace.count("forward") for trace in traces.values()]
        start = 6 + 3 + (4 if measure == "imp" else 0)
        assert max(counts) - start < 1.25 * (passes - start) / size  # about 1 / N of the tests
        if lockstep:  # the same layers, passes and gathers in the same order
            assert all(trace == traces[0] for trace in traces.values())


def test_jobs_go_to_the_rank_with_least_to_do_the_longest_first() -> None:
    jobs = [Job(str(i), "rows", size) for i, size in enumerate((2, 256, 4, 256, 16, 16))]
    loads = [0, 0]
    shares = distribute(jobs, loads)
    assert loads == [sum(job.tests for job in share) for share in shares] == [14, 13]
    assert sorted(job for share in shares for job in share) == sorted(jobs)


def test_layers_that_are_not_numbered() -> None:
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.last = nn.Embedding(40, 8), nn.Linear(8, 12), nn.Linear(12, CLASSES)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(self.embed(input_ids).mean(1))))

    model = spread(Plain())
    modules = {"first": model.first}
    rows = rows_for(model)
    found = derive(model, modules, rows, OBJECTIVE, SETTINGS)
    assert not found.notes
    assert_follows_the_loop(model, modules, rows, SETTINGS, found)


class Stack(nn.Module):
    """Three numbered layers; `skip` adds what the first returned to the last, `shared` runs the first twice."""

    def __init__(self, skip: bool, shared: bool) -> None:
        super().__init__()
        self.skip, self.shared = skip, shared
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, CLASSES)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = first = self.layers[0](self.embed(input_ids))
        if self.shared:
            hidden = self.layers[0](hidden)
        for layer in self.layers[1:]:
            hidden = layer(hidden)
        return self.head((hidden + first if self.skip else hidden)[:, 0])


@pytest.mark.parametrize(("skip", "shared", "note"), [(True, False, "elsewhere"), (False, True, "more than once")])
def test_models_that_cannot_be_cut_get_whole_passes_and_a_note(skip: bool, shared: bool, note: str) -> None:
    model = spread(Stack(skip, shared), std=1.0)
    modules = linears(model, ".0")
    assert len(modules) == 4
    rows = rows_for(model)
    found = derive(model, modules, rows, OBJECTIVE, SETTINGS)
    assert len(found.notes) == 1 and note in found.notes[0]
    assert_follows_the_loop(model, modules, rows, SETTINGS, found)


def test_one_row_and_one_column() -> None:
    model = spread(Stack(False, False), std=1.0)
    model.layers[1] = nn.Sequential(nn.Linear(8, 1), nn.Tanh(), nn.Linear(1, 8)).requires_grad_(False)
    modules = linears(model, "layers.1.0", "layers.1.2")
    found = derive(model, modules, rows_for(model), OBJECTIVE, SETTINGS.model_copy(update={"floor_metric": "loss"}))
    # Algorithm 1 removes an index and then looks: of one index none is left.
    assert found.ratios["layers.1.0"][0] == 0.0 and found.ratios["layers.1.2"][1] == 0.0


def test_accuracy_that_says_nothing_is_refused() -> None:
    model = llama(1)
    modules = linears(model, "q_proj")
    one_class = [row for row in rows_for(model, wrong=0) if row.label == rows_for(model, wrong=0)[0].label]
    with pytest.raises(UserError, match=r"1\.0000 over n = .*1\.0000.*method\.shots.*method\.floor_metric: loss"):
        derive(model, modules, one_class, OBJECTIVE, SETTINGS)
    wrong = [Row(row.ids, (row.label + 1 + i % 3) % CLASSES) for i, row in enumerate(rows_for(model, wrong=0))]
    with pytest.raises(UserError, match="noise"):
        derive(model, modules, wrong, OBJECTIVE, SETTINGS)
    found = derive(model, modules, wrong, OBJECTIVE, SETTINGS.model_copy(update={"floor_metric": "loss"}))
    assert found.mu == 0.0 and len(found.ratios) == 1
    for score in (derive, measure_only):
        with pytest.raises(UserError, match="0 samples and nothing to score"):
            score(model, modules, [], OBJECTIVE, SETTINGS)


def test_numbers_that_are_not_finite_stop_with_the_modules_name() -> None:
    model = llama(1)
    rows = rows_for(model)
    modules = {"model.layers.0.extra": nn.Linear(4, 3)}
    modules["model.layers.0.extra"].weight.data[1, 2] = float("nan")
    with pytest.raises(TrainingError, match=r"module 'model\.layers\.0\.extra' is not a finite number"):
        derive(model, modules, rows, OBJECTIVE, SETTINGS)
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="loss of the pretrained model"):
        derive(model, linears(model, "q_proj"), rows, OBJECTIVE, SETTINGS)
    with pytest.raises(ValidationError, match="accuracy_floor"):
        DerivationSettings(accuracy_floor=0.0)


def test_ratios_of_zero_are_said_with_their_layers() -> None:
    kinds, half = ("q", "k"), (0.5, 0.5)
    ratios = {f"h.{layer}.{kind}": (0.0, 0.0) for layer in range(3) for kind in kinds}
    ratios |= {"h.3.q": (0.0, 0.25), "h.3.k": half, "h.4.q": half, "h.4.k": half, "h.5.q": (0.0, 0.0), "h.5.k": half}
    found = Derivation(SETTINGS, 0.8, 0.02, 0.5, 0.4, 50, 50, ratios | {"pooler": (0.0, 0.1)}, {})
    said = found.collapse()
    assert said is not None and said in found.summary()["notes"]
    assert said.startswith("16 of 26 ratios are 0 (h.0-2: 4 of 4, h.3: 1 of 4, h.5: 2 of 4, pooler: 1 of 2): the ")
    assert "16 of 26 ratios 0" in found.describe()
    whole = Derivation(SETTINGS, 0.8, 0.02, 0.5, 0.4, 50, 50, dict.fromkeys(ratios, half), {})
    assert whole.collapse() is None and whole.summary()["notes"] == []


@pytest.mark.parametrize(
    ("mu", "units", "majority", "metric", "low"),
    [
        (0.649, 302, 0.556, "accuracy", True),  # .584 against .556 + 2 * .029
        (0.71, 2000, 0.684, "accuracy", True),  # .639: every constant answer meets it
        (0.8, 302, 0.556, "accuracy", False),
        (0.649, 30000, 0.556, "accuracy", False),
        (0.649, 302, 0.556, "loss", False),
    ],
)
def test_a_floor_that_a_constant_answer_may_meet(
    mu: float, units: int, majority: float, metric: str, low: bool
) -> None:
    settings = SETTINGS.model_copy(update={"floor_metric": metric})
    found = Derivation(settings, mu, 0.02, majority, 0.4, units, units, {"a": (0.5, 0.5)}, {})
    said = found.low_floor()
    assert (said is not None) == low and found.summary()["notes"] == ([said] if low else [])
