"""A model's numbered layers, and a cache to run it from one of them upward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import nn

from sparse_llm_ft.plan import ModuleName

Output: TypeAlias = object
"""What a block returns: a tensor, None, or a tuple or list of such."""


def layer_of(name: str) -> ModuleName | None:
    """The parts of a module's name; None for a name without a number."""
    parsed = ModuleName.parse(name)
    return None if parsed.number is None else parsed


def group_by_block(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Block name -> its modules, in the order of the blocks' first modules; and the modules in no numbered layer."""
    groups: dict[str, list[str]] = {}
    rest = []
    for name in names:
        layer = layer_of(name)
        if layer is None:
            rest.append(name)
        else:
            groups.setdefault(layer.block, []).append(name)
    return groups, rest


def find_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Every numbered layer of the stacks that hold the modules `names`, ordered by stack and number.

    Args:
        model: may be wrapped; then blocks are found by the ending of their names.
        names: such as ``model.layers.3.self_attn.q_proj`` or ``encoder.layer.0.attention.self.query``.

    Raises:
        KeyError: the model has no such stack, or several.
    """
    stacks = dict.fromkeys(layer.stack for layer in map(layer_of, names) if layer is not None)
    blocks = {}
    for stack in stacks:
        container = _submodule(model, stack)
        numbered = {int(key): child for key, child in container.named_children() if key.isdecimal()}
        for number in sorted(numbered):
            blocks[ModuleName(stack, number, "").block] = numbered[number]
    return blocks


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    found = [module for key, module in modules.items() if key.endswith("." + name)]
    if len(found) != 1:
        raise KeyError(f"the model has {len(found)} modules whose names end in {name!r}; one is needed")
    return found[0]


@contextmanager
def recorded_calls(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """A context with a list, to which each block's name is appended when the block is called."""
    calls: list[str] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, args: calls.append(name)

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(recorder(name)).remove)
        yield calls


class PrefixCache:
    """Outputs of the lower layers, so that they need not be computed again.

    The cache moves up in the order in which blocks are called. For every stack (encoder and decoder are two) it holds
    the output of the highest block passed, one per micro-batch, on the model's device. In `replaced` every block passed
    returns this output at once. The lower blocks' outputs do not matter, because the next block passed ignores its
    input. A model that uses a lower block's output elsewhere computes wrong results; the caller must check that.

    Args:
        blocks: each is called once per forward pass.
        batches: number of micro-batches.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], batches: int) -> None:
        self._blocks = dict(blocks)
        self._outputs: dict[str, list[Output]] = {}
        self._batches = batches
        self._passed: list[str] = []

    def advance(self, names: Sequence[str], run: Callable[[int], object]) -> bool:
        """Pass the next blocks, `names`; `run(i)` runs the model on micro-batch i.

        Returns:
            False if a block's output cannot be cached; then the cache is cleared.
        """
        highest = {_stack_of(name): self._blocks[name] for name in names}
        fresh: dict[str, list[Output]] = {stack: [] for stack in highest}
        for i in range(self._batches):
            with self.replaced(i), _captured(highest) as outputs:
                run(i)
            if not all(_is_plain(output) for output in outputs.values()):
                self.clear()
                return False
            for stack, output in outputs.items():
                fresh[stack].append(output)
                if stack in self._outputs:
                    self._outputs[stack][i] = None  # this micro-batch no longer needs the old one: free it
        self._outputs |= fresh
        self._passed += names
        return True

    @contextmanager
    def replaced(self, batch: int) -> Iterator[None]:
        """A context in which the blocks passed return their outputs for micro-batch `batch`."""
        constants = {stack: _copied(outputs[batch]) for stack, outputs in self._outputs.items()}
        with ExitStack() as stack:
            for name in self._passed:
                stack.enter_context(_forward_replaced(self._blocks[name], constants[_stack_of(name)]))
            yield

    def clear(self) -> None:
        """Empty the cache: forward passes are complete from here on."""
        self._outputs, self._passed = {}, []


def _stack_of(name: str) -> str:
    layer = layer_of(name)
    assert layer is not None, "blocks are numbered"
    return layer.stack


@contextmanager
def _captured(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, Output]]:
    """A context with a dict that collects each block's output under the block's key."""
    outputs: dict[str, Output] = {}

    def keep(key: str, output: Output) -> None:
        # A copy, because the next block may change its input in place.
        outputs[key] = _copied(output) if _is_plain(output) else output

    with ExitStack() as stack:
        for key, block in blocks.items():
            handle = block.register_forward_hook(lambda _, args, output, key=key: keep(key, output))
            stack.callback(handle.remove)
        yield outputs


@contextmanager
def _forward_replaced(block: nn.Module, output: Output) -> Iterator[None]:
    # An attribute of the instance, not a hook: hooks cannot skip the computation, and the present ones (DeepSpeed's
    # gather parameters) must continue to run.
    own = vars(block)
    before = own.get("forward")
    own["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _is_plain(output: Output) -> bool:
    if isinstance(output, tuple | list) and type(output) in (tuple, list):
        return all(_is_plain(item) for item in output)
    return output is None or isinstance(output, torch.Tensor)


def _copied(output: Output) -> Output:
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, Sequence):
        return type(output)(map(_copied, output))  # type: ignore[call-arg]
    return output
