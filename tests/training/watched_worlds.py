"""Worlds of forked ranks, as forked_ranks makes them, that write down what they tokenise and which samples they learn.

    python tests/training/watched_worlds.py WORLDS_JSON STATUSES_JSON

A world has, beside the arguments of `run_world`, ``die_before_step``: before it, rank 0 kills itself. In the folder of
its logs each rank leaves ``encoded-RANK.txt``, a prompt a line, and ``steps-RANK.jsonl``, for each optimizer step the
rank's micro-batches: of samples, or of packs of samples, as [prompt, completion].
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from helpers.forked_ranks import import_everything, run_world


def watch(logs: Path, die_before_step: int | None) -> Callable[[int], None]:
    """What patches a rank."""

    def before(rank: int) -> None:
        from sparse_llm_ft.data.tokenization import CausalLMPreprocessor
        from sparse_llm_ft.training.loop import Loop

        encode, read = CausalLMPreprocessor.__call__, Loop._read

        def counted(self: CausalLMPreprocessor, example: Any) -> Any:
            with (logs / f"encoded-{rank}.txt").open("a") as file:
                file.write(example.prompt + "\n")
            return encode(self, example)

        def told(self: Loop, shares: Any) -> Any:
            if rank == 0 and self.progress.step + 1 == die_before_step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = read(self, shares)
            with (logs / f"steps-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([[shown(unit) for unit in micro] for micro in result[0]]) + "\n")
            return result

        CausalLMPreprocessor.__call__, Loop._read = counted, told

    return before


def shown(unit: Any) -> list[Any]:
    return [[sample.prompt_ids, sample.completion_ids] for sample in getattr(unit, "samples", (unit,))]


def main() -> None:
    worlds, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.environ["HF_DATASETS_CACHE"] = str(results.parent / "cache")
    import_everything()
    statuses = {}
    for name, world in worlds.items():
        logs = results.parent / name
        before = watch(logs, world.pop("die_before_step", None))
        try:
            statuses[name] = run_world(logs=logs, before=before, **world)
        except TimeoutError as error:
            sys.stderr.write(f"{name}: {error}\n")
            statuses[name] = []
    results.write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
