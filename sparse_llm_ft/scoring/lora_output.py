"""The size of adapters' outputs, and which layers to keep by it (LoRA-drop, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.scoring.contracts import no_reduce


class OutputScores:
    """g_i: ‖ΔW_i x_i‖², averaged over the samples that passed through the model.

    The paper averages "over the training dataset" and does not define a sample's norm. Here x_i is all of the sample's
    input to the layer: the square is summed over its tokens (the Frobenius norm of ΔW_i X_i), and the mean is over
    samples. A mean over all tokens would divide every g_i by the same number, and y_i = g_i / Σ g would stay the same.
    Padding is ignored, and so are calls on what belongs to no sample: DeBERTa's query and key layers also project the
    embeddings of relative positions, (1, distances, d_in), one for all samples. No activations are stored.

    Run forward passes without gradients: recomputation under gradient checkpointing would count twice.

    Args:
        names: the modules to observe.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._sums: dict[str, torch.Tensor | None] = dict.fromkeys(names)
        self._masks: dict[int, torch.Tensor] = {}  # by width
        self._apart: set[str] = set()  # modules that were called on what belongs to no sample
        self._samples = 0

    def begin_batch(self, mask: torch.Tensor, *others: torch.Tensor) -> None:
        """Set the padding of the next forward pass.

        Args:
            mask: (batch, length), 1 at a token and 0 at padding; a row of zeros is no sample.
            others: the masks of further stacks (a decoder after an encoder), each of another length.
        """
        self._masks = {each.shape[1]: each != 0 for each in (mask, *others)}
        self._samples += int((mask != 0).any(1).sum())

    def observer(self, name: str) -> Callable[[torch.Tensor], None]:
        """A function to call with the adapter's scaled output: (batch, length, d_out) or (batch, d_out).

        It raises RuntimeError before the first `begin_batch`, and ConfigError if the output has another shape, such as
        that of an expert, to which some of the tokens are sent.

        Raises:
            KeyError: an unknown module.
        """
        if name not in self._sums:
            raise KeyError(f"module {name!r} is not observed")

        def observe(output: torch.Tensor) -> None:
            if not self._masks:
                raise RuntimeError("begin_batch has to come before a forward pass")
            first = next(iter(self._masks.values()))
            mask = self._masks.get(output.shape[1], first) if output.dim() == 3 else first.any(1)
            if output.shape[:-1] != mask.shape:
                if output.dim() == 3 and output.shape[0] == 1:
                    self._apart.add(name)
                    return
                raise _no_positions(name, f"{tuple(output.shape)} in a batch of shape {tuple(first.shape)}")
            squares = output.detach().float().square().sum(-1, dtype=torch.float64)
            added = torch.where(mask.to(output.device), squares, squares.new_zeros(())).sum()
            before = self._sums[name]
            self._sums[name] = added if before is None else before + added

        return observe

    def totals(self, reduce: Callable[[torch.Tensor], torch.Tensor] = no_reduce) -> dict[str, float]:
        """Collective. Module -> g_i over all samples of all ranks.

        Args:
            reduce: collective; the sum of a CPU tensor over ranks.

        Raises:
            TrainingError: no samples, or a sum that is not finite, naming the module.
            ConfigError: a module was called, and never on the positions of samples.
        """
        sums = [0.0 if value is None else float(value) for value in self._sums.values()]
        apart = [float(value is None and name in self._apart) for name, value in self._sums.items()]
        summed = reduce(torch.tensor([*sums, *apart, self._samples], dtype=torch.float64)).tolist()
        sums, apart, samples = summed[: len(sums)], summed[len(sums) : -1], summed[-1]
        if samples == 0:
            raise TrainingError("no sample went through the model, so the outputs of the adapters were not seen")
        for name, times in zip(self._sums, apart, strict=True):
            if times:
                raise _no_positions(name, "one for all samples")
        g = {name: value / samples for name, value in zip(self._sums, sums, strict=True)}
        _check(g)
        return g


def importance_by_type(g: Mapping[str, float], kind: Callable[[str], str]) -> dict[str, float]:
    """y_i = g_i / Σ g within each module type; equal shares if all g of a type are zero.

    Args:
        g: module -> mean squared norm, in the model's order.
        kind: name -> its type, such as ``q_proj``.

    Raises:
        TrainingError: a g that is not finite, naming the module.
    """
    _check(g)
    types: dict[str, list[str]] = {}
    for name in g:
        types.setdefault(kind(name), []).append(name)
    sums = {key: math.fsum(g[name] for name in names) for key, names in types.items()}
    return {
        name: value / sums[kind(name)] if sums[kind(name)] > 0 else 1 / len(types[kind(name)])
        for name, value in g.items()
    }


def select_layers(y: Mapping[str, float], threshold: float) -> list[str]:
    """The most important layers of one module type, until their shares sum to `threshold`; at least one.

    The test is that the rest's shares sum to at most 1 - T: near T = 1 the sum of the kept shares rounds to 1 long
    before small shares are added. At T = 1 every layer with a share above zero is kept.

    Args:
        y: module -> share, all modules of one type, in the model's order; among equals the earlier one comes first.
        threshold: T, above 0, at most 1.

    Returns:
        The kept modules in the model's order.

    Raises:
        TrainingError: a share that is not finite, naming the module.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"the threshold is {threshold!r}; expected more than 0, at most 1")
    _check(y)
    ordered = sorted(y, key=lambda name: -y[name])
    allowed = math.fsum(y.values()) * (1 - threshold) * (1 + 1e-9)  # 1 - 0.9 is a little less than 0.1
    count = 1
    while math.fsum(y[name] for name in ordered[count:]) > allowed:
        count += 1
    kept = set(ordered[:count])
    return [name for name in y if name in kept]


def _no_positions(name: str, shape: str) -> ConfigError:
    return ConfigError(
        "adapter.target_modules",
        f"the output of module {name!r} is {shape}, of which LoRA-drop cannot tell which sample it belongs to",
        "expected modules with one output for each position of a sample, or for each sample",
    )


def _check(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(f"the output of the adapter on module {name!r} has the squared norm {value}")
