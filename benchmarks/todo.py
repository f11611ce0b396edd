"""Runs handed to several threads, one after the other, where a run's result can make others possible."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Todo(Generic[Job]):
    """Jobs that are not done yet.

    Args:
        missing: the jobs that are not done and can be run now, in the order in which they should run. It is asked again
            whenever a job has ended.
        is_done: whether a job that ended has its result. One that has none has failed: no other one is begun.
    """

    def __init__(self, missing: Callable[[], Iterable[Job]], is_done: Callable[[Job], bool]) -> None:
        self._missing, self._is_done = missing, is_done
        self._running: list[Job] = []  # jobs are compared, and need no hash
        self._failed = False
        self._changed = threading.Condition()

    def finish(self, run: Callable[[Job], str], threads: int) -> bool:
        """Run all jobs, and print what `run` says of each. Returns whether none failed; raises what `run` raised."""
        with ThreadPoolExecutor(threads) as pool:
            for work in [pool.submit(self._work, run) for _ in range(threads)]:
                work.result()
        return not self._failed

    def _work(self, run: Callable[[Job], str]) -> None:
        while (job := self._next()) is not None:
            try:
                print(run(job), flush=True)
            finally:
                with self._changed:
                    self._running.remove(job)
                    self._failed |= not self._is_done(job)
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        """None if there is none left; waits while a job that runs can still make others possible."""
        with self._changed:
            while not self._failed:
                for job in self._missing():
                    if job not in self._running:
                        self._running.append(job)
                        return job
                if not self._running:
                    break
                self._changed.wait()
        return None


def in_fork(function: Callable[..., object], *arguments: object) -> None:
    """Call the function in a fork of this process, and wait for its end."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
