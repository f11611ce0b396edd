"""AdamW that keeps moments for, and changes, only the kept entries of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

ParamGroup = dict[str, Any]
"""A parameter group of torch: ``params``, and settings by name."""

FUSED = {"cuda"}
"""Device types on which one kernel updates all parameters of a group, and decides there whether it does."""


class SparseAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019; decoupled weight decay) over some of each parameter's entries.

    The arithmetic is torch's own, on the kept entries gathered into one vector. All other entries stay exactly as they
    are: no update, no weight decay. A parameter's state is allocated when the optimizer is built: ``step`` (a float32
    scalar), ``exp_avg`` and ``exp_avg_sq`` (one value per kept entry; shaped as the parameter where all are kept).
    `state_dict` holds no masks: load one into an optimizer that was built with the same masks.

    Args:
        params: parameters or parameter groups, as in any torch optimizer; parameters must be contiguous.
        kept: parameter -> its trained entries: a bool tensor of its shape, or ascending flat indices. All entries of a
            parameter that is not in it are trained.

    Raises:
        ValueError: a mask that does not fit its parameter, or belongs to none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        kept: Mapping[torch.Tensor, torch.Tensor] | None = None,
        **defaults: object,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | defaults)
        self.kept: dict[torch.Tensor, torch.Tensor] = {}
        masks = dict(kept or {})
        self._build_state(masks)
        if masks:
            raise ValueError(f"{len(masks)} masks belong to parameters that this optimizer does not have")

    def _build_state(self, masks: dict[torch.Tensor, torch.Tensor]) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                mask = masks.pop(parameter, None)
                self.allocate(parameter, None if mask is None else flat_indices(mask, parameter))

    def allocate(self, parameter: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        """Allocate zero state for `parameter` in place of what it had.

        Args:
            kept: ascending flat indices of the entries to train, int32 or int64, on its device; None: all.
        """
        self.kept.pop(parameter, None)
        if kept is not None:
            self.kept[parameter] = kept
        like = parameter if kept is None else parameter.new_empty(len(kept))
        moments = {key: torch.zeros_like(like, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        # torch's fused kernels count steps where the parameter is; its other ones wait for no device if a CPU counts.
        counted_on = parameter.device if parameter.device.type in FUSED else "cpu"
        self.state[parameter] = {"step": torch.zeros((), device=counted_on)} | moments

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; the state may come from another device."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device if parameter.device.type in FUSED else "cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the kept entries of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: ParamGroup, params: list[torch.Tensor], not_finite: torch.Tensor | None = None) -> None:
        """Update parameters of one group, which lie on one device.

        Args:
            not_finite: float32 scalar, for fused kernels: where it is 1, nothing changes.
        """
        values = [self.kept_entries(p, p) for p in params]
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            values,
            [self.kept_entries(p, p.grad) for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            fused=params[0].device.type in FUSED,
            found_inf=not_finite,
        )
        for parameter, value in zip(params, values, strict=True):
            if parameter in self.kept:
                parameter.view(-1)[self.kept[parameter]] = value

    def kept_entries(self, parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The trained entries of `values`, which is shaped as `parameter`; `values` itself where all are trained."""
        kept: torch.Tensor | None = self.kept.get(parameter)
        entries: torch.Tensor = values if kept is None else values.reshape(-1).index_select(0, kept)
        return entries


def flat_indices(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A mask in either form of `SparseAdamW` as ascending flat indices of the smallest sufficient integer type.

    Raises:
        ValueError: a mask that does not fit the parameter.
    """
    if mask.dtype == torch.bool:
        if mask.shape != parameter.shape:
            raise ValueError(f"a mask of shape {tuple(mask.shape)} for a parameter of {tuple(parameter.shape)}")
        mask = mask.flatten().nonzero().flatten()
    elif mask.dtype.is_floating_point or mask.dim() != 1:
        raise ValueError("a mask is a bool tensor of the parameter's shape, or a vector of flat indices")
    if len(mask) and not (int(mask[0]) >= 0 and int(mask[-1]) < parameter.numel() and bool((mask.diff() > 0).all())):
        raise ValueError(f"flat indices must ascend and lie in 0 to {parameter.numel() - 1}")
    return mask.to(parameter.device, index_dtype(parameter))


def index_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The smallest integer type that torch indexes with and that reaches every entry."""
    return torch.int32 if parameter.numel() < 2**31 else torch.int64
