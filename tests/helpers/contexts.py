"""Runs opened as the commands open them."""

from __future__ import annotations

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.context.preflight import preflight
from sparse_llm_ft.distributed.world import ONE_PROCESS, World


def open_context(config: RunConfig, world: World = ONE_PROCESS) -> RunContext:
    return RunContext.open(config, world, preflight(config, world))
