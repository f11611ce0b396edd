"""Sparsity ratios from the pretrained model (Partial-LoRA, section 4.2, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Never, get_args

import torch
from torch import nn

from sparse_llm_ft.config.derivation import DerivationSettings, MeasureName
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.errors import TrainingError, UserError
from sparse_llm_ft.model.linear import LinearLayer, sides
from sparse_llm_ft.objectives.base import Objective, evaluating
from sparse_llm_ft.scoring.ablation import SIDES, AblationEvaluator
from sparse_llm_ft.scoring.blocks import group_by_block
from sparse_llm_ft.scoring.contracts import ALONE, T, WorkShard
from sparse_llm_ft.scoring.gradients import gradient_importance
from sparse_llm_ft.scoring.importance import (
    Importance,
    check_finite,
    dense_weight,
    overlap,
    preserve_flow,
    svd_importance,
)
from sparse_llm_ft.scoring.joint_search import JointSearch
from sparse_llm_ft.scoring.layer_search import LayerSearch


@dataclass(frozen=True, eq=False)
class Derivation:
    """The result of `derive`; the same on every rank and for any number of ranks.

    Attributes:
        settings: the settings that it was derived with.
        mu: accuracy of the unmodified model on D_t, over the scored units.
        standard_error: of `mu`: sqrt(μ (1 - μ) / units).
        majority: accuracy of always giving the most frequent answer.
        loss: mean loss of the unmodified model on D_t per unit of the loss.
        samples, units: number of D_t's samples, and of their scored units.
        ratios: module -> (p_row, p_col), kept / size; 0 where nothing has to be kept.
        importance: module -> the scores before `preserve_flow`.
        notes: a sentence about each deviation from the settings.
        overlaps: ``svd-snip`` and so on -> module -> share of common top indices (`overlap`), if asked for.
    """

    settings: DerivationSettings
    mu: float
    standard_error: float
    majority: float
    loss: float
    samples: int
    units: int
    ratios: dict[str, tuple[float, float]]
    importance: dict[str, Importance]
    notes: tuple[str, ...] = ()
    overlaps: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """The scores as tensors named ``module/rows`` and ``module/cols``, and everything else as JSON values."""
        tensors = {
            f"{name}/{side}": getattr(scores, side).contiguous()
            for name, scores in self.importance.items()
            for side in SIDES
        }
        keys = ("mu", "standard_error", "majority", "loss", "samples", "units")
        return tensors, {
            "settings": self.settings.model_dump(),
            **{key: getattr(self, key) for key in keys},
            "ratios": {name: list(ratio) for name, ratio in self.ratios.items()},
            "notes": list(self.notes),
            "overlaps": {pair: {n: list(shares) for n, shares in both.items()} for pair, both in self.overlaps.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Derivation:
        """The derivation of `to_tensors`.

        Raises:
            KeyError, TypeError, ValueError: the values are not of that form.
        """
        values = dict(metadata)
        settings = DerivationSettings(**values.pop("settings"))
        ratios = {name: (float(row), float(col)) for name, (row, col) in values.pop("ratios").items()}
        notes = tuple(values.pop("notes"))
        overlaps = {pair: {n: (r, c) for n, (r, c) in both.items()} for pair, both in values.pop("overlaps").items()}
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        importance = {name: Importance(tensors[f"{name}/rows"], tensors[f"{name}/cols"]) for name in names}
        return cls(settings=settings, ratios=ratios, importance=importance, notes=notes, overlaps=overlaps, **values)

    def describe(self) -> str:
        """A line for people."""
        if not self.ratios:
            return f"importance {self.settings.importance} of {len(self.importance)} modules"
        kept = [share for pair in self.ratios.values() for share in pair]
        accuracy = f"accuracy {self.mu:.3f} ± {self.standard_error:.3f} (majority {self.majority:.3f})"
        return (
            f"{accuracy} on {self.samples} samples; importance {self.settings.importance}, "
            f"{self.settings.derivation} derivation, mean kept share {sum(kept) / len(kept):.3f}, "
            f"{kept.count(0.0)} of {len(kept)} ratios 0"
        )

    def collapse(self) -> str | None:
        """A sentence about ratios of 0, which say nothing about their modules; None if there are none."""
        zeros = {name: sum(share == 0 for share in pair) for name, pair in self.ratios.items()}
        total = sum(zeros.values())
        if not total:
            return None
        others = "" if self.settings.derivation == "joint" else "method.derivation: joint or "
        return (
            f"{total} of {2 * len(zeros)} ratios are 0 ({_by_layer(zeros)}): the {self.settings.floor_metric} stays "
            "within its floor if each of these modules is zeroed entirely; their ratios carry no information; "
            f"{others}method.min_ratio avoids this"
        )

    def low_floor(self) -> str | None:
        """A sentence about an accuracy's floor that a constant answer may meet, so that any module may be zeroed; None
        if it is more than two standard errors above.
        """
        floor, error = (
            self.settings.accuracy_floor * self.mu,
            math.sqrt(self.majority * (1 - self.majority) / self.units),
        )
        if self.settings.floor_metric != "accuracy" or not self.ratios or floor > self.majority + 2 * error:
            return None
        return (
            f"the floor of the accuracy, {floor:.3f}, is within two standard errors ({2 * error:.3f}) of the share of "
            f"the most frequent answer, {self.majority:.3f}: a model that always gives this answer may meet it, and "
            "then ratios of 0 say nothing about a module; a larger D_t or method.accuracy_floor parts the two"
        )

    def summary(self) -> dict[str, object]:
        """Everything but the importance as JSON values, for the report."""
        return {
            "kind": "partial",
            "derivation": self.settings.derivation,
            "importance": self.settings.importance,
            "accuracy_floor": self.settings.accuracy_floor,
            "floor_metric": self.settings.floor_metric,
            **{key: getattr(self, key) for key in ("mu", "standard_error", "majority", "loss", "samples", "units")},
            "ratios": {name: list(ratio) for name, ratio in self.ratios.items()},
            "overlap": {pair: {n: list(shares) for n, shares in both.items()} for pair, both in self.overlaps.items()},
            "notes": [*self.notes, *filter(None, [self.collapse(), self.low_floor()])],
        }


def derive(
    model: nn.Module,
    modules: Mapping[str, LinearLayer],
    samples: Sequence[T],
    objective: Objective[T],
    settings: DerivationSettings,
    shard: WorkShard = ALONE,
    report: Callable[[int, int], None] | None = None,
    compare: bool = False,
) -> Derivation:
    """Collective. The kept shares of the rows and the columns of every module.

    Under ``derivation: single`` Algorithm 1 searches each with all others intact; under ``joint`` all modules are cut
    together (`JointSearch`, ours, the default), in at most 16 passes over D_t.

    Algorithm 1 zeroes the least important indices one after the other until the metric on D_t falls below its floor. It
    keeps those that are left. `find_crossing` finds this point, and says what it means if the metric is not monotone.

    Tests of a module in a numbered layer run only the layers from there upward (`PrefixCache`). Before each layer the
    result is compared with that of complete passes. If the two differ, all later passes are complete, with a note.
    Forward passes over all of D_t: two at the start (accuracy and loss), one per test, one per layer but the first.
    Over one micro-batch: two at the start of the search, and one per layer but the first.

    The ranks share the searches of a layer, and all return the same result.

    Args:
        model: on its device, and in evaluation mode meanwhile; its parameters neither change nor get gradients.
        modules: target name -> its linear layer (the base layer of a wrapped one).
        samples: D_t; the same on every rank.
        report: called after each layer with the number of finished layers and of all; under ``joint``, after the rows
            and after the columns.
        compare: also compute the other two importances, and how far their top indices agree.

    Raises:
        UserError: D_t is empty or has nothing to score; or its accuracy does not differ from that of the majority
            answer, so that ratios would be noise (only with ``floor_metric: accuracy``).
        TrainingError: a score or the loss is not finite.
    """
    units = _scored_units(samples, objective)
    with evaluating(model), torch.no_grad():
        # The unmodified model sets the floor.
        batches = _batches(model, samples, objective, settings.micro_batch_size)
        evaluator = AblationEvaluator(model, objective, batches, settings.floor_metric)
        # All ranks use the numbers of one: floors that differ in the last digit could make ranks diverge.
        own = torch.tensor([evaluator.total("accuracy"), evaluator.total("loss")], dtype=torch.float64)
        correct, loss = shard.reduce(own if shard.rank == 0 else torch.zeros_like(own)).tolist()
        mu, majority = correct / units, objective.majority(samples)
        error = math.sqrt(max(mu * (1 - mu), 0.0) / units)
        if not math.isfinite(loss):
            raise TrainingError("the loss of the pretrained model on the few-shot subset is not a finite number")
        if settings.floor_metric == "accuracy":
            _check_signal(mu, error, majority, units)
        # Search for the ratios, in the order of importance.
        importance = _measure(model, modules, batches, objective, settings.importance, shard)
        scores = preserve_flow(importance) if settings.flow_preservation else importance
        floor = _floor(settings, correct, loss)
        notes: tuple[str, ...] = ()
        if settings.derivation == "joint":
            ratios = JointSearch(modules, scores, evaluator, floor, shard).run(report)
        else:
            search = LayerSearch(model, modules, scores, evaluator, floor, shard)
            ratios, notes = search.run(report), search.notes
        # Compare the three importances, if asked for.
        overlaps: dict[str, dict[str, tuple[float, float]]] = {}
        if compare:
            every = {
                name: importance
                if name == settings.importance
                else _measure(model, modules, batches, objective, name, shard)
                for name in get_args(MeasureName)
            }
            overlaps = {f"{a}-{b}": overlap(every[a], every[b], ratios) for a, b in combinations(every, 2)}
    mean_loss = loss / sum(objective.units(sample) for sample in samples)
    return Derivation(
        settings, mu, error, majority, mean_loss, len(samples), units, ratios, importance, notes, overlaps
    )


def measure_only(
    model: nn.Module,
    modules: Mapping[str, LinearLayer],
    samples: Sequence[T],
    objective: Objective[T],
    settings: DerivationSettings,
    shard: WorkShard = ALONE,
) -> Derivation:
    """Collective. Only importance, for masks with given ratios; no accuracy is computed.

    Arguments as in `derive`. Raises TrainingError if a score is not finite, and UserError if there is nothing to score.
    """
    units = _scored_units(samples, objective)
    with evaluating(model), torch.no_grad():
        batches = _batches(model, samples, objective, settings.micro_batch_size)
        importance = _measure(model, modules, batches, objective, settings.importance, shard)
    return Derivation(settings, 0.0, 0.0, 0.0, 0.0, len(samples), units, {}, importance)


def _scored_units(samples: Sequence[T], objective: Objective[T]) -> int:
    units = sum(objective.scored(sample) for sample in samples)
    if units == 0:
        raise UserError(f"the few-shot subset has {len(samples)} samples and nothing to score; raise method.shots")
    return units


def _by_layer(zeros: Mapping[str, int]) -> str:
    """Ratios of 0 by layer, with neighbours alike in one: ``encoder.layer.0-4: 12 of 12, encoder.layer.5: 8 of 12``.

    Args:
        zeros: module -> how many of its two ratios are 0.
    """
    groups, rest = group_by_block(zeros)
    counts = {block: (sum(zeros[n] for n in names), 2 * len(names)) for block, names in groups.items()}
    counts |= {name: (zeros[name], 2) for name in rest}
    runs: list[list[str]] = []
    for place in counts:
        alike = runs and counts[runs[-1][-1]] == counts[place] and place in groups and runs[-1][-1] in groups
        if alike and _stack_of(runs[-1][-1]) == _stack_of(place):
            runs[-1].append(place)
        else:
            runs.append([place])
    parts = []
    for first, *others in runs:
        to = f"-{others[-1].rpartition('.')[2]}" if others else ""
        zero, total = counts[first]
        parts += [f"{first}{to}: {zero} of {total}"] if zero else []
    return ", ".join(parts)


def _stack_of(block: str) -> str:
    return block.rpartition(".")[0]


def _batches(model: nn.Module, samples: Sequence[T], objective: Objective[T], size: int) -> list[Batch]:
    device = next(model.parameters()).device
    chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [{key: tensor.to(device) for key, tensor in objective.batch(chunk).items()} for chunk in chunks]


def _check_signal(mu: float, error: float, majority: float, units: int) -> None:
    """Refuse an accuracy that does not exceed the majority's by two standard errors."""
    # A model below the majority has also learned nothing that zeroing could destroy.
    if mu <= majority + 2 * error:
        raise UserError(
            f"the pretrained model's accuracy on the few-shot subset is {mu:.4f} over n = {units}, not more than two "
            f"standard errors ({2 * error:.4f}) above the share of the most frequent answer, {majority:.4f}: derived "
            f"ratios would be noise; raise method.shots, or set method.floor_metric: loss"
        )


def _floor(settings: DerivationSettings, correct: float, loss: float) -> Callable[[float], bool]:
    """A test whether the metric's sum over D_t meets the floor."""
    if settings.floor_metric == "accuracy":
        least = settings.accuracy_floor * correct - 1e-6  # counts are integers, and 0.7 * 10 is a little more than 7
        return lambda total: total >= least
    most = loss / settings.accuracy_floor
    return lambda total: total <= most


def _measure(
    model: nn.Module,
    modules: Mapping[str, LinearLayer],
    batches: Sequence[Batch],
    objective: Objective[Never],
    measure: MeasureName,
    shard: WorkShard,
) -> dict[str, Importance]:
    """Collective. The importance of all modules, on every rank."""
    if measure == "svd":
        own = {}
        for i, (name, module) in enumerate(modules.items()):
            mine = i % shard.size == shard.rank
            if mine or shard.lockstep:
                with shard.gather(module):
                    if mine:
                        own[name] = svd_importance(dense_weight(module))
    else:
        own = gradient_importance(model, modules, batches, objective, measure, shard)
    parts = []
    for name, module in modules.items():
        nothing = Importance(*map(torch.zeros, sides(module)))
        scores = own.get(name, nothing)
        parts += [scores.rows, scores.cols]
    whole = iter(shard.reduce(torch.cat(parts)).split([len(part) for part in parts]))
    importance = {name: Importance(next(whole).clone(), next(whole).clone()) for name in modules}
    check_finite(importance)  # after the sum: all ranks raise, and none waits for another
    return importance
