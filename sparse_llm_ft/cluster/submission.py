"""`Submission`: the runs of one `submit`, their files, and the jobs that run them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_llm_ft.cluster import slurm
from sparse_llm_ft.cluster.batch_script import (
    CONFIG_NAME,
    SCRIPT_NAME,
    JobOptions,
    cache_folders,
    check_path,
    render,
    runs_name,
)
from sparse_llm_ft.cluster.job_folder import allow_attempts, write_jobs
from sparse_llm_ft.cluster.state import read_or_renew
from sparse_llm_ft.cluster.status import view_runs
from sparse_llm_ft.config import RunConfig, dump_config
from sparse_llm_ft.config.types import is_there
from sparse_llm_ft.errors import ConfigError, UserError, reaching
from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.run_folder import JOB_FOLDER, RunFolder


@dataclass
class Submission:
    """One run, or the runs of a sweep.

    Args:
        folder: the run's output_dir, or the sweep's, which holds its runs' folders; absolute.
        runs: the settings of each run, with absolute output_dirs.
        is_sweep: whether the runs are an array's tasks.

    Attributes:
        skipped: runs of a sweep that are complete already.
        mark: of this submission; its jobs carry it, and the run folders say which one is the last.
        warnings: what went wrong after Slurm had taken the jobs, one line each.
    """

    folder: Path
    runs: list[RunConfig]
    options: JobOptions
    is_sweep: bool
    skipped: list[Path] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    warnings: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse runs that could not be resumed, that are in a job already, or that are complete.

        Raises:
            UserError: naming the run.
        """
        check_path(self.folder)
        if self.is_sweep and RunFolder(self.folder).has_config():
            raise ConfigError("output_dir", f"{str(self.folder)!r} holds a run", "expected a folder for a sweep's runs")
        for config in self.runs:
            check_path(Path(config.output_dir))
            if config.resume == "never":
                raise ConfigError("resume", "never, but a job that is requeued continues its run", "expected auto")
        with reaching("output_dir"):
            self._check_runs()

    def _check_runs(self) -> None:
        """Leave out complete runs, and refuse those that are in a job already.

        Raises:
            ConfigError: naming the run.
        """
        views = view_runs([RunFolder(config.output_dir) for config in self.runs])
        for view in views:
            if view.is_alive and view.state is not None:
                where = f"job {view.job_id}" if view.job_id else view.state.host
                raise ConfigError(
                    "output_dir",
                    f"the run in {str(view.folder.path)!r} is {view.word} ({where})",
                    "wait for it, or `sparse-llm-ft cancel` it",
                )
        self.skipped = [view.folder.path for view in views if view.folder.is_complete()]
        self.runs = [config for config in self.runs if Path(config.output_dir) not in self.skipped]
        if not self.runs:
            raise ConfigError("output_dir", f"{str(self.folder)!r} is complete", "expected another folder")

    @property
    def tasks(self) -> int:
        """Of the array; 0: a single run."""
        return len(self.runs) if self.is_sweep else 0

    def script(self, mark: str = "") -> str:
        """The batch script.

        Args:
            mark: empty: for somebody who submits it by hand, at any time.
        """
        runs = self.runs if self.options.container is not None else []
        seen = [path for config in runs for path in _local_paths(config.model_dump(mode="json"))]
        below = (path for path in seen if not path.is_relative_to(self.folder))
        return render(
            self.options, self.folder, self.tasks, [self.folder, *below], runs_name(self._run_folders()), mark
        )

    def _run_folders(self) -> str:
        """Of a sweep, one a line: a task reads the one of its number."""
        return "".join(f"{config.output_dir}\n" for config in self.runs)

    def submit(self) -> list[str]:
        """Write the jobs' files, submit, and let the run folders say "pending"; returns the jobs' ids.

        Raises:
            UserError: a file cannot be written, or Slurm refuses a job; then none is left in its queue.
        """
        job = self.folder / JOB_FOLDER
        script = job / SCRIPT_NAME
        try:
            write_file(script, self.script(self.mark))
            script.chmod(script.stat().st_mode | 0o111)
            for cache in cache_folders() if self.options.container is not None else ():
                cache.mkdir(parents=True, exist_ok=True)  # pyxis mounts only what exists
            if self.is_sweep:
                write_file(job / runs_name(self._run_folders()), self._run_folders())
            for config in self.runs:
                folder = RunFolder(config.output_dir)
                write_file(folder.job / CONFIG_NAME, dump_config(config))
                allow_attempts(folder, self.mark)
        except OSError as error:
            raise UserError(f"{job}: cannot be written ({error.strerror})") from None
        jobs = self._submit_all(script)
        for number, config in enumerate(self.runs):
            folder, own = RunFolder(config.output_dir), [f"{job}_{number}" if self.is_sweep else job for job in jobs]
            try:
                write_jobs(folder, own)
                _mark_pending(folder.path, own[0])
            except (OSError, UserError) as error:  # the jobs are in the queue, and say so themselves when they begin
                self.warnings.append(f"{config.output_dir}: does not say yet that it is pending ({error})")
        return jobs

    def _submit_all(self, script: Path) -> list[str]:
        """Submit the jobs of a chain, each after the one before, or the only job.

        Raises:
            UserError: Slurm refuses one; those before it are cancelled.
        """
        jobs: list[str] = []
        try:
            for _ in range(max(1, self.options.chain)):
                after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
                jobs.append(slurm.submit(script, after))
        except UserError as error:
            if not jobs:
                raise
            try:
                for job in reversed(jobs):  # else one would begin when the one before it is cancelled
                    slurm.cancel(job)
            except UserError as other:
                raise UserError(f"{error}; its first jobs are left: scancel {' '.join(jobs)} ({other})") from None
            raise UserError(
                f"{error}; the {len(jobs)} jobs before it are cancelled, expected a shorter --chain"
            ) from None
        return jobs

    def next_steps(self, jobs: Sequence[str]) -> list[str]:
        """Lines about the jobs, and what to type next."""
        what = f"array {jobs[0]} of {self.tasks} runs" if self.is_sweep else f"job {jobs[0]}"
        chain = f", then {', '.join(jobs[1:])}" if jobs[1:] else ""
        size = f"{self.options.nodes} x {self.options.tasks_per_node} processes"
        lines = [f"submitted {what} ({size}, {self.options.time}){chain}"]
        lines += [f"left out, complete: {path}" for path in self.skipped]
        lines += [f"warning: {text}" for text in self.warnings]
        name = f"{jobs[0]}_*.log" if self.is_sweep else f"{jobs[0]}.log"
        stop = f"scancel {' '.join(jobs)}" if self.is_sweep else f"sparse-llm-ft cancel {self.folder}"
        lines += [
            f"log:     tail -F {self.folder / JOB_FOLDER / name}",
            f"state:   sparse-llm-ft status {self.folder} --watch",
            f"cancel:  {stop}",
        ]
        if self.is_sweep:
            runs = " ".join([*map(str, self.skipped), *(config.output_dir for config in self.runs)])
            lines.append(f"compare: sparse-llm-ft report {runs} --output {self.folder / 'report'}")
        return lines


def _local_paths(settings: Any) -> Iterator[Path]:
    """Files and folders that settings name: model, data, templates, caches. `load_config` made them absolute."""
    if isinstance(settings, str):
        if settings.startswith("/") and settings.strip("/") and is_there(settings):
            yield Path(settings)
    elif isinstance(settings, dict | list):
        for inner in settings.values() if isinstance(settings, dict) else settings:
            yield from _local_paths(inner)


def _mark_pending(folder: Path, job: str) -> None:
    """Let a run's folder say that it is in a job, unless that job has begun and says more.

    Raises:
        UserError: the state cannot be read.
        OSError: it cannot be written.
    """
    state = read_or_renew(folder)
    if state.job_id == job:
        return
    pending = state.ended("pending").updated_by(
        failed_step=None, failures=0, failed_nodes=[], job_id=job, pid=None, updated=time.time()
    )
    pending.write(folder)
