"""The tuners: one object for each kind of layer that can carry a plan's adapters.

`AdapterPlan.tuner` names one of `TUNERS`. A new PEFT tuner is one class here and its instance in `TUNERS`. A method
then puts the name into a plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, VeraConfig
from torch import nn

from sparse_llm_ft.adapters.config import SparseLoraConfig
from sparse_llm_ft.optim.rank_allocation import orthogonality
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, PlanError, Shape

TensorShape = tuple[int, ...]

VERA_PROJECTION_SEED = 0
"""The seed of VeRA's frozen projections, which is saved in place of them."""


class Tuner:
    """PEFT's LoRA: ``y = W x + scaling * B A x``. Subclasses override what differs.

    Attributes:
        name: what plans call the tuner.
        prefix: the beginning of its tensors' last name part, as in PEFT.
        lora_options: its arguments of PEFT's `LoraConfig`, beside ranks and scalings.
        options: names of the numbers that a plan gives it (`AdapterPlan.options`).
        own_layers: whether its layers are this package's. Groups, omega and compact masks need those.
        is_product: whether a module's ΔW is its scaling times B A. Then an adapter is exported as a LoRA, at one rank
            for all modules on request and in this package's own form, and the norm of its ΔW is known.
        bounded_rank: whether a rank may not exceed the smaller side of its matrix.
        allocates_ranks: whether AdaLoRA's `RankAllocation` acts after every step.
        takes_rows: whether PEFT's form of the adapter can hold rows of embeddings (`AdapterPlan.rows`).
        masked_vectors: last name parts of trained vectors with one entry per row of W. Masks of rows apply to them
            too: an output that no adapter writes keeps its pretrained weights.
    """

    name: ClassVar[str] = "lora"
    prefix: ClassVar[str] = "lora_"
    lora_options: ClassVar[Mapping[str, object]] = {}
    options: ClassVar[frozenset[str]] = frozenset()
    own_layers: ClassVar[bool] = False
    is_product: ClassVar[bool] = True
    bounded_rank: ClassVar[bool] = True
    allocates_ranks: ClassVar[bool] = False
    masked_vectors: ClassVar[tuple[str, ...]] = ()
    takes_rows: ClassVar[bool] = True

    def scaling(self, adapter: ModuleAdapter) -> float:
        """The factor on B A, without omega."""
        return adapter.scaling

    def peft_config(self, plan: AdapterPlan) -> PeftConfig:
        """The configuration from which PEFT builds the plan's adapters."""
        return LoraConfig(
            lora_dropout=plan.lora_dropout,
            target_modules=sorted(plan.active),
            **rank_settings(plan.active),
            **self.lora_options,
        )

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Correct the layers that PEFT has just put on `model`, whose weights have `dtype`."""

    def vectors(self, adapter: ModuleAdapter, shape: Shape) -> dict[str, TensorShape]:
        """Last name part -> shape of the tensors that a module of `shape` trains beside A, B and omega."""
        return {}

    def shapes(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> dict[str, TensorShape]:
        """Short name -> shape of every trained tensor of the plan's adapters in a `TrainState`: kept rows and columns
        alone, wherever a mask is applied.
        """
        found: dict[str, TensorShape] = {}
        active = plan.active
        for owner, name in plan.matrix_owners().items():
            adapter = active[name]
            rows, columns = adapter.shape(targets[name])
            found |= {f"{owner}.lora_A": (adapter.r, columns), f"{owner}.lora_B": (rows, adapter.r)}
        for name, adapter in active.items():
            found |= {f"{name}.{part}": shape for part, shape in self.vectors(adapter, targets[name]).items()}
        return found | {f"{name}.lora_omega": (1,) for name, adapter in active.items() if adapter.train_omega}

    def saved_name(self, name: str) -> str:
        """A trained tensor's name in PEFT's adapter file, from its short name. LoRA's A and B are modules."""
        return f"base_model.model.{name}" + (".weight" if name.endswith((".lora_A", ".lora_B")) else "")

    def penalty(self, plan: AdapterPlan, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
        """A term added to the loss of every micro-batch, from the trained parameters by short name."""
        return 0.0


class SparseLora(Tuner):
    """This package's layers (layer.py)."""

    name = "sparse_lora"
    own_layers = True

    def peft_config(self, plan: AdapterPlan) -> PeftConfig:
        """A configuration that holds the plan."""
        return SparseLoraConfig(plan=plan)

    def vectors(self, adapter: ModuleAdapter, shape: Shape) -> dict[str, TensorShape]:
        """Tied-LoRA's u and v, if they are trained."""
        return {"lora_u": (adapter.r,), "lora_v": adapter.shape(shape)[:1]} if adapter.train_vectors else {}


class RsLora(Tuner):
    """Rank-stabilised LoRA (Kalajdzievski, 2023): B A is scaled by ``lora_alpha / sqrt(r)``."""

    name = "rslora"
    lora_options: ClassVar[Mapping[str, object]] = {"use_rslora": True}

    def scaling(self, adapter: ModuleAdapter) -> float:
        """``lora_alpha / sqrt(r)``: outputs and gradients do not shrink as the rank grows."""
        return adapter.lora_alpha / math.sqrt(adapter.r)


class Dora(Tuner):
    """DoRA (Liu et al., 2024): the magnitude of every row of W is trained beside A and B."""

    name = "dora"
    lora_options: ClassVar[Mapping[str, object]] = {"use_dora": True}
    is_product = False
    masked_vectors = ("lora_magnitude_vector",)

    def vectors(self, adapter: ModuleAdapter, shape: Shape) -> dict[str, TensorShape]:
        """The magnitudes: (d_out,)."""
        return {"lora_magnitude_vector": (shape[0],)}


class AdaLora(Tuner):
    """AdaLoRA (Zhang et al., 2023): ΔW is ``P diag(E) Q``. It starts with more rank than it ends with."""

    name = "adalora"
    options = frozenset(["target_r", "tinit", "tfinal", "deltaT", "total_step", "orth_reg_weight"])
    is_product = False
    bounded_rank = False
    allocates_ranks = True

    def peft_config(self, plan: AdapterPlan) -> PeftConfig:
        """The most frequent rank and scaling, for all modules, and the schedule."""
        settings = rank_settings(plan.active)
        return AdaLoraConfig(
            init_r=settings["r"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=plan.lora_dropout,
            target_modules=sorted(plan.active),
            **{key: int(value) if float(value).is_integer() else value for key, value in plan.options.items()},
        )

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Freeze the constant that AdaLoRA divides by.

        PEFT keeps it as a parameter, and on a half-precision base it comes to require gradients where PEFT widens it
        (peft 0.21.2): it would be trained, and saved under a name that no plan has.
        """
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)

    def vectors(self, adapter: ModuleAdapter, shape: Shape) -> dict[str, TensorShape]:
        """The singular values: (r, 1)."""
        return {"lora_E": (adapter.r, 1)}

    def saved_name(self, name: str) -> str:
        """Without ``.weight``: AdaLoRA's matrices are parameters, not modules."""
        return f"base_model.model.{name}"

    def penalty(self, plan: AdapterPlan, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
        """The orthogonality penalty, in every micro-batch: its mean over them is the penalty."""
        weight = plan.options.get("orth_reg_weight", 0.0)
        return weight * orthogonality(parameters) if weight else 0.0


class Vera(Tuner):
    """VeRA (Kopiczko et al., 2024): frozen random projections of one rank for all modules, trained scaling vectors."""

    name = "vera"
    takes_rows = False
    prefix = "vera_"
    is_product = False
    bounded_rank = False

    def peft_config(self, plan: AdapterPlan) -> PeftConfig:
        """The most frequent rank. Loading an adapter draws the projections again from the seed."""
        return VeraConfig(
            r=rank_settings(plan.active)["r"],
            vera_dropout=plan.lora_dropout,
            projection_prng_key=VERA_PROJECTION_SEED,
            save_projection=False,
            target_modules=sorted(plan.active),
        )

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Cast scaling vectors and frozen projections to the base's precision.

        PEFT makes both float32 and lets the vectors decide what it computes in. DeepSpeed casts parameters, and so the
        vectors, but not buffers, and so not the projections. The vectors' float32 masters are DeepSpeed's.
        """
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".vera_" in name:
                tensor.data = tensor.data.to(dtype)

    def shapes(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> dict[str, TensorShape]:
        """Two vectors per module: (r,) and (d_out,)."""
        found: dict[str, TensorShape] = {}
        for name, adapter in plan.active.items():
            found |= {f"{name}.vera_lambda_d": (adapter.r,), f"{name}.vera_lambda_b": (targets[name][0],)}
        return found


TUNERS: dict[str, Tuner] = {tuner.name: tuner for tuner in (SparseLora(), Tuner(), RsLora(), Dora(), Vera(), AdaLora())}
SPARSE_LORA = SparseLora.name


def tuner_of(plan: AdapterPlan) -> Tuner:
    """The tuner that a plan names.

    Raises:
        PlanError: there is no such tuner, or it has no such option.
    """
    tuner = TUNERS.get(plan.tuner)
    if tuner is None:
        raise PlanError(f"tuner is {plan.tuner!r:.40}; known: {', '.join(TUNERS)}")
    for key, value in plan.options.items():
        if key not in tuner.options:
            raise PlanError(f"option {key!r:.40} is {value!r:.40}, which tuner {plan.tuner} does not take")
    return tuner


def count_parameters(plan: AdapterPlan, targets: Mapping[str, Shape]) -> int:
    """Number of values that the plan's adapters train, without masked entries and `AdapterPlan.trained`."""
    tuner = tuner_of(plan)
    masked_rows = sum(targets[name][0] - a.shape(targets[name])[0] for name, a in plan.active.items())
    single = [entries for name in plan.matrix_owners().values() if (entries := plan.active[name].entries) is not None]
    masked = sum(mask.size - mask.kept for entries in single for mask in (entries.a, entries.b))
    whole = sum(math.prod(shape) for shape in tuner.shapes(plan, targets).values())
    return whole - masked - masked_rows * len(tuner.masked_vectors)


def count_stored_parameters(plan: AdapterPlan, targets: Mapping[str, Shape]) -> int:
    """Number of values in the adapters' layers: as `count_parameters`, with entries that the optimizer masks."""
    return count_parameters(replace(plan, modules={**plan.modules, **plan.layers}), targets)


def native_plan(plan: AdapterPlan) -> AdapterPlan:
    """A plan with the same ΔW in this package's layers, for tuners whose ΔW is a product. Masked entries are zeros."""
    tuner = tuner_of(plan)
    modules = {
        name: a and replace(a, lora_alpha=a.lora_alpha * (tuner.scaling(a) / a.scaling), entries=None)
        for name, a in plan.modules.items()
    }
    return replace(plan, modules=modules, tuner=SPARSE_LORA, masking="compact")


def rank_settings(active: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """Ranks and scalings as PEFT's `LoraConfig` takes them: the most frequent pair, and the modules that differ."""
    (r, alpha), _ = Counter((a.r, a.lora_alpha) for a in active.values()).most_common(1)[0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: a.r for name, a in active.items() if a.r != r},
        "alpha_pattern": {name: a.lora_alpha for name, a in active.items() if a.lora_alpha != alpha},
    }
