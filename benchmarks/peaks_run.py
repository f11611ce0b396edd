"""A run's path from loading to its second phase, with the bytes of all tensors counted on the way."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from toolkit_step import watched_loop
from torch.nn.modules.module import register_module_parameter_registration_hook
from truth_steps import most, storages
from watching import Meter

from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.engine.build import build_model, engine_settings, rebuild_model
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.live_bytes import LiveBytes
from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.planning.phases import foresee_phases


class Everything(LiveBytes):
    """Bytes of all tensors but the `ignored` ones: of those that are there, those that operations make, and those that
    come from files and that operations take. Those of the meta device have none.
    """

    def __init__(self, ignored: Mapping[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self._ignored = ignored  # alive, so that no other takes an address of theirs
        for storage in storages().values():
            self._follow(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow what the call takes, make it, and follow what it makes."""
        for tensor in torch.utils._pytree.tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __enter__(self) -> Everything:
        """Also follow parameters as modules get them, since no operation takes those that stay as they were read, and
        storages that change their size, of which operations know nothing.
        """
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            if self._alive.pop(storage._cdata, None) is not None:
                self.now -= storage.nbytes()
            made = resize(storage, size)
            self._follow(storage)
            return made

        self._stack = ExitStack()
        self._stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        handle = register_module_parameter_registration_hook(lambda *named: self._registered(named[2]))
        self._stack.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """See `__enter__`."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _registered(self, parameter: torch.Tensor | None) -> None:
        if parameter is not None:
            self._follow(parameter.untyped_storage())

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta" and storage._cdata not in self._ignored:
            super()._follow(storage)


def real_peaks(context: Any, sizes: Any, samples: Sequence[Any], world: Any) -> dict[str, int]:
    """Bytes of all tensors at the most, on the rank that has most: while the base is loaded, a state saved, a loss
    evaluated, texts generated, and the first phase replaced by the second. Collective.
    """
    found: dict[str, int] = {}
    gc.collect()
    ignored = storages()

    @contextmanager
    def watched(name: str) -> Iterator[None]:
        gc.collect()
        with Everything(ignored) as live:
            yield
        found[name] = live.peak

    config, task_mode = context.config, context.task_mode
    first, second = (foreseen.phase for foreseen in foresee_phases(context, world.size, sizes))
    settings = engine_settings(config, first, world.size)
    with watched("load"):
        model = build_model(config, task_mode, first.plan, settings.to_deepspeed(), world, context.console)
        training = TrainingConfig(max_steps=10**6, schedule="constant")
        loop = watched_loop(model, first, samples, settings, training, world, Meter())
    steps = loop.steps(at_once=lambda _: False)
    for _ in range(3):
        next(steps)

    with watched("save"), tempfile.TemporaryDirectory() as folder:
        state = TrainState(**loop.engine.state_dict(), progress=loop.progress, phase=first.to_dict())
        if world.rank == 0:
            state.save(Path(folder) / "state")
    state = state.fresh()
    evaluation, rank, size = config.evaluation, world.rank, world.size
    with watched("evaluate"):
        mean_loss(model, samples, context.objective, evaluation.micro_batch_size, rank, size)
    prompt = config.task.max_prompt_length or 3 * config.task.max_length // 4  # as the planner assumes
    prompts = [replace(s, prompt_ids=(*s.prompt_ids, *s.completion_ids)[:prompt]) for s in samples]
    with watched("generate"):
        generate(model, prompts, context.tokenizer, evaluation, rank, size, config.deepspeed.zero_stage == 3)

    state = TrainState(**loop.engine.state_dict(), progress=loop.progress, phase=first.to_dict())
    with watched("change"):
        kept = [name for name in state.tensors if name.rpartition(".")[0] in second.plan.active]
        kept = [name for name in kept if not name.endswith(".lora_omega")]
        moments = {name: state.moments[name] for name in kept}
        after = replace(state, tensors={name: state.tensors[name] for name in kept}, moments=moments)
        steps.close()
        loop.engine.close()
        del loop
        model = rebuild_model(config, model, first.plan, second.plan)
        state = replace(after, callback=None)
        engine = Engine(model, engine_settings(config, second, world.size), second.plan)
        engine.load_state_dict(state.engine_state)
    engine.close()
    return most(found)
