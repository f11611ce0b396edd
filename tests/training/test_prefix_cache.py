"""The prefix cache in a loop of one process: losses, which layers run, limits, packing, disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from helpers.tiny_models import llama, randomize
from sparse_llm_ft.adapters import add_adapters, find_targets, trained_parameters
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.data.packing import PackedDataset
from sparse_llm_ft.data.samples import Sample
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.objectives.language_modeling import CompletionObjective
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import uniform_plan
from sparse_llm_ft.training import prefix_store
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.prefix_cache import open_prefix
from sparse_llm_ft.training.prefix_store import keep_only
from sparse_llm_ft.training.read_ahead import ReadAhead
from sparse_llm_ft.training.schedule import Schedule

pytestmark = pytest.mark.usefixtures("process_group")
LAYERS, LOWEST = 4, 2
SAMPLES = [
    Sample(tuple(3 + (i * j) % 50 for j in range(1, 4 + i % 5)), (*(4 + (i + j) % 40 for j in range(1 + i % 3)), 2))
    for i in range(10)
]


class PlainEngine:
    """An engine of torch alone: SGD after every two micro-batches."""

    def __init__(self, model: torch.nn.Module, dtype: str) -> None:
        self.module, self.parameters = model, trained_parameters(model)
        self.settings = SimpleNamespace(zero_stage=0, dtype=dtype)
        self.norm, self._micro = torch.tensor(1.0), 0

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / 2).backward()

    def step(self, learning_rate: float) -> None:
        self._micro += 1
        if self._micro % 2:
            return
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter -= learning_rate * parameter.grad
        self.module.zero_grad()


class Run:
    """Losses of a loop, calls of every layer by step, and what was logged."""

    def __init__(self, mode: str, steps: int = 10, **options: Any) -> None:
        samples, dtype = options.get("samples", SAMPLES), options.get("dtype", "float32")
        base = llama(LAYERS).to(getattr(torch, dtype)).requires_grad_(False)
        options.get("change", lambda base: None)(base)
        plan = uniform_plan(find_targets(base, "all-linear"), 4, 8, lora_dropout=0.3)
        lowest = options.get("lowest", LOWEST)
        plan = replace(
            plan, modules={n: a if int(n.split(".")[2]) >= lowest else None for n, a in plan.modules.items()}
        )
        torch.manual_seed(0)
        model = add_adapters(base, plan)
        model.to(getattr(torch, dtype))
        randomize(model)
        self.calls: list[list[int]] = []
        for i, layer in enumerate(base.model.layers):
            layer.register_forward_hook(self._counter(i))
        training = TrainingConfig(
            max_steps=options.get("max_steps", steps),
            global_batch_size=4,
            micro_batch_size=2,
            learning_rate=0.05,
            schedule="constant",
            prefix_cache=mode,
            prefix_cache_bytes=options.get("limit", 2**30),
        )
        phase = Phase("train", plan, steps=options.get("phase_steps")).with_batch(2, 4)
        objective = CompletionObjective(0, True, packs_in_one_row=options.get("in_one_row", False))
        schedule, progress = Schedule(training, len(samples)), options.get("progress") or Progress()
        engine: Any = PlainEngine(model, dtype)
        self.loop = Loop(engine, phase, None, samples, objective, schedule, progress, World(0, 1, 0, 1), 3, 0)
        self.said: list[str] = []
        folder = options.get("folder")
        self.loop.prefix = open_prefix(self.loop, training, self.said.append, folder and (lambda lowest: folder))
        self.losses, self.cached = [], []
        for _, step in zip(range(steps), self._steps(), strict=False):
            self.losses.append(step.loss)
            self.cached.append(step.cached_samples)

    def _steps(self) -> Any:
        steps = self.loop.steps()
        while True:
            self.calls.append([0] * LAYERS)
            yield next(steps)

    def _counter(self, layer: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            self.calls[-1][layer] += 1

        return count


def close(found: list[float], expected: list[float], relative: float = 1e-6) -> None:
    assert len(found) == len(expected)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert worst <= relative, worst
    assert len(set(expected)) == len(expected), "nothing is learned: the comparison shows nothing"


def test_the_losses_are_those_without_and_later_epochs_run_no_lower_layer() -> None:
    """10 samples, 4 a step: the fifth micro-batch ends the first epoch. Dropout draws the same."""
    expected, run = Run("off"), Run("memory")
    close(run.losses, expected.losses)
    assert expected.calls[:10] == [[2] * LAYERS] * 10 and expected.cached == [None] * 10
    assert run.calls[0] == [2, 2, 3, 3]  # the first micro-batch goes both ways
    assert run.cached[3:] == [4] * 7
    assert run.calls[3:10] == [[0, 0, 2, 2]] * 7
    assert "layers 0 to 1 run once for a sample" in run.said[0]


def test_states_are_read_while_the_micro_batch_before_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all are known, every micro-batch finds its states begun by the one before, across steps too."""
    waits: list[bool] = []
    take = ReadAhead.take

    def watched(reader: ReadAhead, samples: Any) -> torch.Tensor:
        waits.append(tuple(samples) not in reader._begun)
        return take(reader, samples)

    monkeypatch.setattr(ReadAhead, "take", watched)
    run = Run("memory", steps=10)
    assert waits == [False] * 14  # the first six micro-batches have a new sample
    assert run.loop.prefix._reader is None  # the steps have ended, and with them the thread


def test_with_activation_checkpointing_too() -> None:
    def checkpointed(base: Any) -> None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    run = Run("memory", change=checkpointed)
    close(run.losses, Run("off").losses)
    assert [calls[:2] for calls in run.calls[3:10]] == [[0, 0]] * 7


def test_bfloat16_and_packing_and_packs_in_one_row() -> None:
    close(Run("memory", dtype="bfloat16").losses, Run("off", dtype="bfloat16").losses, 1e-2)
    packs = PackedDataset(SAMPLES, [sample.length for sample in SAMPLES], 16)
    assert 4 < len(packs) < len(SAMPLES)
    run = Run("memory", samples=packs)
    close(run.losses, Run("off", samples=packs).losses)
    assert run.calls[9] == [0, 0, 2, 2]
    # Flash attention takes packs in one row; other kernels separate their samples by positions there, too.
    one_row = Run("memory", samples=packs, in_one_row=True)
    assert one_row.calls[9] == [0, 0, 2, 2]
    prefix = run.loop.prefix
    for pack in range(len(packs)):
        kept, same = prefix._store[pack], one_row.loop.prefix._store[pack]
        assert kept.shape == (packs[pack].length, 32) and torch.allclose(kept, same, atol=1e-5)


def test_beyond_the_limit_samples_are_computed_as_usual() -> None:
    row = 32 * 4
    limit = sum(sample.length for sample in SAMPLES) * row // 2
    run = Run("memory", limit=limit, steps=30)
    close(run.losses, Run("off", steps=30).losses)
    assert run.loop.prefix._used == [sum(t.numel() * 4 for t in run.loop.prefix._store._rows.values())]
    assert limit - 9 * row < run.loop.prefix._used[0] <= limit
    assert any(run.cached) and any(calls[0] for calls in run.calls[10:30])
    assert "prefix_cache_bytes holds 50 %" in run.said[0]


def test_states_on_disk_are_read_again_and_damaged_ones_computed_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prefix_store, "SHARD_BYTES", 3000)
    folder = tmp_path / "cache" / "states"
    expected, run = Run("off"), Run("disk", folder=folder)
    close(run.losses, expected.losses)
    assert run.calls[9] == [0, 0, 2, 2]
    run.loop.prefix.flush()
    files = sorted(folder.glob("rank-0-*"))
    assert len(files) >= 2 and not run.loop.prefix._store._rows
    names = [name for file in files for name in safe_open(file / "states.safetensors", "pt").keys()]  # noqa: SIM118
    assert sorted(map(int, names)) == list(range(10))
    # A resumed run: one epoch is left, and the states are there.
    again = Run("disk", steps=2, folder=folder)
    close(again.losses, expected.losses[:2])
    assert again.calls[0] == [1, 1, 3, 3] and again.calls[1] == [0, 0, 2, 2] and again.cached == [2, 4]
    # A damaged file.
    states = files[0] / "states.safetensors"
    states.write_bytes(states.read_bytes()[:-1] + b"x")
    damaged = Run("disk", folder=folder)
    close(damaged.losses, expected.losses)
    assert any("cannot be used and are computed anew" in line for line in damaged.said)
    keep_only(folder.parent, "other")
    assert not folder.exists()


def test_where_it_does_not_pay_a_line_says_so() -> None:
    assert Run("memory", steps=1, max_steps=2).said == [
        "training.prefix_cache does not pay in phase train: at most one epoch is left of it"
    ]
    assert "at most one epoch" in Run("memory", steps=1, phase_steps=2, max_steps=20).said[0]
    run = Run("memory", steps=1, lowest=0)
    assert run.said == ["training.prefix_cache does nothing in phase train: layer 0 has an adapter"]
    assert run.cached == [None]


def test_a_model_whose_upper_layers_take_more_from_below_is_refused() -> None:
    """Its third layer adds what the first one has put aside, as models with shared keys and values do."""

    def share(base: torch.nn.Module) -> None:
        aside: list[torch.Tensor] = [torch.zeros(())]
        first, third = base.model.layers[0], base.model.layers[2]
        first.register_forward_hook(lambda layer, args, output: aside.__setitem__(0, output.detach().mean()))
        third.register_forward_hook(lambda layer, args, output: output * (1 + aside.pop()) if aside else output)

    with pytest.raises(ConfigError, match=r"training.prefix_cache: the loss changes by .* take more from the lower"):
        Run("memory", change=share)
