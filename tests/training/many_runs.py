"""Many complete runs, each in a fork of one process that has imported everything: a run alone costs little.

    python tests/training/many_runs.py SETTINGS_JSON RESULTS_JSON

SETTINGS_JSON maps names to lists of settings trees, which are run one after the other, each in a process of its own and
of one rank. A tree with the key ``kill_after_steps`` is ended without a word after so many optimizer steps. The result
of a name is "passed", or a traceback.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from helpers.forked_ranks import import_everything

KILLED = 42


def forked(tree: dict, log: Path) -> int:
    """Exit status of one run."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.context.preflight import preflight
    from sparse_llm_ft.distributed.world import find_world, prepare_cpu
    from sparse_llm_ft.training.run import train

    status = 1
    for variable in ("RANK", "WORLD_SIZE"):  # of a world that a test before this one was in
        os.environ.pop(variable, None)
    try:
        die_after(tree.pop("kill_after_steps", None))
        world = find_world()
        prepare_cpu(world)
        config = parse_config(tree)
        train(RunContext.open(config, world, preflight(config, world)))
        status = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(status)


def die_after(steps: int | None) -> None:
    """End this process when so many optimizer steps are done, before anything is saved of the last."""
    if steps is None:
        return
    from sparse_llm_ft.training.loop import Loop

    step, done = Loop._step, 0

    def counted(self):
        nonlocal done
        result = step(self)
        done += 1
        if done == steps:
            os._exit(KILLED)
        return result

    Loop._step = counted


def one(work: tuple[str, list[dict], Path]) -> tuple[str, str]:
    name, trees, folder = work
    for tree in trees:
        log = folder / f"{name}.log"
        expected = KILLED if "kill_after_steps" in tree else 0
        status = forked(dict(tree), log)
        if status != expected:
            return name, log.read_text() if log.is_file() else f"exit status {status}"
    return name, "passed"


def main() -> None:
    import_everything()
    runs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    work = [(name, trees, results.parent) for name, trees in runs.items()]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        results.write_text(json.dumps(dict(pool.imap_unordered(one, work))))


if __name__ == "__main__":
    main()
