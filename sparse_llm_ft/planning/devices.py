"""The device that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_llm_ft.config import RunConfig


@dataclass(frozen=True)
class Device:
    """What each process of a run computes on.

    Attributes:
        memory: bytes that the process may use; None: not known.
        is_gpu: else the process computes on a CPU.
        source: where `memory` comes from, for errors.
    """

    memory: int | None
    is_gpu: bool
    source: str = ""

    @property
    def noun(self) -> str:
        """For people: ``GPU`` or ``process``."""
        return "GPU" if self.is_gpu else "process"


def planned_device(config: RunConfig, gpu_memory: int | None = None, is_gpu: bool | None = None) -> Device:
    """The device of a run with these settings, which may run on another machine.

    Args:
        gpu_memory: bytes of a GPU, typed by the user; None: ``training.device_memory``, or that of this process's GPU.
        is_gpu: whether the run will have GPUs; None: if `gpu_memory` is given, or this process has one.
    """
    here = torch.cuda.is_available()
    if is_gpu is None:
        is_gpu = here or gpu_memory is not None
    if gpu_memory is not None:
        return Device(gpu_memory, is_gpu, "--gpu-memory")
    if config.training.device_memory is not None:
        return Device(config.training.device_memory, is_gpu, "training.device_memory")
    if here and is_gpu:
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Device(memory, is_gpu, "this machine's GPU of")
    return Device(None, is_gpu)
