"""`Scorer`: a phase's scores: LoRA outputs, single entries, or a Partial-LoRA derivation (importance and ratios)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from sparse_llm_ft.adapters import SparseLoraLayer
from sparse_llm_ft.adapters.layer import calling_parts
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.distributed.collectives import broadcast_bytes, run_on_rank_zero
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.evaluation.loop import evaluation_batches
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.layers import uncompiled
from sparse_llm_ft.model.linear import LinearLayer
from sparse_llm_ft.objectives.base import Objective, evaluating, lengths_of
from sparse_llm_ft.phase import Phase, ScoringSpec
from sparse_llm_ft.plan import is_matrix
from sparse_llm_ft.scoring import Derivation, OutputScores, WorkShard, derive, measure_only
from sparse_llm_ft.scoring.cache import (
    derivation_key,
    derivations_folder,
    from_bytes,
    hash_model,
    load,
    save,
    to_bytes,
)
from sparse_llm_ft.scoring.scores import EntryScores, Scores

T = TypeVar("T")
"""The type of samples."""


class Scorer(Generic[T]):
    """Scores an engine's model at a phase's end, also in 4 bit and sharded over ranks.

    Args:
        config: the run's settings.
        objective: how samples become a loss and right answers.
    """

    def __init__(self, config: RunConfig, world: World, objective: Objective[T], console: Console) -> None:
        self.config, self.world, self.objective, self.console = config, world, objective, console

    def __call__(
        self,
        engine: Engine,
        phase: Phase,
        samples: Sequence[T],
        fitted: Sequence[T],
        values: dict[str, torch.Tensor],
    ) -> Scores:
        """Collective. The scores that the phase asks for, on `samples`; None if it asks for none.

        Args:
            fitted: samples that the phase's head was fitted on, none of them in `samples`.
            values: the trained parameters at the phase's end.
        """
        if phase.scoring is None:
            return None
        with uncompiled(engine.module):
            if phase.scoring.kind == "lora_output":
                return self.lora_output(engine.module, list(phase.plan.active), samples)
            if phase.scoring.kind == "entries":
                return self.entries(engine, samples)
            return self.derivation(engine, phase, phase.scoring, samples, fitted, values)

    def lora_output(self, model: nn.Module, names: Sequence[str], samples: Sequence[T]) -> dict[str, float]:
        """Collective. g_i of every module (LoRA-drop, section 3.2), the same on every rank and for every world size."""
        size, world, objective = self.config.evaluation.micro_batch_size, self.world, self.objective
        scores = OutputScores(names)
        layers = {name: _layer(model, name) for name in names}
        for name, layer in layers.items():
            layer.observe = scores.observer(name)
        lengths = lengths_of(samples, objective)
        try:
            with (
                Wait(self.console, "measuring LoRA outputs", unit="batches") as wait,
                evaluation_batches(
                    model, samples, lengths, objective.batch, size, world.rank, world.size, wait=wait
                ) as batches,
            ):
                for indices, batch in batches:
                    masks = [mask for name, mask in batch.items() if name.endswith("attention_mask")]
                    scores.begin_batch(*(mask if indices else torch.zeros_like(mask) for mask in masks))
                    objective.loss(model, batch)
        finally:
            for layer in layers.values():
                layer.observe = None
        return scores.totals(self._sum)

    def entries(self, engine: Engine, samples: Sequence[T]) -> EntryScores:
        """Collective. ``|∂L/∂θ ⊙ θ|`` of every entry of A and B, L summed over all samples, without dropout.

        Gradients come by the engine's own path, so they are the same at every ZeRO stage. Nothing is updated.
        """
        names = [name for name in engine.parameters if is_matrix(name)]
        settings, device = engine.settings, next(engine.module.parameters()).device
        world, size = self.world, settings.micro_batch_size
        mean_of = world.size * settings.accumulation_steps  # DeepSpeed averages over these micro-batches
        total = {name: torch.zeros(()) for name in names}
        with evaluating(engine.module), Wait(self.console, "scoring entries", unit="samples") as wait:
            for start in range(0, len(samples), mean_of * size):
                wait.at(start, len(samples))
                for step in range(settings.accumulation_steps):
                    first = start + (step * world.size + world.rank) * size
                    chosen = [samples[i] for i in range(first, min(first + size, len(samples)))]
                    batch = self.objective.batch(chosen or [samples[0]])  # all ranks make equally many passes
                    loss = self.objective.loss(engine.forward, {k: v.to(device) for k, v in batch.items()})
                    engine.backward(loss * (mean_of if chosen else 0))
                    if step == settings.accumulation_steps - 1:
                        gradients = engine.gradients()
                        total = {name: total[name] + gradients[name] for name in names}
                    engine.discard()
                exit_if_preempted()
        values = engine.values(names)
        return EntryScores({name: (total[name] * values[name]).abs() for name in names}, len(samples))

    def derivation(
        self,
        engine: Engine,
        phase: Phase,
        spec: ScoringSpec,
        samples: Sequence[T],
        fitted: Sequence[T],
        values: dict[str, torch.Tensor],
    ) -> Derivation:
        """Collective. Importance and ratios of the base's weights, from the cache if they were derived before.

        The model is scored as it is. At the start of a run, where every B is zero, it is the pretrained one. After
        another method it is the model that this method trained: the head is worth nothing without its adapters.
        """
        names = list((phase.target_plan or phase.plan).active)
        folder = derivations_folder(spec.cache_dir)
        key, found = self._from_cache(phase, folder, names, samples, fitted, values)
        if found is not None:
            self.console.log(f"ratios of {len(names)} modules are in {folder}")
            return self._warned(found)
        settings = spec.derivation
        how = f"importance {settings.importance}" + (f", {settings.derivation} derivation" if spec.search else "")
        apart = f" beside the {len(fitted)} that the head was fitted on" if len(fitted) else ""
        self.console.log(f"deriving on {len(samples)} samples{apart}: {len(names)} modules, {how}")
        derivation = self._derive(engine, spec, names, samples)
        if self.world.rank == 0:
            self._keep(folder, key, derivation)
        return self._warned(derivation)

    def _warned(self, derivation: Derivation) -> Derivation:
        """The derivation, with a line in the log where its ratios say nothing."""
        for warning in filter(None, (derivation.collapse(), derivation.low_floor())):
            self.console.log(f"warning: {warning}")
        return derivation

    def _keep(self, folder: Path, key: str, derivation: Derivation) -> None:
        """Store the derivation. If the cache is not writable, a line is logged and the run continues."""
        try:
            save(folder, key, derivation)
        except (OSError, SafetensorError) as error:
            self.console.log(f"the derivation is not cached: {folder} is not writable ({error}); set method.cache_dir")

    def _derive(self, engine: Engine, spec: ScoringSpec, names: list[str], samples: Sequence[T]) -> Derivation:
        """Collective. Derive on this engine's model, without the cache."""
        model = engine.module
        base = _base_model(model)
        samples = sorted(samples, key=self.objective.tokens)  # little padding in a micro-batch
        modules = {name: _base_layer(base.get_submodule(name)) for name in names}
        size = self.world.size
        shard = WorkShard(
            self.world.rank, size, engine.settings.zero_stage == 3 and size > 1, engine.gathered, self._sum
        )
        settings = spec.derivation
        # Nothing is trained here. Otherwise snip's gradients would flow down to the lowest adapter in every pass.
        for parameter in engine.parameters.values():
            parameter.requires_grad_(False)
        try:
            what = "sides" if settings.derivation == "joint" else "layers"
            with calling_parts(model), Wait(self.console, "deriving", unit=what) as wait:
                if spec.search:
                    report = partial(self._report, wait)
                    return derive(model, modules, samples, self.objective, settings, shard, report, spec.compare)
                return measure_only(model, modules, samples, self.objective, settings, shard)
        finally:
            for parameter in engine.parameters.values():
                parameter.requires_grad_(True)

    def _report(self, wait: Wait, done: int, total: int) -> None:
        """Collective. Show progress, and stop if a signal asked for it."""
        wait.at(done, total)
        exit_if_preempted()

    def _from_cache(
        self,
        phase: Phase,
        folder: Path,
        names: list[str],
        samples: Sequence[T],
        fitted: Sequence[T],
        values: dict[str, torch.Tensor],
    ) -> tuple[str, Derivation | None]:
        """Collective. The key (empty except on rank 0) and the derivation stored under it. Rank 0 looks and sends what
        it finds to the others, whose nodes need not share its cache.
        """
        key, data = "", b""

        def look() -> None:
            nonlocal key, data
            base = hash_model(self.config.model)
            key = derivation_key(self.config, phase, base, names, samples, fitted, values)
            found = load(folder, key, warn=self.console.log)
            data = to_bytes(found) if found else b""

        with Wait(self.console, "looking for stored ratios"):  # the base's files are hashed
            run_on_rank_zero(self.world, look)
        data = broadcast_bytes(data)
        return key, from_bytes(data) if data else None

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective. The sum over ranks, computed on the process group's device."""
        if self.world.size > 1:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            moved = tensor.to(device)
            dist.all_reduce(moved)
            return moved.to(tensor.device)
        return tensor


def _base_model(model: nn.Module) -> nn.Module:
    assert isinstance(model, PeftModel)
    return model.get_base_model()


def _layer(model: nn.Module, name: str) -> SparseLoraLayer:
    layer = _base_model(model).get_submodule(name)
    assert isinstance(layer, SparseLoraLayer)
    return layer


def _base_layer(module: nn.Module) -> LinearLayer:
    """The linear layer without adapters around it."""
    layer = getattr(module, "base_layer", module)
    assert isinstance(layer, LinearLayer)
    return layer
