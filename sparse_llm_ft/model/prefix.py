"""The lower part of a decoder, which computes a constant function of each sample once nothing in it is trained.

`Prefix` records the hidden states that enter a layer, or lets a forward pass begin there. The layers below are then not
called, so nothing gathers their weights. Masks, positions and rotary embeddings are computed by the model as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_llm_ft.model.architecture import base_of, model_family
from sparse_llm_ft.model.limits import longest_fixed_rotation
from sparse_llm_ft.model.multimodal import is_multimodal
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, ModuleName

_RANDOM = ("drop", "jitter", "noise")
"""Parts of the names under which models keep probabilities and sizes of what they draw in training."""

_IN_HEADS = ("classifier", "summary")


class _StandIn(nn.Module):
    """In the place of a layer. It has the layer's attributes, which a model's forward pass may read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _Recorder(_StandIn):
    """Runs the layer and keeps its hidden states (B, L, d)."""

    states: torch.Tensor
    length = 0  # of the tuple that the layer returns; 0: it returns a tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self.length = len(output) if isinstance(output, tuple) else 0
        self.states = (output[0] if self.length else output).detach()
        return output


class _PassThrough(_StandIn):
    """Returns the same hidden states (B, L, d) whatever it gets."""

    def __init__(self, layer: nn.Module, states: torch.Tensor, length: int) -> None:
        super().__init__(layer)
        self.output = (states, *[None] * (length - 1)) if length else states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Prefix:
    """The layers of a decoder below layer `lowest`.

    Args:
        model: with or without PEFT around it.
        lowest: at least 1; what is below it must be constant (`lowest_trained`, `why_not_constant`).
    """

    def __init__(self, model: nn.Module, lowest: int) -> None:
        base: Any = base_of(model)
        stack = decoder_layers(base)
        assert stack is not None and lowest >= 1
        self._layers: Any = base.get_submodule(stack)
        self.lowest = lowest
        self._length: int | None = None

    @contextmanager
    def recording(self) -> Iterator[_Recorder]:
        """A context whose one forward pass leaves `states` (B, L, d): what enters layer `lowest`."""
        place = str(self.lowest - 1)
        recorder = _Recorder(self._layers[self.lowest - 1])
        with self._replaced({place: recorder}):
            yield recorder
        self._length = recorder.length

    @contextmanager
    def starting(self, states: torch.Tensor) -> Iterator[None]:
        """A context whose forward passes begin at layer `lowest` with `states` (B, L, d). Padding may hold anything.

        There must have been a pass under `recording` before.
        """
        assert self._length is not None, "what the layers return is known from a recorded pass"
        passed = {str(i): _PassThrough(self._layers[i], states, self._length) for i in range(self.lowest)}
        with self._replaced(passed):
            yield

    @contextmanager
    def _replaced(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        own = {place: self._layers._modules[place] for place in layers}
        self._layers._modules.update(layers)
        try:
            yield
        finally:
            self._layers._modules.update(own)


def decoder_layers(model: PreTrainedModel) -> str | None:
    """Name of a decoder's list of layers; None if it has not exactly one."""
    decoder: nn.Module = model.get_decoder()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    return next(name for name, part in model.named_modules() if part is found[0]) if len(found) == 1 else None


def lowest_trained(model: nn.Module, plan: AdapterPlan) -> int | None:
    """The number of the lowest layer with an adapter, or with a module that the plan trains whole.

    Returns:
        0 also where something outside of the layers may be below them; None if no layer has any.
    """
    base: Any = base_of(model)
    stack = decoder_layers(base)
    if stack is None or FULL_MODEL in plan.trained:
        return 0
    names = (*plan.active, *plan.trained)
    inside = [parsed.number for name in names if (parsed := ModuleName.parse(name)).stack == stack]
    numbers = [number for number in inside if number is not None]
    return 0 if _beside_layers(base, stack, names) else min(numbers, default=None)


def _beside_layers(model: PreTrainedModel, stack: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that lie in the decoder and not in its layers: embeddings and projections, but norms too."""
    decoder: nn.Module = model.get_decoder()
    whole = next(name for name, part in model.named_modules() if part is decoder)
    return [n for n in names if n.startswith(f"{whole}." if whole else "") and not n.startswith(f"{stack}.")]


def why_not_constant(model: PreTrainedModel, plan: AdapterPlan, length: int) -> str | None:
    """Why the states that enter a layer of this model are no constant function of the sample; None if they are one.

    It looks at everything that can be known before a forward pass, whatever the lowest layer will be.

    Args:
        model: `empty_model` suffices.
        plan: the run's first. Its adapters do not count, since later plans may lack the lower ones.
        length: tokens of the longest sample.
    """
    kind = model.config.model_type
    if FULL_MODEL in plan.trained:
        return "the whole model is trained"
    if (family := model_family(model.config)) != "decoder":
        return f"a {kind} model is an {family}"
    if is_multimodal(model):
        return f"a {kind} model is multimodal"
    stack = decoder_layers(model)
    if stack is None:
        return f"a {kind} model has not one list of layers"
    if below := _beside_layers(model, stack, plan.trained):
        return f"{below[0]} is trained, which may lie below the layers"
    if drawn := _draws(model):
        return f"the base draws numbers in training ({drawn})"
    fixed = longest_fixed_rotation(model.config.get_text_config())
    if fixed is not None and length > fixed:
        return f"beyond {fixed} tokens, positions of a sample depend on the longest one beside it"
    return None


def _draws(model: PreTrainedModel) -> str | None:
    """What the base draws in training, such as ``attention_dropout 0.1``, from its config and its modules."""
    settings: Any = model.config.get_text_config()
    decoder: nn.Module = model.get_decoder()
    found = [("", settings.to_dict()), *((name, vars(part)) for name, part in decoder.named_modules())]
    for where, values in found:
        for name, value in values.items():
            named = any(word in name for word in _RANDOM) and not any(word in name for word in _IN_HEADS)
            if named and isinstance(value, float) and value > 0:
                return f"{where}.{name} {value}".removeprefix(".")
    for name, part in decoder.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{name} {part.p}"
    return None
