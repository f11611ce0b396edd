"""On PYTHONPATH. SLOW_STEP=S: optimizer steps take S seconds longer, so that a run lasts as long on any machine.
EAT_MEMORY=RANK:STEP:MIB: in its STEP-th step, that rank takes MIB mebibytes and waits to be killed.

Python imports this file when it starts. It patches the loop when that is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from types import ModuleType
from typing import Any

LOOP = "sparse_llm_ft.training.loop"


class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == LOOP else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def slowed(module: ModuleType) -> None:
            load(module)
            step, steps = module.Loop._step, 0

            def waiting(*arguments: Any) -> Any:
                nonlocal steps
                steps += 1
                time.sleep(float(os.environ.get("SLOW_STEP", "0")))
                eat(steps)
                return step(*arguments)

            module.Loop._step = waiting

        spec.loader.exec_module = slowed  # type: ignore[method-assign]
        return spec


def eat(steps: int) -> None:
    rank, step, mebibytes = (int(word) for word in os.environ.get("EAT_MEMORY", "-1:0:0").split(":"))
    if (int(os.environ["RANK"]), steps) == (rank, step):
        eaten = b"x" * (mebibytes * 2**20)
        time.sleep(60)
        del eaten


if {"SLOW_STEP", "EAT_MEMORY"} & os.environ.keys():
    sys.meta_path.insert(0, Slow())
