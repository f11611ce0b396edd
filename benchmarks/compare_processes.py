"""The processes of `compare.py`: started once, asked by pipe, and shared by the cases that need the same one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from compare_job import Job

WORKER = Path(__file__).with_name("compare_worker.py")


class Process:
    """A job's process, or one for each of its ranks. Its first step is made: what it allocates is there.

    Args:
        log: file of the processes' errors.
    """

    def __init__(self, job: Job, log: Path, ranks: int = 1) -> None:
        self.job, self.log = job, log
        self._known: dict[str, Any] = {}
        environments = [dict(os.environ)] if ranks == 1 else _environments(ranks)
        with log.open("w", encoding="utf-8") as errors:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, str(WORKER), json.dumps(asdict(job))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    text=True,
                )
                for environment in environments
            ]
        self._answers()
        self.ask("steps", count=1)

    def ask(self, do: str, **arguments: object) -> Any:
        """Send a command to all ranks; returns the first one's answer."""
        for rank in self._ranks:
            with suppress(BrokenPipeError):  # it has ended; its answer will be missing
                _pipe(rank.stdin).write(json.dumps({"do": do, **arguments}) + "\n")
                _pipe(rank.stdin).flush()
        return self._answers()[0]

    def once(self, do: str) -> Any:
        """The answer to a command that always has the same."""
        if do not in self._known:
            self._known[do] = self.ask(do)
        return self._known[do]

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            with suppress(BrokenPipeError):
                _pipe(rank.stdin).close()
        for rank in self._ranks:
            rank.wait()
            _pipe(rank.stdout).close()

    def _answers(self) -> list[Any]:
        lines = [_pipe(rank.stdout).readline() for rank in self._ranks]
        if not all(lines):
            for rank in self._ranks:
                rank.kill()
            told = self.log.read_text(encoding="utf-8", errors="replace")
            sys.exit(f"{self.job.system} {self.job.case}: a process ended\n{told[-3000:]}")
        return [json.loads(line) for line in lines]


class Pool:
    """A context with the processes that are running.

    Args:
        folder: of the processes' logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._running: dict[Job, Process] = {}
        self._answers: dict[tuple[Job, str], Any] = {}

    def process(self, job: Job) -> Process:
        """The job's process, started if it is not running."""
        if job not in self._running:
            self._running[job] = Process(job, self._log())
        return self._running[job]

    def of_two_ranks(self, job: Job, do: str) -> Any:
        """What the job answers when it runs on two ranks; they are ended at once."""
        if (job, do) not in self._answers:
            process = Process(job, self._log(), ranks=2)
            self._answers[job, do] = process.ask(do)
            process.close()
        return self._answers[job, do]

    def keep(self, jobs: Collection[Job]) -> None:
        """End the processes of all other jobs."""
        for job in [job for job in self._running if job not in jobs]:
            self._running.pop(job).close()

    def _log(self) -> Path:
        self._started += 1
        return self._folder / f"{self._started}.log"

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(())


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _environments(ranks: int) -> list[dict[str, str]]:
    """Those of the ranks of one launch on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(ranks)]
    return [os.environ | {name: str(value) for name, value in place.items()} for place in places]
