"""Worlds of several ranks as forks of one process that has imported everything: a two-rank run costs a few seconds.

In a script, before anything has started a thread:

    import_everything()
    statuses = run_world(tree, world_size=2, logs=folder / "logs")

A process that has threads, as pytest does, asks fork_server.py.

A rank does what launch/train.py does once its arguments are parsed, on the CPU, under the environment that the
deepspeed launcher sets. When one ends with another status than 0, the others are ended as that launcher ends them.
All forks share one hash seed and one set of imports: what depends on those only tests/launches sees.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCHER_POLLS = 1.0
"""Seconds after which the launcher has seen that a rank is gone, at most; the others go on until then."""
_TERM_GRACE = 5.0
_PR_SET_PDEATHSIG = 1
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Kill:
    """SIGKILL for `ranks` at one moment.

    Attributes:
        after: seconds after the start; None: when the first of `ranks` has killed itself (see `before` of `run_world`).
        launcher_polls: how long the ranks that are not killed go on before the launcher ends them.
    """

    ranks: tuple[int, ...]
    after: float | None = None
    launcher_polls: float = LAUNCHER_POLLS


def import_everything() -> None:
    """All that a run imports, at its start or in its course. Leaves no thread behind."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator would start one on import
    from sparse_llm_ft.distributed.world import World, prepare_cpu
    from sparse_llm_ft.io.console import silence_libraries

    silence_libraries()
    prepare_cpu(World(0, 1, 0, 1))
    import matplotlib.pyplot  # noqa: F401
    import peft.tuners.lora.bnb
    import peft.utils.transformers_weight_conversion  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import sacrebleu  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch.profiler
    import torch.utils.tensorboard  # noqa: F401
    import tqdm
    from deepspeed.module_inject import auto_ep_layer  # noqa: F401
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    from torch._dynamo.trace_rules import get_torch_obj_rule_map
    from transformers import BertForSequenceClassification, LlamaForCausalLM  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import sparse_llm_ft.cli.run_commands
    import sparse_llm_ft.methods.peft_baselines
    import sparse_llm_ft.training.run  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # both are tables that a run makes once: a third of its time
    get_torch_obj_rule_map()
    tqdm.tqdm.monitor_interval = 0  # no thread that watches progress bars
    gc.collect()
    gc.freeze()  # the collector would otherwise touch, and so copy, every page in every fork


def run_world(
    trees: Tree | Sequence[Tree],
    world_size: int,
    logs: Path,
    kill: Kill | None = None,
    before: Callable[[int], None] | None = None,
    timeout: float = 300.0,
) -> list[int]:
    """Exit status of every rank (negative: the signal that ended it).

    Args:
        trees: the settings, or several that are run one after the other until one fails; ``{"command": [...]}`` is
            what `sparse-llm-ft` is called with; a script is ``{"script": path, "arguments": [...]}``, perhaps with an
            ``environment``.
        logs: folder for ``rank-0.log`` ...: standard output and error of each rank, one run behind the other.
        before: called with its rank in each process before anything else, to patch what the run calls.
        timeout: for each run.

    Raises:
        TimeoutError: with the end of each log, where the stack of every thread is; nothing is left running.
        RuntimeError: this process has threads; or the world has left something in shared memory.
    """
    statuses: list[int] = []
    for tree in [trees] if isinstance(trees, Mapping) else trees:
        if any(statuses):
            break
        statuses = _run_one(tree, world_size, logs, kill, before, timeout)
    return statuses


def last_lines(logs: Path, characters: int = 3000) -> str:
    """The end of each rank's log, for messages."""
    parts = (f"{path.name}:\n{path.read_text(errors='replace')[-characters:]}" for path in sorted(logs.glob("rank-*")))
    return "\n".join(parts)


def _run_one(
    tree: Tree, world_size: int, logs: Path, kill: Kill | None, before: Callable[[int], None] | None, timeout: float
) -> list[int]:
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("a process with threads must not fork; start this as a script of its own (run_worlds)")
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    pids = [_fork(rank, world_size, port, tree, logs / f"rank-{rank}.log", before) for rank in range(world_size)]
    watch = _Watch(pids, kill)
    watch.until(time.monotonic() + timeout)
    if not watch.statuses.keys() >= set(pids):
        watch.end_all()
        raise TimeoutError(f"still running after {timeout} s\n{last_lines(logs)}")
    left = [path.name for path in Path("/dev/shm").glob(f"*_{port}_*")]
    if left:
        raise RuntimeError(f"left in shared memory: {', '.join(left)}")
    return [watch.statuses[pid] for pid in pids]


def _fork(rank: int, world_size: int, port: int, tree: Tree, log: Path, before: Callable[[int], None] | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _become_rank(rank, world_size, port, log, parent)
        if before is not None:
            before(rank)
        status = _train(tree)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become_rank(rank: int, world_size: int, port: int, log: Path, parent: int) -> None:
    """The launcher's environment, output in the log, and no life after the parent's."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, which a run would obey
    faulthandler.register(signal.SIGUSR1)  # the stacks of all threads, for a run that hangs
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _train(tree: Tree) -> int:
    """What launch/train.py does with parsed arguments, or `sparse-llm-ft` with ``command``; the exit status."""
    from sparse_llm_ft.cli.main import main
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.context.preflight import preflight
    from sparse_llm_ft.distributed.exit_status import one_line_errors
    from sparse_llm_ft.distributed.world import find_world, prepare_cpu
    from sparse_llm_ft.training.run import train

    try:
        if "command" in tree:
            main(tree["command"])
            return 0
        if "script" in tree:
            os.environ.update(tree.get("environment", {}))
            sys.argv = [tree["script"], *tree["arguments"]]
            runpy.run_path(tree["script"], run_name="__main__")
            return 0
        world = find_world()
        with one_line_errors(world):
            config = parse_config(json.loads(json.dumps(tree)))
            task = preflight(config, world)
            prepare_cpu(world)
            train(RunContext.open(config, world, task))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class _Watch:
    """Waits for the ranks, kills when it is time, and ends what is left when one is gone."""

    def __init__(self, pids: Sequence[int], kill: Kill | None) -> None:
        self.pids, self.kill = pids, kill
        self.statuses: dict[int, int] = {}
        self.descriptors = {os.pidfd_open(pid): pid for pid in pids}
        self.poll = select.poll()
        for descriptor in self.descriptors:
            self.poll.register(descriptor, select.POLLIN)
        self.events: list[tuple[float, signal.Signals, list[int]]] = []  # when, what, to whom
        self.failed = False
        if kill is not None and kill.after is not None:
            self._at(kill.after, signal.SIGKILL, [pids[rank] for rank in kill.ranks])

    def until(self, deadline: float) -> None:
        """Until all have ended, or the deadline."""
        while self.descriptors and time.monotonic() < deadline:
            now = time.monotonic()
            for event in [event for event in self.events if event[0] <= now]:
                self.events.remove(event)
                self._send(*event[1:])
            following = min([deadline, *(event[0] for event in self.events)])
            for descriptor, _ in self.poll.poll(max(0.0, following - time.monotonic()) * 1000):
                self._ended(descriptor)

    def end_all(self) -> None:
        """Let each say where it stands, then SIGKILL."""
        left = list(self.descriptors.values())
        self._send(signal.SIGUSR1, left)
        time.sleep(0.5)
        self._send(signal.SIGKILL, left)
        for descriptor in list(self.descriptors):
            self._ended(descriptor)

    def _ended(self, descriptor: int) -> None:
        pid = self.descriptors.pop(descriptor)
        self.poll.unregister(descriptor)
        os.close(descriptor)
        self.statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if self.statuses[pid] == 0 or self.failed:
            return
        self.failed = True
        polls = LAUNCHER_POLLS
        if self.kill is not None and self.statuses[pid] == -signal.SIGKILL:
            self._send(signal.SIGKILL, [self.pids[rank] for rank in self.kill.ranks])
            polls = self.kill.launcher_polls
        self._at(polls, signal.SIGTERM, self.pids)
        self._at(polls + _TERM_GRACE, signal.SIGKILL, self.pids)

    def _at(self, seconds: float, what: signal.Signals, whom: Sequence[int]) -> None:
        self.events.append((time.monotonic() + seconds, what, list(whom)))

    def _send(self, what: signal.Signals, whom: Sequence[int]) -> None:
        for pid in whom:
            if pid not in self.statuses:  # until it is waited for, a pid is nobody else's
                os.kill(pid, what)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
