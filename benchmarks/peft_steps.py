"""What this toolkit is compared with, each as one training step: stock PEFT, PEFT tuned, and the base without adapters.

`gpu/speed.py` and `compare.py` share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from watching import BACKWARD, FORWARD, UPDATE, Meter

Step = Callable[[], float]
"""Makes one optimizer step, and returns its loss."""


@dataclass
class Training:
    """What every system trains on.

    Attributes:
        base: frozen, without adapters.
        tokens: (batch, length), on the base's device; no sample is padded.
        prompt: number of tokens at the start of each sample that have no loss.
        autocast: whether the forward pass of stock PEFT runs under bfloat16 autocast, as transformers' Trainer has it.
        rank, alpha: of every adapter, on all linear layers but the head.
        wrap: put around the model with its adapters, such as DistributedDataParallel.
    """

    base: PreTrainedModel
    tokens: torch.Tensor
    prompt: int
    autocast: bool
    rank: int
    alpha: int
    meter: Meter = field(default_factory=Meter)
    wrap: Callable[[Any], Any] | None = None

    @property
    def labels(self) -> torch.Tensor:
        """(batch, length): the tokens, and -100 in prompts."""
        labels = self.tokens.clone()
        labels[:, : self.prompt] = -100
        return labels

    @property
    def positions(self) -> torch.Tensor:
        """Those whose logits have a loss: position t predicts token t + 1."""
        return torch.arange(self.prompt - 1, self.tokens.shape[1] - 1, device=self.tokens.device)


@dataclass
class System:
    """A training step, and what it trains.

    Attributes:
        model: its parameters and buffers are not counted as kept for backward.
        gradients: those that exist at the end of the backward pass.
        optimizer_bytes: bytes of optimizer state on this rank, once a step has been made.
    """

    step: Step
    model: torch.nn.Module
    gradients: Callable[[], Iterable[torch.Tensor]]
    optimizer_bytes: Callable[[], int]


def _system(step: Step, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> System:
    """One whose gradients and optimizer state are where torch has them."""

    def state() -> Iterable[torch.Tensor]:
        states = [] if optimizer is None else optimizer.state.values()
        return (value for state in states for value in state.values() if torch.is_tensor(value))

    def gradients() -> Iterable[torch.Tensor]:
        return (p.grad for p in model.parameters() if p.grad is not None)

    return System(step, model, gradients, lambda: nbytes(state()))


def stock_peft(training: Training, dropout: float) -> System:
    """PEFT with LoRA's defaults, torch's AdamW, and the model's own loss over all logits."""
    model = _peft(training, dropout, autocast_adapter_dtype=True)
    autocast: AbstractContextManager[object] = nullcontext()
    if training.autocast:
        autocast = torch.autocast(training.tokens.device.type, dtype=torch.bfloat16)
    return _stepping(training, model, _own_loss(model, training), None, autocast)


def tuned_peft(training: Training, dropout: float) -> System:
    """PEFT as one who knows it sets it: adapters in the base's dtype, logits where there is a loss, foreach AdamW."""
    model = _peft(training, dropout, autocast_adapter_dtype=False)

    def loss() -> torch.Tensor:
        return _loss_where_it_counts(model, training, attention_mask=torch.ones_like(training.tokens))

    return _stepping(training, model, loss, True)


def liger_peft(training: Training, dropout: float) -> System:
    """`tuned_peft`, with Liger-Kernel's RMSNorm, SwiGLU and rotary embeddings, and its loss of all positions, which
    makes no logits. It changes transformers' Llama in this process.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=training.base)
    model = _peft(training, dropout, autocast_adapter_dtype=False)
    return _stepping(training, model, _own_loss(model, training), True)


def _own_loss(model: Any, training: Training) -> Callable[[], torch.Tensor]:
    """The model's own loss over all positions."""
    batch = {"input_ids": training.tokens, "attention_mask": torch.ones_like(training.tokens)}
    labels = training.labels
    return lambda: model(**batch, labels=labels).loss


def _stepping(
    training: Training,
    model: Any,
    loss_of: Callable[[], torch.Tensor],
    foreach: bool | None,
    autocast: AbstractContextManager[object] | None = None,
) -> System:
    """Steps of torch's AdamW on the loss, whose forward pass runs under `autocast`. A `foreach` of None is torch's own
    choice.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=foreach)
    meter = training.meter

    def step() -> float:
        with meter.part(FORWARD), autocast or nullcontext():
            loss = loss_of()
        with meter.part(BACKWARD):
            loss.backward()
        with meter.part(UPDATE):
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=foreach)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return _system(step, model, optimizer)


def bare_base(training: Training, lowest: int) -> System:
    """Forward, and backward to the input of layer `lowest`, without any adapter: the floor without caching."""
    base, meter = training.base, training.meter
    base.requires_grad_(False)
    base.train()
    layer: Any = base.get_decoder().layers[lowest]

    def require_grad(module: Any, args: tuple[torch.Tensor, ...], kwargs: Any) -> Any:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs

    layer.register_forward_pre_hook(require_grad, with_kwargs=True)

    def step() -> float:
        with meter.part(FORWARD):
            loss = _loss_where_it_counts(base, training)
        with meter.part(BACKWARD):
            loss.backward()
        return loss.item()

    return _system(step, base)


def _loss_where_it_counts(model: Any, training: Training, **inputs: torch.Tensor) -> torch.Tensor:
    """The mean loss, from the logits of supervised positions alone."""
    positions, tokens = training.positions, training.tokens
    logits = model(input_ids=tokens, logits_to_keep=positions, **inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, positions + 1].flatten())


def _peft(training: Training, dropout: float, autocast_adapter_dtype: bool) -> Any:
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(training.base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    model.train()
    return model if training.wrap is None else training.wrap(model)


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
