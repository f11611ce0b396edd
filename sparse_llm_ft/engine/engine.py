"""`Engine`: build DeepSpeed around a model, step it, read and write its state, tear it down.

ZeRO keeps the trained parameters' values and moments in flat float32 partitions; zero.py knows where.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from sparse_llm_ft.adapters import is_omega, trained_parameters
from sparse_llm_ft.adapters.masking import convert_moments, fill_rows, optimizer_masks, row_masks, to_compact, to_full
from sparse_llm_ft.checkpoint.state import EngineState, Moments, Tensors
from sparse_llm_ft.distributed.heartbeat import connecting
from sparse_llm_ft.engine import zero
from sparse_llm_ft.engine.flat_gradients import FlatGradients
from sparse_llm_ft.engine.settings import EngineSettings, refused_by_deepspeed
from sparse_llm_ft.engine.shards import Shards
from sparse_llm_ft.engine.tables import Tables
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.model.four_bit import release_weights
from sparse_llm_ft.optim import MOMENTS, AdapterOptimizer, Mask
from sparse_llm_ft.optim.sparse_adamw import ParamGroup
from sparse_llm_ft.plan import AdapterPlan

_TORCH_BACKEND = import_module("deepspeed.comm.torch")  # whose package has torch itself under that name


def init_distributed() -> None:
    """Collective. Join the process group that the environment describes: NCCL with a GPU, gloo without.

    Raises:
        UserError: this node has fewer GPUs than processes.
        TrainingError: the port is taken, or rank 0 does not answer there.
    """
    if torch.cuda.is_available():
        _use_own_gpu()
    # On CPUs DeepSpeed would compile an operator that only its inference calls: it needs a compiler and ninja, and a
    # process that is killed meanwhile leaves a lock behind for which every later one waits.
    with connecting(), mock.patch.object(_TORCH_BACKEND, "build_shm_op", lambda: None):
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def _use_own_gpu() -> None:
    """Compute on the GPU that has this process's number on its node.

    Raises:
        UserError: there is none. Under torchrun and deepspeed, all processes of the node raise it.
    """
    count, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_SIZE" in os.environ:  # their processes see the same GPUs
        number = int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)) - 1
    elif count == 1:  # srun --gpus-per-task=1: each process sees its own GPU as number 0
        number = 0
    if number >= count:
        raise UserError(
            f"this node has {count} GPU{'s' * (count > 1)}, and at least {number + 1} processes run here; expected one "
            "for each GPU"
        )
    if count == 1:
        os.environ["LOCAL_RANK"] = "0"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group() -> Iterator[None]:
    """Collective. Join the process group, and leave it at the end. A group that the caller has joined stays.

    It also stays after an error: leaving is a collective, and other ranks may be waiting elsewhere.
    """
    joined = not dist.is_initialized()
    if joined:
        init_distributed()
    yield
    if joined:
        dist.destroy_process_group()


class Engine:
    """DeepSpeed around a model with adapters. Every method is a collective, but for `load`.

    Args:
        plan: of the model's adapters. The optimizer applies its masks, and `state_dict` holds the entries that they
            keep. None: nothing is masked.
        masks: short parameter name -> which of its entries are trained, in place of the plan's masks. Read once, for
            this rank's shard alone, and not kept.

    Attributes:
        parameters: short name -> trained parameter.
        device: where it computes.
        norm: norm of the last update's gradients over all ranks, before clipping and without masked entries: a float64
            scalar on the device. The update was made if it is finite; otherwise nothing has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EngineSettings,
        plan: AdapterPlan | None = None,
        masks: Mapping[str, Mask] | None = None,
    ) -> None:
        self.settings = settings
        self._plan = plan
        self.parameters = trained_parameters(model)
        if masks is None:
            shapes = {name: zero.full_shape(parameter) for name, parameter in self.parameters.items()}
            masks = {} if plan is None else optimizer_masks(plan, shapes)
        # Build DeepSpeed, and remember the hooks that the model had before.
        optimizer = AdapterOptimizer(self._groups(), lr=0.0)  # the loop sets the rate before each step
        self.module = model
        if settings.zero_stage == 3:
            release_weights(model, (nn.Linear,))
            if settings.dtype == "bfloat16":
                zero.cast_unsharded(model, torch.bfloat16)
        self._model_hooks = zero.hooks(model)
        trained = sum(math.prod(zero.full_shape(parameter)) for parameter in self.parameters.values())
        with refused_by_deepspeed(settings.extra):
            self._engine, self._wrapped, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings.to_deepspeed(trained)
            )
        self.device = self._engine.device
        zero.leave_views(self._wrapped)
        self._flat = FlatGradients(self._engine) if settings.has_flat_gradients(trained) else None
        if settings.zero_stage == 3:
            zero.keep_recomputed(model)
            zero.gather_with_users(model)
            self._tables = Tables(model, lambda module: zero.remove_hooks_of(module, keep=self._model_hooks))
        # Allocate the optimizer's state where DeepSpeed has put this rank's shards.
        self._optimizer = optimizer
        self.norm = torch.tensor(math.nan)
        masters = zero.masters(self._wrapped, optimizer)
        self._shards = Shards(
            optimizer,
            masters,
            {name: zero.full_shape(parameter) for name, parameter in self.parameters.items()},
            zero.shard_slices(self._wrapped, self.parameters, masters),
            masks,
            zero.is_sharded(self._wrapped),
            self.device,
        )

    def _groups(self) -> list[ParamGroup]:
        """Parameter groups by `EngineSettings.group_of`, without empty ones, which DeepSpeed cannot take."""
        settings = self.settings
        groups: list[ParamGroup] = [
            {"name": "adapter", "algorithm": "adamw", "weight_decay": settings.weight_decay},
            {"name": "lora_B", "algorithm": "adamw", "weight_decay": settings.weight_decay},
            {"name": "whole", "algorithm": "adamw", "weight_decay": settings.weight_decay},
            {"name": "omega", "algorithm": settings.omega_algorithm, "weight_decay": 0.0},
        ]
        for group in groups:
            group["params"] = [p for name, p in self.parameters.items() if settings.group_of(name) == group["name"]]
        return [group for group in groups if group["params"]]

    def forward(self, **batch: torch.Tensor | bool) -> Any:
        """Collective at stage 3. The model's output for this rank's micro-batch."""
        return self._engine(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Collective. Accumulate gradients, which are averaged over ranks and accumulation steps."""
        with self._accumulating():
            self._engine.backward(loss)

    def forward_apart(self, **batch: torch.Tensor | bool) -> Any:
        """As `forward` at stages 0 to 2, for a loss that `torch.autograd.grad` differentiates, not `backward`."""
        return zero.forward_apart(self._engine, batch)

    def backward_given(self, gradients: list[torch.Tensor]) -> None:
        """Collective. As `backward`, with gradients that have been computed: one for each of `parameters`, in order, of
        the loss divided by the accumulation steps. Empties the list. Stages 0 to 2.
        """
        with self._accumulating():
            zero.backward_given(self._engine, gradients, list(self.parameters.values()))

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        """Collective. A context for a backward pass of DeepSpeed's."""
        if self._flat is not None:
            self._flat.begin()
        yield
        if self._flat is not None and self._engine.is_gradient_accumulation_boundary():
            self._flat.average()

    def step(self, learning_rate: float) -> None:
        """Collective. End a micro-step; the last one of an accumulation updates with `learning_rate`.

        Whether it does is decided on the device, see `norm`: no value is read here. DeepSpeed itself reads some at
        stages 0 (in bfloat16) and 3, and with ``overlap_comm``.
        """
        settings = self.settings
        rates = {
            "omega": settings.omega_lr,
            "lora_B": learning_rate * settings.lora_b_lr_factor,
            "whole": learning_rate * settings.head_lr_factor,
        }
        for group in self._optimizer.param_groups:
            group["lr"] = rates.get(group["name"], learning_rate)
        if self._engine.is_gradient_accumulation_boundary():
            self.norm = self._shards.norm(self._flat_gradients())
            self._optimizer.gradient_scale = self.clip_factor
        self._engine.step()
        self._settle()

    def discard(self) -> None:
        """Collective. End a micro-step as `step` does, but let no update come of the gradients."""
        self._optimizer.gradient_scale = None
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        """`norm` as a number; reading it waits for the device."""
        return float(self.norm)

    @property
    def clip_factor(self) -> torch.Tensor:
        """The factor on the last update's gradients that limits their norm to `max_grad_norm`: a float64 scalar on the
        device, NaN if they are not finite.
        """
        most = self.settings.max_grad_norm
        factor = (most / (self.norm + 1e-6)).clamp(max=1.0) if most else torch.ones_like(self.norm)
        return torch.where(self.norm.isfinite(), factor, math.nan)

    def gradients(self) -> Tensors:
        """Collective. The coming update's gradients before clipping: means over ranks, unsharded, float32, on the CPU.

        Call it between the last `backward` of an accumulation and its `step`.
        """
        return self._shards.gradients(self._flat_gradients())

    def _flat_gradients(self) -> list[torch.Tensor]:
        return zero.flat_gradients(self._wrapped, self._shards.masters)

    def values(self, names: Iterable[str] | None = None) -> Tensors:
        """Collective. Values of the named parameters, or of all (None): unsharded, float32, on the CPU."""
        return self._shards.read(self.parameters if names is None else names)

    def begin_read(self, names: Sequence[str]) -> Callable[[], Tensors]:
        """Collective. As `values`, but the host need not wait for the device yet: see `Shards.begin_read`."""
        return self._shards.begin_read(names)

    def moments(self) -> Moments:
        """Collective. Adam's moments of every parameter that has them: unsharded, on the CPU; 0 for masked entries."""
        keys = {name: MOMENTS[self._algorithm(name)] for name in self.parameters}
        found: dict[str, Tensors] = {name: {} for name, own in keys.items() if own}
        for key in dict.fromkeys(key for own in keys.values() for key in own):
            for name, moment in self._shards.read([name for name in found if key in keys[name]], key).items():
                found[name][key] = moment
        return found

    def optimizer_steps(self) -> dict[str, int]:
        """Updates made so far per parameter group: the count in Adam's bias correction."""
        state = self._optimizer.state
        return {group["name"]: int(state[master]["step"]) for group, master in self._shards.masters}

    def state_dict(self) -> EngineState:
        """Collective. What is trained, as a `TrainState` holds it: the kept rows and columns alone, wherever a mask is
        applied.
        """
        values, moments, plan = self.values(), self.moments(), self._plan
        if plan is not None:
            values = to_compact(plan, values)
            moments = convert_moments(moments, lambda _, part: to_compact(plan, part))
        return {"tensors": values, "moments": moments, "optimizer_steps": self.optimizer_steps()}

    def load_state_dict(self, state: EngineState) -> None:
        """Collective. Set what `state_dict` returned; a parameter or moment that it lacks keeps its value.

        Raises:
            ValueError: a name the engine does not train, or another shape.
        """
        values, moments, plan = state["tensors"], state["moments"], self._plan
        if plan is not None:
            values = to_full(plan, values)
            moments = convert_moments(moments, lambda _, part: to_full(plan, part))
            masked = row_masks(plan)
            own = self.values([name for name in masked if name in values])
            for name, kept in masked.items():
                if name in own:
                    values[name] = fill_rows(kept, values[name], own[name])
                for key, moment in moments.get(name, {}).items():
                    nothing = moment.new_zeros((kept.size, moment.shape[1]))
                    moments[name] = moments[name] | {key: fill_rows(kept, moment, nothing)}
        self.load(values, moments, state["optimizer_steps"])

    def load(
        self,
        values: Mapping[str, torch.Tensor],
        moments: Mapping[str, Tensors] | None = None,
        optimizer_steps: Mapping[str, int] | None = None,
    ) -> None:
        """Set parameters, moments and step counts; whatever is not given keeps its value (zero in a fresh engine).

        Every rank calls it with the same values, on any device; nothing is sent.

        Raises:
            ValueError: a name the engine does not train, or another shape.
        """
        unknown = [name for name in (*values, *(moments or {})) if name not in self.parameters]
        if unknown:
            raise ValueError(f"{unknown[0]} is not a trained parameter of this engine")
        self._shards.write(values)
        for name, entry in (moments or {}).items():
            for key, value in entry.items():
                self._shards.write({name: value}, key)
        zero.set_in_model(self._wrapped, self.parameters, values, self._shards.shard_slices)
        if optimizer_steps is not None:
            for group, master in self._shards.masters:
                self._optimizer.state[master]["step"].fill_(float(optimizer_steps.get(group["name"], 0)))
        self._settle()

    def _settle(self) -> None:
        """Wait for new parameters at stage 3. DeepSpeed gathers them on a stream of its own, which does not wait for
        the one that writes them; and waits for the device itself only if some parameters are persistent.
        """
        if self.settings.zero_stage == 3 and self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def gathered(self, module: nn.Module) -> AbstractContextManager[object]:
        """Collective at stage 3. A context in which every rank has `module`'s own parameters unsharded."""
        return zero.gathered(self._wrapped, module)

    def optimizer_bytes(self) -> int:
        """Collective. Bytes of optimizer state on the rank that holds the most: moments, step counts, indices of kept
        entries, and the float32 masters that exist beside the model's own parameters.
        """
        own = {id(parameter) for parameter in self.parameters.values()}
        tensors = self._shards.state_tensors() + [m for _, m in self._shards.masters if id(m) not in own]
        return self._largest(sum(t.numel() * t.element_size() for t in tensors))[0]

    def weight_bytes(self) -> tuple[int, int]:
        """Collective. Bytes of the frozen weights and of the trained ones, each on the rank that holds the most; see
        `zero.weight_bytes`.
        """
        frozen, trained = self._largest(*zero.weight_bytes(self.module))
        return frozen, trained

    def _largest(self, *sizes: int) -> list[int]:
        """Collective. Of each size the largest of all ranks."""
        found = torch.tensor(sizes, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(size) for size in found]

    def close(self) -> None:
        """Free the engine and its optimizer state. The model stays, and its frozen base is untouched."""
        if self.settings.zero_stage == 3:
            self._tables.restore()
        self._engine.destroy()
        zero.remove_hooks(self.module, keep=self._model_hooks)
        zero.detach_from_engine(self.module.parameters())
        self._optimizer.state.clear()
        self._optimizer.kept.clear()
        self._optimizer.param_groups.clear()
        del self._engine, self._wrapped, self._optimizer, self._shards, self._flat, self.parameters
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _algorithm(self, name: str) -> str:
        return self.settings.omega_algorithm if is_omega(name) else "adamw"
