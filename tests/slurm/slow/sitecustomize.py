"""On PYTHONPATH: optimizer steps take SLOW_STEP seconds longer, so that a run lasts as long on any machine.

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
            step = module.Loop._step

            def waiting(*arguments: Any) -> Any:
                time.sleep(float(os.environ["SLOW_STEP"]))
                return step(*arguments)

            module.Loop._step = waiting

        spec.loader.exec_module = slowed  # type: ignore[method-assign]
        return spec


if "SLOW_STEP" in os.environ:
    sys.meta_path.insert(0, Slow())
