"""Experiment trackers, by name, through Accelerate: a thread on rank 0 sends the numbers of each logged step.

Training never waits for a tracker, and no tracker ends a run: one that fails is dropped with a line, until the run is
started again. A requeued run continues the tracker's own run under the id that the checkpoint holds, and a step that
was sent once is not sent again: the folder's trackers.json says how far each one is.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.errors import reason_of, redact
from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.strict_json_yaml import ParseError, read_json

STATE_FILE = "trackers.json"
CLOSING_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""
LEAVING_SECONDS = 4.0
"""The same for a run that was asked to leave. Its other ranks end 5 s after they have left the loop; then launchers end
rank 0, and Slurm kills it 30 s after SIGTERM. It must have said by then that it has saved."""
_ID = re.compile(r"[\w.-]{1,100}")


@dataclass(frozen=True)
class Service:
    """How a tracker's run is begun and continued.

    Attributes:
        options: (run's name, its id or a new one, whether it is continued) -> arguments of Accelerate's class.
        id_of: the id of the run that was begun.
    """

    options: Callable[[str, str, bool], dict[str, Any]]
    id_of: Callable[[Any], str]


SERVICES = {
    "wandb": Service(lambda name, own, _: {"name": name, "id": own, "resume": "allow"}, lambda run: run.id),
    "mlflow": Service(
        lambda name, own, again: {"run_name": name, "run_id": own if again else None}, lambda run: run.info.run_id
    ),
    "trackio": Service(lambda name, own, _: {"name": own, "resume": "allow"}, lambda run: run.name),
    "comet_ml": Service(
        lambda name, own, _: {"experiment_key": own, "mode": "get_or_create"}, lambda run: run.get_key()
    ),
    "aim": Service(lambda name, own, again: {"run_hash": own} if again else {}, lambda run: run.hash),
    "clearml": Service(
        lambda name, own, again: {"task_name": name, "continue_last_task": own if again else False},
        lambda task: task.id,
    ),
    "swanlab": Service(
        lambda name, own, _: {"experiment_name": name, "id": own[:21], "resume": "allow"}, lambda run: run.id
    ),
}
"""Tracker -> how Accelerate's class for it continues a run."""


class Trackers:
    """The run's trackers on rank 0; does nothing on other ranks, without trackers, and before `begin`."""

    def __init__(self, config: RunConfig, console: Console, rank: int) -> None:
        self._config, self._console, self._rank = config, console, rank
        self._file = Path(config.output_dir) / STATE_FILE
        self._names: list[str] = []
        self._state: dict[str, dict[str, Any]] = {}
        self._queue: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._active: dict[str, Any] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)

    def begin(self, ids: Mapping[str, str]) -> None:
        """Start the thread, which starts the trackers. Call once.

        Args:
            ids: tracker -> the id of its run, from the checkpoint.
        """
        if self._rank == 0:
            self._names = [name for name in self._config.trackers if name in SERVICES]
        if self._names:
            self._state = self._read(ids)
            self._thread.start()

    @property
    def ids(self) -> dict[str, str]:
        """Tracker -> the id of its run, for the checkpoint."""
        return {name: str(entry["id"]) for name, entry in list(self._state.items())}

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Send a step's numbers, some time; what is no number is left out."""
        if self._names:
            self._queue.put((step, _numbers(values)))

    def close(self, seconds: float | None = None) -> None:
        """Wait until all is sent, at most so many seconds; None: `CLOSING_SECONDS`. Only the first call waits."""
        seconds = CLOSING_SECONDS if seconds is None else seconds
        if not self._names or self._is_closed:
            return
        self._is_closed = True
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            late = ", ".join(self._active or self._names)
            self._console.log(f"trackers: {late} did not take everything within {seconds:.0f} s; the run ends")

    @contextmanager
    def sent_on_error(self) -> Iterator[None]:
        """A context from which an error leaves only when what was logged is sent, or after `LEAVING_SECONDS`."""
        try:
            yield
        except Exception:
            self.close(LEAVING_SECONDS)
            raise

    def _run(self) -> None:
        """The thread: start the trackers, and send what the queue holds."""
        for name in self._names:
            self._attempt(name, partial(self._start, name))
        while (item := self._queue.get()) is not None:
            for name in list(self._active):
                self._attempt(name, partial(self._send, name, *item))
        for name in list(self._active):
            self._attempt(name, self._active[name].finish)

    def _start(self, name: str) -> None:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # Accelerate's own log asks it for the rank; the process group is there
        service, known = SERVICES[name], self._state.get(name)
        own = str(known["id"]) if known else uuid.uuid4().hex
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(self._config.tracker_project, **service.options(self._name, own, known is not None))
        tracker.main_process_only = False  # this is the main process's thread
        tracker.start()
        if known is None:
            self._state[name] = {"id": service.id_of(tracker.tracker), "step": 0}
            self._write()
            tracker.store_init_configuration(_flat(self._config.model_dump(mode="json")))
        elif name == "clearml":
            tracker.tracker.set_initial_iteration(0)  # else it adds the steps of the first attempt to ours
        self._active[name] = tracker

    def _send(self, name: str, step: int, values: dict[str, float]) -> None:
        if step <= self._state[name]["step"]:
            return  # sent before the run was started again
        self._state[name]["step"] = step
        self._write()  # before it is sent: a process that is killed in between leaves a step out, and sends none twice
        self._active[name].log(values, step=step)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a tracker may fail in any way, and must not end the run
            self._active.pop(name, None)
            self._console.log(f"trackers: {name} fails and is dropped ({type(error).__name__}: {reason_of(error)})")

    @property
    def _name(self) -> str:
        return Path(self._config.output_dir).name

    def _read(self, ids: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What trackers.json says, and the checkpoint's ids where it says nothing."""
        try:
            found = read_json(self._file)
        except (OSError, ParseError):
            found = {}
        entries = found if isinstance(found, dict) else {}
        state = {name: {"id": own, "step": 0} for name, own in ids.items()} | {
            name: {"id": entry["id"], "step": entry["step"]}
            for name, entry in entries.items()
            if isinstance(entry, dict) and isinstance(entry.get("id"), str) and isinstance(entry.get("step"), int)
        }
        return {name: entry for name, entry in state.items() if name in SERVICES and _ID.fullmatch(str(entry["id"]))}

    def _write(self) -> None:
        write_file(self._file, json.dumps(self._state, indent=1) + "\n")


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    """The numbers among the values; a mapping's under ``key/name``."""
    return {name: value for name, value in _flat(values, "/").items() if isinstance(value, int | float)}


def _flat(tree: Mapping[str, Any], between: str = ".") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; lists as text, and without what is None."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}{between}{name}": part for name, part in _flat(value, between).items()}
        elif value is not None:
            found[key] = value if isinstance(value, int | float) else redact(_text(value))
    return found


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
