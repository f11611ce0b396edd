"""What a training step costs, in floating-point operations of matrix products, by where its lowest adapter lies.

A step runs forward through all layers, and backward from the head down to the lowest layer with something to train: of
the frozen layers below nothing is kept, and no gradient goes there. A frozen weight costs 2 operations per value and
token in each direction, since it has no gradient of its own. Attention costs 4 per token, width and position in sight
forward, and twice that backward. A value of A or B costs 6: forward, for its input's gradient, and for its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_llm_ft.plan import AdapterPlan, ModuleName, Shape


def step_flops(forward: Sequence[float], backward: Sequence[float], head: float, lowest: int, adapters: float) -> float:
    """Operations of a step.

    Args:
        forward, backward: of each layer, from the lowest up.
        head: of what follows the layers, forward; its backward costs the same.
        lowest: index of the lowest layer with something to train; the number of layers if only the head has it.
        adapters: of the adapters in both directions.
    """
    return sum(forward) + sum(backward[lowest:]) + 2 * head + adapters


@dataclass(frozen=True)
class StepCost:
    """A base's arithmetic, for one sample of the run's greatest length in which every position has a loss.

    Samples are shorter, and fewer positions may have a loss. The head then costs less, and the share of a step that
    remains without low adapters is smaller than computed here.

    Attributes:
        layers: names of the layers that hold adapters or could, from the lowest up.
        depths: module -> index of its layer; 0 for what comes before all layers, their number for what comes behind.
        forward, backward: operations of each layer.
        head: operations of the output embeddings, forward.
        tokens: of a sample in each layer.
    """

    layers: tuple[str, ...]
    depths: Mapping[str, int]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    head: float
    tokens: tuple[int, ...]

    def adapters(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> dict[str, float]:
        """Operations of each adapter of the plan in both directions, in the model's order."""
        found = {}
        for name, adapter in plan.active.items():
            at = min(self.depths[name], len(self.layers) - 1)
            found[name] = 6.0 * adapter.matrices(targets[name]) * (self.tokens[at] if self.tokens else 1)
        return found

    def lowest(self, trained: Iterable[str]) -> int:
        """Index of the lowest layer that one of these modules is in; their number for no module."""
        return min((self.depths[name] for name in trained), default=len(self.layers))

    def step(self, lowest: int, adapters: float) -> float:
        """Operations of a step, see `step_flops`."""
        return step_flops(self.forward, self.backward, self.head, lowest, adapters)

    def of(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> float:
        """Operations of a step that trains this plan."""
        return self.step(self.lowest((*plan.active, *plan.trained)), sum(self.adapters(plan, targets).values()))

    def layer(self, index: int) -> str:
        """For people: a layer's name."""
        return self.layers[index] if index < len(self.layers) else "the head"


def step_cost(model: Any, targets: Collection[str], length: int, encoder_length: int) -> StepCost:
    """A base's arithmetic from its weights' shapes.

    Layers are the numbered ones of the stacks that hold a target, in the model's order: an encoder's come before its
    decoder's, through which its gradients pass. Of experts, as many count as work on a token.

    Args:
        model: a transformers model, which may be on the meta device.
        targets: names of the modules that get adapters.
        length: tokens of a sample; in an encoder-decoder those of the decoder.
        encoder_length: tokens that an encoder-decoder's encoder reads.
    """
    from torch import nn

    from sparse_llm_ft.model.architecture import model_family

    stacks = {parts.stack for name in targets if (parts := ModuleName.parse(name)).number is not None}
    blocks: dict[str, int] = {}
    depths: dict[str, int] = {}
    weights: list[float] = []
    share = _working_experts(model.config.get_text_config())
    for name, module in model.named_modules():
        parts = ModuleName.parse(name)
        if parts.number is None or parts.stack not in stacks:
            depths[name] = len(blocks)
            continue
        at = depths[name] = blocks.setdefault(parts.block, len(blocks))
        weights += [0.0] * (at + 1 - len(weights))
        own = [] if isinstance(module, nn.Embedding) else module.parameters(recurse=False)
        count = sum(weight.numel() for weight in own if weight.ndim > 1)
        weights[at] += count * (share if "experts" in name.split(".") else 1.0)

    family, settings = model_family(model.config), model.config.get_text_config()
    width = _attention_width(settings)
    tokens, attention = [], []
    for block in blocks:
        if family == "encoder-decoder" and "encoder" in block.split("."):
            tokens.append(encoder_length)
            attention.append(4.0 * width * encoder_length)
        elif family == "encoder":
            tokens.append(length)
            attention.append(4.0 * width * length)
        else:  # a position sees those before it: half of them on average
            tokens.append(length)
            seen = encoder_length if family == "encoder-decoder" else 0
            attention.append(2.0 * width * length + 4.0 * width * seen)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return StepCost(
        tuple(blocks),
        depths,
        tuple(t * (2 * w + a) for t, w, a in zip(tokens, weights, attention, strict=True)),
        tuple(t * (2 * w + 2 * a) for t, w, a in zip(tokens, weights, attention, strict=True)),
        0.0 if output is None else 2.0 * output.weight.numel() * length,
        tuple(tokens),
    )


def _attention_width(settings: Any) -> int:
    """Heads times their size; 0 for a model that has none, or others in each layer."""
    heads, size = (getattr(settings, name, None) for name in ("num_attention_heads", "head_dim"))
    if not isinstance(heads, int) or heads < 1:
        return 0
    return heads * size if isinstance(size, int) else int(settings.hidden_size)


def _working_experts(settings: Any) -> float:
    """The share of a layer's experts that work on a token; 1 for a model without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(settings, name, None))), None)
    working = getattr(settings, "num_experts_per_tok", None)
    return working / experts if experts and working else 1.0
