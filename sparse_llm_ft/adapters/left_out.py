"""Weights of a model that no adapter can go on: fused experts, which are parameters and no linear layers."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_llm_ft.adapters.targets import ALL_LINEAR, linear_modules, name_endings
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.plan import module_kind

_OTHERS = (nn.Linear, Conv1D, nn.Embedding, _ConvNd, BaseTunerLayer)
_LITTLE = 0.01


@dataclass(frozen=True)
class LeftOut:
    """Weights that no adapter can go on.

    Attributes:
        kinds: name within the layer, such as ``mlp.experts.down_proj`` -> number of values in all layers.
        share: of the weights of all layers, 0 to 1.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    share: float = 0.0

    def describe(self) -> str:
        """For people: ``mlp.experts.gate_up_proj, mlp.experts.down_proj (96% of the layers' weights)``."""
        names = list(self.kinds)
        return f"{', '.join(names[:5])}{', ...' * (len(names) > 5)} ({self.share:.0%} of the layers' weights)"


def find_left_out(model: PreTrainedModel, reached: Collection[str] | None = None) -> LeftOut:
    """The weights of matrices that are parameters of a module which is no linear layer.

    transformers keeps the experts of a layer in one parameter of three sides; DBRX stacks them in two. A matrix with a
    side that is smaller than the hidden size, such as a router's, does not count, and nor do embeddings, convolutions
    and a model that has almost no such weights.

    Args:
        reached: the modules that count (`text_modules`); None: all.
    """
    width = getattr(model.get_input_embeddings(), "embedding_dim", math.inf)
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, _OTHERS) or (reached is not None and name not in reached):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            sides = [side for side in parameter.shape if side > 1]
            if len(sides) > 2 or (len(sides) == 2 and min(sides) >= width):
                kind = module_kind(f"{name}.{own}".removeprefix("."))
                found[kind] = found.get(kind, 0) + parameter.numel()
    linear = (shape for name, shape in linear_modules(model).items() if reached is None or name in reached)
    count = sum(found.values())
    share = count / max(count + sum(map(math.prod, linear)), 1)
    return LeftOut(found, share) if share > _LITTLE else LeftOut()


def refuse_left_out(target_modules: object, left_out: LeftOut, targets: Collection[str]) -> None:
    """Refuse ``all-linear`` for a model with weights that it would leave out: it reads as all of them.

    Args:
        targets: the modules that would get adapters.

    Raises:
        ConfigError: with the list of name endings that means the same.
    """
    if target_modules == ALL_LINEAR and left_out.kinds:
        raise ConfigError(
            "adapter.target_modules",
            f"{ALL_LINEAR}, but no adapter can go on {left_out.describe()}, which are parameters and no linear layers",
            f"expected the list [{name_endings(dict.fromkeys(targets))}] to train the model without them",
        )
