"""Names of trained parameters, and conversion of trained adapters for stock PEFT and transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.adapters.parts import scatter
from sparse_llm_ft.adapters.tuners import TUNERS, rank_settings, tuner_of
from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.plan import SHARED, AdapterPlan
from sparse_llm_ft.serving.ranks import served_rank

Tensors = Mapping[str, torch.Tensor]


def trained_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters that require gradients, in the model's order, under short names without wrappers.

    ``<module>.lora_A`` (r, d_in), ``<module>.lora_B`` (d_out, r), ``<module>.lora_omega`` (1,), ``<module>.lora_u``
    (r,), ``<module>.lora_v`` (d_out,). A group's A and B appear once, as ``shared.<group>.lora_A`` and
    ``shared.<group>.lora_B``. PEFT's own tuners follow the same pattern
    (``<module>.lora_magnitude_vector``, ...). A parameter of the base has its own name.
    """
    groups = {
        name.removeprefix("base_model.model."): layer.adapters[adapter_name].group
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLoraLayer) and adapter_name in layer.adapters
    }
    names = ((short_name(name, adapter_name), p) for name, p in model.named_parameters() if p.requires_grad)
    return {_of_group(name, groups): p for name, p in names}


def short_name(name: str, adapter_name: str = "default") -> str:
    """A parameter's name in a `PeftModel` without the wrapper, the adapter name and anything after it."""
    name = name.removeprefix("base_model.model.")
    for marker in (f".{adapter_name}.", f".{adapter_name}"):
        if marker.endswith(".") and marker in name and any(f".{prefix}" in name for prefix in _prefixes()):
            return name.partition(marker)[0]
        if name.endswith(marker):
            return name.removesuffix(marker)
    return name


def _of_group(name: str, groups: Mapping[str, str | None]) -> str:
    """The name under which a group's A or B is known, whichever module it belongs to."""
    module, _, part = name.rpartition(".")
    group = groups.get(module) if part in ("lora_A", "lora_B") else None
    return name if group is None else f"{SHARED}.{group}.{part}"


def saved_name(name: str, plan: AdapterPlan) -> str:
    """Short parameter name -> its name in a saved adapter of this package's tuner."""
    if name.startswith(f"{SHARED}."):
        group, _, part = name.removeprefix(f"{SHARED}.").rpartition(".")
        name = f"{plan.groups[group][0]}.{part}"
    return tuner_of(plan).saved_name(name)


def is_omega(name: str) -> bool:
    """Whether a short parameter name belongs to an omega."""
    return name.endswith(".lora_omega")


def is_adapter(name: str) -> bool:
    """Whether a short parameter name belongs to an adapter, and not to a fully trained module of the base."""
    return name.rpartition(".")[2].startswith(_prefixes())


def _prefixes() -> tuple[str, ...]:
    return tuple({tuner.prefix for tuner in TUNERS.values()})


def to_stock_lora(
    plan: AdapterPlan, tensors: Tensors, task: str | None = "CAUSAL_LM", patterns: bool = False
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """A LoRA that PEFT loads without this package: its ``adapter_config.json`` and its tensors.

    v is folded into B and u into A, masked rows and columns are zero, and a shared pair is written for each of its
    modules. Adapters with a trained omega <= 0 are left out. Fully trained modules become ``modules_to_save``.

    All modules get one rank R, ``r = lora_alpha = R``: the form that every server scales alike (serving/rules.py). R is
    the largest rank, rounded up to what no server pads (`served_rank`); A gets rows of zeros and B columns of zeros.
    omega and the scaling are multiplied into B, with one rounding of each entry to B's own precision. ΔW is otherwise
    unchanged.

    Args:
        plan: the plan that was trained.
        tensors: short parameter name -> value, float32.
        task: PEFT's task type.
        patterns: keep each module's rank and scaling, as ``rank_pattern`` and ``alpha_pattern`` besides the most
            frequent pair; only omega is folded. No zeros are stored, but only PEFT and vLLM from 0.32 on read it.

    Raises:
        TrainingError: every adapter is off.
    """
    kept = {name: a for name, a in plan.active.items() if _omega(name, plan, tensors) > 0}
    if not kept:
        raise TrainingError("no adapter is on: every omega is 0 or negative")
    tuner, rank = tuner_of(plan), served_rank(max(adapter.r for adapter in kept.values()))
    uniform = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    config = {
        "peft_type": "LORA",
        "lora_dropout": plan.lora_dropout,
        "bias": "none",
        "target_modules": sorted(kept),
        "inference_mode": True,
        "task_type": task,
        **({**rank_settings(kept), **tuner.lora_options} if patterns else uniform),
    }
    weights = {}
    for name, adapter in kept.items():
        a, b = full_pair(name, plan, tensors)
        factor = _omega(name, plan, tensors) * (1.0 if patterns else tuner.scaling(adapter))
        zeros = 0 if patterns else rank - adapter.r
        # Copies: a shared pair is written more than once.
        weights[f"base_model.model.{name}.lora_A.weight"] = F.pad(a, (0, 0, 0, zeros)).clone()
        weights[f"base_model.model.{name}.lora_B.weight"] = F.pad((b.double() * factor).to(b.dtype), (0, zeros))
    settings, whole = saved_modules(plan, tensors)
    return config | settings, weights | whole


def saved_modules(plan: AdapterPlan, tensors: Tensors) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """PEFT's settings and tensors of what is trained beside adapters: ``modules_to_save`` for whole modules,
    ``trainable_token_indices`` for rows of embeddings, which PEFT puts in place of the base's.
    """
    whole = [name for name in plan.trained if name not in plan.rows]
    settings: dict[str, object] = {}
    if whole:
        settings["modules_to_save"] = whole
    if plan.rows:
        settings["trainable_token_indices"] = {name: list(kept.indices) for name, kept in plan.rows.items()}
    weights = {}
    for name, tensor in base_tensors(tensors).items():
        module = name.rpartition(".")[0]
        saved = f"{module}.token_adapter.trainable_tokens_delta" if module in plan.rows else name
        weights[f"base_model.model.{saved}"] = tensor
    return settings, weights


def full_pair(name: str, plan: AdapterPlan, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, d_in) and B (d_out, r) of one module, with u and v in them and zeros at masked rows and columns."""
    adapter = plan.active[name]
    a, b = _pair(name, plan, tensors)
    return scatter(a, None, adapter.cols), scatter(b, adapter.rows, None)


def _pair(name: str, plan: AdapterPlan, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """diag(u) A and diag(v) B of one module: the kept columns and rows alone."""
    owner = plan.owners[name]
    a, b = tensors[f"{owner}.lora_A"], tensors[f"{owner}.lora_B"]
    if plan.active[name].train_vectors:
        a, b = tensors[f"{name}.lora_u"][:, None] * a, tensors[f"{name}.lora_v"][:, None] * b
    return a, b


def base_tensors(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of fully trained modules, under their names in the base model."""
    return {name: tensor.contiguous() for name, tensor in tensors.items() if not is_adapter(name)}


def residual_norms(plan: AdapterPlan, tensors: Tensors) -> dict[str, float]:
    """Module -> Frobenius norm of its ΔW = omega * scaling * B A, without computing the product:
    ||B A||² = sum((BᵀB) * (A Aᵀ)). Empty for tuners whose ΔW is not that product.
    """
    tuner = tuner_of(plan)
    if not tuner.is_product:
        return {}
    norms = {}
    for name in plan.active:
        a, b = (matrix.double() for matrix in _pair(name, plan, tensors))
        product = float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
        norms[name] = max(_omega(name, plan, tensors), 0.0) * tuner.scaling(plan.active[name]) * product
    return norms


def _omega(name: str, plan: AdapterPlan, tensors: Tensors) -> float:
    trained = tensors.get(f"{name}.lora_omega")
    return float(trained) if trained is not None else plan.active[name].omega
