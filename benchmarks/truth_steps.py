"""The bytes of a real step of the run's own loop, line by line, and what counts them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Params4bit
from toolkit_step import loop_step
from truth_cases import Case, samples_of
from watching import Communicated, GatheredBytes, Meter, tensors_of

from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.engine.build import build_model, engine_settings
from sparse_llm_ft.engine.live_bytes import LiveBytes
from sparse_llm_ft.model.architecture import base_of


def real_step(case: Case, context: Any, phase: Any, world: Any) -> dict[str, int]:
    """The bytes of a real step, of each line those of the rank that has most of it. Collective."""
    settings = engine_settings(context.config, phase, world.size)
    gc.collect()
    before = set(tensors())
    model = build_model(context.config, context.task_mode, phase.plan, settings.to_deepspeed(), world, context.console)
    meter = Meter()
    training = TrainingConfig(max_steps=10**6, schedule="constant")
    system = loop_step(model, phase, samples_of(case), settings, training, world, meter)
    for _ in range(3):  # ZeRO-3 knows the order of weights from the second step on
        system.step()
    gc.collect()
    static = {key: size for key, size in tensors().items() if key not in before}
    real = {"base": held(model, False), "adapters": held(model, True), "optimizer": system.optimizer_bytes()}
    found: dict[str, int] = {}

    @contextmanager
    def forward() -> Iterator[None]:
        there = live.now  # gradients of earlier micro-steps
        yield
        found["kept_for_backward"] = live.now - there - weights.now

    def backward() -> None:
        found["gradients"] = sum({t.untyped_storage()._cdata: nbytes(t) for t in system.gradients()}.values())
        found["gathered_weights"] = weights.peak  # before the update, which gathers what stays gathered

    meter.around_forward, meter.after_backward = forward, backward
    with ExitStack() as stack:
        counted = stack.enter_context(Communicated())
        live = stack.enter_context(LiveBytes())
        weights = stack.enter_context(GatheredBytes())
        stack.enter_context(head_watched(model, live, weights, found))
        system.step()
    peak = sum(static.values()) + live.peak
    sent = sum(counted.bytes.values()) if world.size > 1 else 0
    return most({**real, **found, "communicated": sent, "peak": peak})


def most(values: Mapping[str, int]) -> dict[str, int]:
    """The largest of all ranks' values, key by key. Collective."""
    together = torch.tensor(list(values.values()))
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return dict(zip(values, together.tolist(), strict=True))


@contextmanager
def head_watched(model: Any, live: LiveBytes, weights: GatheredBytes, found: dict[str, int]) -> Iterator[None]:
    """A context in which the output head tells by how much it lets the bytes rise, its gathered weight left out."""
    base: Any = base_of(model)
    head = base.get_output_embeddings()
    began = [0, 0]

    def before(*_: Any) -> None:
        began[:] = live.now, weights.now
        live.recent, weights.recent = live.now, weights.now

    def after(*_: Any) -> None:
        found["logits_and_loss"] = live.recent - began[0] - (weights.recent - began[1])

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors() -> dict[int, int]:
    """Bytes of every storage of a tensor that Python knows, by address."""
    return {address: storage.nbytes() for address, storage in storages().items()}


def storages() -> dict[int, torch.UntypedStorage]:
    """Every storage of a tensor that Python knows, by address."""
    kinds = (torch.Tensor, torch.nn.Parameter, Params4bit)
    known = [t for t in gc.get_objects() if type(t) in kinds and t.device.type != "meta"]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in known}


def nbytes(tensor: Any) -> int:
    """Of its whole storage."""
    return int(tensor.untyped_storage().nbytes())


def held(model: Any, trained: bool) -> int:
    """Bytes of the trained or of the frozen parameters on this rank, parts and gathered ones; of the frozen ones with
    buffers and the states of 4-bit weights.
    """
    found: list[Any] = [] if trained else list(model.buffers())
    for parameter in model.parameters():
        if parameter.requires_grad == trained:
            found += [parameter.data] + ([parameter.ds_tensor] if hasattr(parameter, "ds_id") else [])
            if not trained:
                found += tensors_of(getattr(parameter, "quant_state", None))
    return sum({t.untyped_storage()._cdata: nbytes(t) for t in found}.values())
