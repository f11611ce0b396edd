"""A training step on the meta device: the bytes of its tensors, and which weights it reads when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_iter

from sparse_llm_ft.adapters import add_adapters
from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.engine.fused_attention import FUSED
from sparse_llm_ft.engine.live_bytes import LiveBytes
from sparse_llm_ft.model.architecture import base_of, model_family
from sparse_llm_ft.model.head_loss import head_targets, planned_on_gpu
from sparse_llm_ft.model.layers import checkpointed_layers
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.loading import DTYPES, empty_model, enable_checkpointing
from sparse_llm_ft.model.meta_four_bit import quantize_empty
from sparse_llm_ft.plan import AdapterPlan


@dataclass(frozen=True)
class Batch:
    """The sizes of a traced micro-batch.

    Attributes:
        samples: number of sequences.
        length: tokens of each.
        supervised: positions of each that have a loss; None: all.
        masked: whether attention gets a mask: sequences are padded or packed, and the kernel takes no lengths.
    """

    samples: int
    length: int
    supervised: int | None = None
    masked: bool = False


@dataclass(frozen=True)
class Use:
    """A module begins or ends a pass through it.

    Attributes:
        kind: ``fetch`` before a pass, ``release`` behind it.
        parameters: short names of those that the module reads.
        now: bytes alive at this moment.
        peak: bytes alive at the most from here to the next use; in both, finished gradients left out.
        gradients: bytes of the gradients that are finished before the next use.
        backward: whether it belongs to the backward pass.
        again: name of the checkpointed layer that is being computed again; else empty.
        ends: name of the checkpointed layer whose backward pass ends; else empty.
    """

    kind: Literal["fetch", "release"]
    parameters: tuple[str, ...]
    now: int
    peak: int
    gradients: int = 0
    backward: bool = False
    again: str = ""
    ends: str = ""


@dataclass(frozen=True)
class StepTrace:
    """A step's bytes beside weights, gradients and optimizer state.

    Attributes:
        kept: alive between the forward and the backward pass.
        peak: the most alive at any time of both, finished gradients left out.
        head: by how much the output head's product and the loss rise above what was alive before.
        uses: every use of weights in both passes, the first one an empty one.
    """

    kept: int
    peak: int
    head: int
    uses: tuple[Use, ...]


def trace_step(
    config: ModelConfig, plan: AdapterPlan, batch: Batch, task_mode: TaskMode = CAUSAL_LM, on_gpu: bool = False
) -> StepTrace:
    """Trace a micro-batch's forward and backward pass under `plan`.

    Attention allocates what a fused kernel does, unless `attn_implementation` is ``eager``, which makes its
    heads × length² maps. Left out are what a kernel makes and frees within one operation, and a weight that ZeRO-3 has
    gathered, which `Use` tells.

    Args:
        on_gpu: whether to plan a GPU's step, whose head takes larger chunks.

    Raises:
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    model = traced_model(config, plan, task_mode)
    for parameter in model.parameters():
        if parameter.requires_grad:  # counted elsewhere
            parameter.grad = torch.empty_like(parameter)
    inputs = Inputs.of(model, batch, DTYPES[config.dtype])
    with ExitStack() as stack:
        stack.enter_context(on_the_gpu(on_gpu))
        live = stack.enter_context(LiveBytes())
        watch = stack.enter_context(_watching(model, live))
        loss = inputs.loss(model, task_mode)
        head, kept = watch.head_rise(), live.now
        watch.begin_backward()
        loss.backward()  # type: ignore[no-untyped-call]
        watch.close(live.recent)
    return StepTrace(kept, live.peak, head, tuple(watch.uses))


def traced_model(config: ModelConfig, plan: AdapterPlan, task_mode: TaskMode) -> PeftModel:
    """The model on the meta device as the run would build it."""
    plain = config.attn_implementation == "eager"
    try:
        model = empty_model(config, "eager" if plain else FUSED, task_mode)
    except KeyError as error:  # a model with a table of its own (Falcon, GPT-Neo)
        raise NotImplementedError("its attention does not use transformers' interface") from error
    nn.Module.to(model, DTYPES[config.dtype])  # transformers' own `to` has no types
    model.requires_grad_(False)
    if config.quantization != "none":
        quantize_empty(model, config)
    if config.lean == "auto":
        make_lean(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    peft_model = add_adapters(model, plan, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    for parameter in peft_model.parameters():
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(DTYPES[config.dtype])
    return peft_model.train()


@dataclass(frozen=True)
class Inputs:
    """A micro-batch's tensors on the meta device, which are there before the step.

    Attributes:
        options: of the model's forward function.
        targets: (B, P) of the P supervised positions.
        masked: see `Batch`.
    """

    options: dict[str, Any]
    targets: torch.Tensor
    masked: bool

    @classmethod
    def of(cls, model: Any, batch: Batch, dtype: torch.dtype) -> Inputs:
        """The tensors that the model's family reads."""
        tokens = torch.zeros((batch.samples, batch.length), dtype=torch.long, device="meta")
        # A complete mask, which no kernel reads: transformers would read the values of any other one, and meta tensors
        # have none.
        mask = torch.zeros((batch.samples, 1, batch.length, batch.length), dtype=dtype, device="meta")
        family, count = model_family(model.config), batch.supervised or batch.length
        if family == "encoder-decoder":
            return cls({"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}, tokens, False)
        options: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if family == "decoder":
            options["use_cache"] = False
            if count < batch.length:
                options["logits_to_keep"] = torch.zeros(count, dtype=torch.long, device="meta")
        return cls(options, tokens[:, :count].contiguous(), batch.masked)

    def loss(self, model: Any, task_mode: TaskMode) -> torch.Tensor:
        """The loss, as the run's objective computes it."""
        options = dict(self.options)
        if self.masked:  # transformers makes it of bools, once for all layers
            options["attention_mask"] = torch.empty_like(options["attention_mask"], dtype=torch.bool)
        with head_targets(self.targets):
            output = model(**options)
        logits: torch.Tensor = output.start_logits if task_mode.mode == "question_answering" else output.logits
        if not logits.ndim:  # the head has computed the loss
            return logits
        logits = logits.flatten(0, -2)  # Shape: (B * P, V), (B, outputs) or (B, length)
        return F.cross_entropy(logits.float(), self.targets.flatten()[: len(logits)], reduction="sum")


@contextmanager
def on_the_gpu(planned: bool) -> Iterator[None]:
    """A context in which the meta device stands for a GPU."""
    token = planned_on_gpu.set(planned)
    try:
        yield
    finally:
        planned_on_gpu.reset(token)


class _Watch:
    """Notes the uses of weights while a step runs."""

    def __init__(self, live: LiveBytes) -> None:
        self._live, self._before_head, self._mark = live, 0, -1
        self._backward, self._gradients = False, 0
        self._open: tuple[Literal["fetch", "release"], tuple[str, ...], int] = ("release", (), 0)
        self._of_layer = "", ""
        self.uses: list[Use] = []

    def note(
        self, kind: Literal["fetch", "release"], parameters: tuple[str, ...], layer: str = "", ends: str = ""
    ) -> None:
        self.close(self._live.recent)
        self._open = kind, parameters, self._live.now
        again = torch._C._current_graph_task_id() != -1  # a forward pass that the backward pass has asked for
        self._of_layer = layer if again else "", ends

    def close(self, peak: int) -> None:
        self.uses.append(Use(*self._open, peak, self._gradients, self._backward, *self._of_layer))
        self._live.recent = self._live.now

    def begin_backward(self) -> None:
        """The backward pass is about to begin."""
        self.note("release", ())
        self._backward = True

    def finished(self, parameter: torch.Tensor) -> None:
        """A parameter's gradient is done."""
        self._gradients += parameter.nbytes

    def begin_head(self) -> None:
        """The output head is about to run."""
        self._before_head, self._mark = self._live.now, len(self.uses)

    def head_rise(self) -> int:
        """Bytes by which the peak since `begin_head` is above what was alive then."""
        if self._mark < 0:
            return 0
        since = [use.peak for use in self.uses[self._mark :]] + [self._live.recent]
        return max(since) - self._before_head


@contextmanager
def _watching(model: PeftModel, live: LiveBytes) -> Iterator[_Watch]:
    """A context in which every module that reads weights tells when its passes begin and end."""
    watch, handles = _Watch(live), []
    base: Any = base_of(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda *_: watch.begin_head()))
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(watch.finished))
    layers = checkpointed_layers(model)
    around = {id(part): name for name, layer in layers.items() for part in layer.modules()}
    own = {id(layer): name for name, layer in layers.items()}
    for module, names in readers(model):
        handles += _tell(module, names, around.get(id(module), ""), own.get(id(module), ""), watch.note)
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def readers(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every module that is called, with the names of the parameters that it reads: its own, and a layer with adapters
    also those of the modules inside it, which it does not call.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found, inside = [], set[int]()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, SparseLoraLayer):
            parts: list[nn.Module] = [module.base_layer]
            parts += [part for adapter in module.adapters for part in module.pair(adapter)]
            own += [parameter for part in parts for parameter in part.parameters(recurse=False)]
            own += [p for kind in (module.lora_omega, module.lora_u, module.lora_v) for p in kind.parameters()]
            inside |= {id(part) for part in module.modules() if part is not module}
        if id(module) not in inside:
            found.append((module, tuple(dict.fromkeys(names[id(p)] for p in own))))
    return found


def gathered_alone(model: nn.Module) -> dict[str, bool]:
    """Weights of a traced model's frozen embeddings and output head, which ZeRO-3 gathers for one use each
    (engine/tables.py) -> whether its backward pass uses them too: the head's, unless the loss is computed in it.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    base: Any = base_of(model)
    found: dict[str, bool] = {}
    for part in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(base, part, lambda: None)()
        if not (isinstance(module, nn.Embedding) or type(module) is nn.Linear):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            again = part == "get_output_embeddings" and "forward" not in module.__dict__
            found |= {names[id(parameter)]: again for parameter in module.parameters()}
    return found


def _tell(module: nn.Module, names: tuple[str, ...], around: str, layer: str, note: Callable[..., None]) -> list[Any]:
    """Hooks that note the module's passes. Gradients arrive at its output first, and leave at its input.

    Args:
        around: name of the checkpointed layer that the module is part of; empty: none.
        layer: its own name, if it is one.
    """

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        note("fetch", names, around)
        for value in tree_iter(args):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda _: note("release", names, ends=layer))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        note("release", names, around)
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda _: note("fetch", names))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
