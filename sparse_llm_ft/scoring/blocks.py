"""The numbered layers of a model, and running it from one of them upward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparse_llm_ft.plan import ModuleName

Output = Any
"""What a block returns: a tensor, None, or a tuple or list of such."""


def layer_of(name: str) -> ModuleName | None:
    """Where a module stands; None for a name without number."""
    parsed = ModuleName.parse(name)
    return None if parsed.number is None else parsed


def group_by_block(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Block name -> its modules, blocks in the order of their first module; and the modules in no numbered layer."""
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
    """The numbered layers that hold the modules `names`, with all others of their stacks, by stack and number.

    Args:
        model: may be wrapped; then a block is found by the ending of its name.
        names: such as ``model.layers.3.self_attn.q_proj`` or ``encoder.layer.0.attention.self.query``.

    Raises:
        KeyError: the model has no such stack, or more than one.
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
    """The list gets the name of each block when it is called."""
    calls: list[str] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, args: calls.append(name)

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(recorder(name)).remove)
        yield calls


class PrefixCache:
    """What the layers below returned, so that they need not be computed again.

    It walks up in the order in which the blocks are called. Of every stack (an encoder and a decoder are two) it
    holds the output of the highest block passed, one per micro-batch, on the model's device. In `replaced` every
    block passed returns that output at once: what the lower ones return does not matter, since the next block up
    ignores its input. A model that uses a lower block's output elsewhere goes wrong; the caller has to check.

    Args:
        blocks: each is called once in a forward pass.
        batches: number of micro-batches.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], batches: int) -> None:
        self._blocks = dict(blocks)
        self._outputs: dict[str, list[Output]] = {}
        self._batches = batches
        self._passed: list[str] = []

    @property
    def passed(self) -> int:
        """Number of blocks that are not computed any more."""
        return len(self._passed)

    def advance(self, names: Sequence[str], run: Callable[[int], object]) -> bool:
        """Pass the blocks `names`, the next ones; `run(i)` runs the model on micro-batch i.

        Returns:
            False where one of them returns something that cannot be kept; then the cache is cleared.
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
                    self._outputs[stack][i] = None  # one output at a time: this micro-batch needs the old no more
        self._outputs |= fresh
        self._passed += names
        return True

    @contextmanager
    def replaced(self, batch: int) -> Iterator[None]:
        """Blocks that were passed return what they returned for micro-batch `batch`."""
        constants = {stack: _copied(outputs[batch]) for stack, outputs in self._outputs.items()}
        with ExitStack() as stack:
            for name in self._passed:
                stack.enter_context(_forward_replaced(self._blocks[name], constants[_stack_of(name)]))
            yield

    def clear(self) -> None:
        """Forget everything; whole forward passes from here on."""
        self._outputs, self._passed = {}, []


def _stack_of(name: str) -> str:
    layer = layer_of(name)
    assert layer is not None, "blocks are numbered"
    return layer.stack


@contextmanager
def _captured(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, Output]]:
    """Key -> what the block under that key returns meanwhile."""
    outputs: dict[str, Output] = {}

    def keep(key: str, output: Output) -> None:
        # A copy: the next block may change its input in place.
        outputs[key] = _copied(output) if _is_plain(output) else output

    with ExitStack() as stack:
        for key, block in blocks.items():
            handle = block.register_forward_hook(lambda _, args, output, key=key: keep(key, output))
            stack.callback(handle.remove)
        yield outputs


@contextmanager
def _forward_replaced(block: nn.Module, output: Output) -> Iterator[None]:
    # An attribute of the instance, and not a hook: hooks cannot skip the computation, and those that are there
    # (DeepSpeed's gather parameters) must go on running.
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
