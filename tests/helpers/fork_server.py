"""A server that has imported everything, once for all tests of a process, and runs the worlds that it is asked to run.

    statuses = run_worlds({"name": {"trees": tree, "world_size": 2}}, folder)  # logs: folder / name / rank-0.log ...
    status, output = run_script(path, ["--option"], folder)  # a script that starts worlds itself

pytest has threads and must not fork; see forked_ranks.py for what a world is.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.forked_ranks import Kill, import_everything, last_lines, run_world

TESTS = Path(__file__).parent.parent


def run_worlds(worlds: Mapping[str, Mapping[str, Any]], folder: Path, timeout: float = 600.0) -> dict[str, list[int]]:
    """Statuses by name of worlds given as the arguments of `run_world`, run one after the other.

    ``before`` is given as ``[module, function, *arguments]``: each rank calls what the function returns, with its rank.
    ``kill`` is a dictionary. An empty list stands for a world that was still running at its timeout; `last_lines` of
    its folder says where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _server().ask(worlds, folder, timeout)


def run_script(script: Path, arguments: Sequence[str], folder: Path, timeout: float = 600.0) -> tuple[int, str]:
    """Exit status and output of a script in a fork; it may start worlds itself."""
    tree = {"script": str(script), "arguments": list(arguments)}
    world = {"trees": tree, "world_size": 1, "timeout": timeout}
    statuses, output = run_worlds({script.stem: world}, folder, timeout + 60), last_lines(folder / script.stem, 100_000)
    assert statuses[script.stem], f"still running after {timeout} s:\n{output[-4000:]}"
    return statuses[script.stem][0], output


class _Server:
    """A process that runs worlds as it is asked to, a line of JSON each; it ends with this process."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        atexit.register(self.end)

    def ask(self, worlds: Mapping[str, Mapping[str, Any]], folder: Path, timeout: float) -> dict[str, list[int]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"worlds": worlds, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        readable, _, _ = select.select([self.process.stdout], [], [], timeout)
        answer = self.process.stdout.readline() if readable else ""
        if not answer:
            self.end()
            self.errors.seek(0)
            raise AssertionError(f"no answer within {timeout} s:\n{self.errors.read()[-4000:]}")
        found = json.loads(answer)
        assert isinstance(found, dict), found
        return found

    def end(self) -> None:
        """Its forks end with it."""
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()
        _server.cache_clear()


@functools.cache
def _server() -> _Server:
    return _Server()


def main() -> None:
    """Serve: each line of standard input is a mapping of worlds and a folder; each is answered with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: Any = _serve(asked["worlds"], Path(asked["folder"]))
        except Exception:
            answer = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _serve(worlds: dict[str, dict[str, Any]], folder: Path) -> dict[str, list[int]]:
    statuses = {}
    for name, world in worlds.items():
        kill, before = world.pop("kill", None), world.pop("before", None)
        options = {
            "kill": None if kill is None else Kill(**kill),
            "before": before and functools.partial(_call, before),
        }
        try:
            statuses[name] = run_world(logs=folder / name, **options, **world)
        except TimeoutError as error:
            sys.stderr.write(f"{name}: {error}\n")
            sys.stderr.flush()
            statuses[name] = []
    return statuses


def _call(before: Sequence[Any], rank: int) -> None:
    module, function, *arguments = before
    getattr(importlib.import_module(module), function)(*arguments)(rank)


if __name__ == "__main__":
    main()
