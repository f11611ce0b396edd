"""Every method and variant of the three papers on two small models, into docs/results.md.

    python benchmarks/reproduce.py --models FOLDER --data FOLDER [--runs FOLDER] [--only NAME ...]

FOLDER of models holds ``all-minilm-l6-v2`` and ``smollm2-135m-instruct``; FOLDER of data ``glue/sst2``, ``glue/rte``
and ``glue/cola`` with GLUE's ``train.jsonl`` and ``validation.jsonl``. After a kill the same command continues: it
resumes unfinished runs and repeats no finished one.

All systems are tuned by one rule (`tuning_jobs`): the learning rate with the lowest loss on samples held out of the
training set. The tables report GLUE's own validation set.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import argument_parser

from jobs import HELD_OUT, SETTINGS, Job, Result, Setting, cpu_file, failed_file, final_jobs, tuning_jobs
from tables import write_results


def prepare_data(source: Path, target: Path, setting: Setting, task: str) -> Path:
    """The task's splits: training samples, some held out of them, and GLUE's validation set as test."""
    folder = target / setting.model / task
    if (folder / "test.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train = (source / task / "train.jsonl").read_text().splitlines(keepends=True)
    kept = train[HELD_OUT : HELD_OUT + setting.train]
    test = (source / task / "validation.jsonl").read_text().splitlines(keepends=True)
    splits = (("validation", train[:HELD_OUT]), ("train", kept), ("test", test[: setting.test]))
    for name, lines in splits:
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def train_one(settings: Mapping[str, Any], folder: Path) -> str:
    """Train the run in `folder` in this process, with its output in a file beside it. Returns a line about it."""
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.context.preflight import preflight
    from sparse_llm_ft.distributed.world import find_world, prepare_cpu
    from sparse_llm_ft.errors import TrainingError
    from sparse_llm_ft.training.run import train

    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            world = find_world()
            prepare_cpu(world)
            config = parse_config(dict(settings))
            train(RunContext.open(config, world, preflight(config, world)))
        except TrainingError as error:
            failed_file(folder).write_text(f"{error}\n")
            return f"{folder}: {error}"
        except Exception as error:
            traceback.print_exc()
            return f"{folder}: {type(error).__name__}: {str(error)[:200]} (see {log})"
        finally:  # a resumed run adds its seconds to these
            file_of_seconds = cpu_file(folder)
            before = float(file_of_seconds.read_text()) if file_of_seconds.is_file() else 0.0
            file_of_seconds.write_text(f"{before + time.process_time():.1f}\n")
    return f"{folder}"


def _train(work: tuple[Job, Path, Path, Path]) -> str:
    job, models, data, runs = work
    return train_one(job.config(models, data, runs), job.folder(runs))


def train_all(jobs: Sequence[Job], models: Path, data: Path, runs: Path, processes: int) -> bool:
    """Train what is not finished, each run in a fork of this process. Returns whether all runs succeeded."""
    left = [job for job in jobs if Result.read(job.folder(runs)) is None]
    if not left:
        return True
    prepared: dict[tuple[str, str], Path] = {}
    for job in left:
        key = (job.setting.model, job.task)
        prepared.setdefault(key, prepare_data(data, runs / "data", job.setting, job.task))
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        work = [(job, models, prepared[job.setting.model, job.task], runs) for job in left]
        for i, line in enumerate(pool.imap_unordered(_train, work), 1):
            print(f"{i}/{len(left)} {line}", flush=True)
    return all(Result.read(job.folder(runs)) for job in left)


def main() -> None:
    """Tune, train, and write the tables."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--only", nargs="+", choices=[setting.model for setting in SETTINGS])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.processes)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import sparse_llm_ft.training.run  # noqa: F401  (once, before the forks)

    complete = True
    for setting in SETTINGS:
        if options.only and setting.model not in options.only:
            continue
        train = partial(
            train_all, models=options.models, data=options.data, runs=options.runs, processes=options.processes
        )
        while (jobs := tuning_jobs(setting, options.runs)) and train(jobs):
            pass
        complete &= train(list(final_jobs(setting, options.runs))) and not jobs  # of systems with a known rate
        write_results(SETTINGS, options.runs, options.output)
    sys.exit(0 if complete else "some runs failed; what is finished is in the tables")


if __name__ == "__main__":
    main()
