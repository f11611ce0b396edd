"""Faults that are not kills of the whole run: signals, one dead rank, losses that are not finite, a full log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from helpers import forked_ranks
from helpers.fork_server import run_worlds
from helpers.launching import ROOT, TRAIN, command, free_port, last_lines, launch
from sparse_llm_ft.checkpoint.state import TrainState
from sparse_llm_ft.checkpoint.store import newest_first, newest_valid

pytestmark = pytest.mark.distributed
FAULTY = Path(__file__).with_name("faulty_train.py")


def train(config: Path, faults: str, launcher: str = "deepspeed", ranks: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {"FAULTS": faults, "TRAIN": str(TRAIN)}
    return launch(FAULTY, "--config", str(config), ranks=ranks, launcher=launcher, environment=environment)


def train_without_launcher(config: Path, faults: str, timeout: float) -> list[tuple[int, str, float]]:
    """Two ranks as srun would start them; status, output and end of each. A rank that is left over is killed."""
    environment = os.environ | {"FAULTS": faults, "TRAIN": str(TRAIN), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        with (config.parent / f"output-{rank}").open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(FAULTY), "--config", str(config)],
                    cwd=ROOT,
                    env=environment | {"RANK": rank, "LOCAL_RANK": rank},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    ends = [0.0, 0.0]
    deadline = time.monotonic() + timeout
    while not all(ends) and time.monotonic() < deadline:
        for i, process in enumerate(processes):
            if not ends[i] and process.poll() is not None:
                ends[i] = time.time()
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    outputs = [(config.parent / f"output-{rank}").read_text() for rank in (0, 1)]
    return [(process.returncode, output, end) for process, output, end in zip(processes, outputs, ends, strict=True)]


def train_in_forks(config: Path, faults: str, timeout: float) -> list[tuple[int, str, float]]:
    """The same for ranks that end themselves; no launcher ends the others."""
    script = {"script": str(FAULTY), "arguments": ["--config", str(config)]}
    script["environment"] = {"FAULTS": faults, "TRAIN": str(TRAIN)}
    world = {"trees": script, "world_size": 2, "timeout": timeout, "kill": {"ranks": [], "launcher_polls": timeout}}
    statuses = run_worlds({"forked": world}, config.parent)["forked"]
    assert statuses, f"still running after {timeout} s"
    for rank in (0, 1):
        (config.parent / "forked" / f"rank-{rank}.log").rename(config.parent / f"output-{rank}")
    outputs = [config.parent / f"output-{rank}" for rank in (0, 1)]
    return [(s, o.read_text(), o.stat().st_mtime) for s, o in zip(statuses, outputs, strict=True)]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def checkpoints(config: Path) -> list[int]:
    return [int(path.name[5:]) for path in newest_first(config.parent / "run" / "checkpoints")]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_config(settings: dict, folder: Path) -> Path:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / "run")}))
    return config


@pytest.mark.parametrize("launcher", ["forks", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_a_signal_to_one_rank_saves_the_step_of_all_and_leaves_with_75(
    launcher: str, finished_run: Path, plus_settings: dict, tmp_path: Path
) -> None:
    """SIGUSR1 to rank 1 in step 7, where a validation is due and no checkpoint; SIGTERM to rank 0 as it saves."""
    config = write_config(plus_settings, tmp_path)
    faults = "USR1:1:step-7 TERM:0:writing-.tmp-step-00000007"
    if launcher == "forks":
        (status, output, _), (other, more, _) = train_in_forks(config, faults, timeout=150)
        assert other == 75, more
        output += more
    else:
        result = train(config, faults)
        status, output = result.returncode, result.stdout
    assert status == 75, output
    assert output.count("SIGUSR1: saved step 7; the same command continues") == 1, output
    assert not errors(output) and "Traceback" not in output
    assert checkpoints(config) == [7, 6, 4] and metrics(tmp_path / "run")[-1]["step"] == 6  # its validation comes later
    resumed = {"script": str(TRAIN), "arguments": ["--config", str(config)]}
    statuses = run_worlds({"resumed": {"trees": resumed, "world_size": 2}}, tmp_path / "logs")
    output = forked_ranks.last_lines(tmp_path / "logs" / "resumed")
    assert statuses["resumed"] == [0, 0] and "resuming from step 7" in output, output
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / adapter).read_bytes() == (finished_run / adapter).read_bytes()
    timed = ("tokens_per_second", "peak_memory_bytes")
    both = [
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(run)]
        for run in (finished_run, tmp_path / "run")
    ]
    assert both[0] == both[1]


@pytest.mark.long
def test_a_signal_outside_the_loop_leaves_with_75_too(plus_settings: dict, tmp_path: Path) -> None:
    config = write_config(plus_settings, tmp_path)
    result = train(config, "TERM:0:measuring", launcher="python", ranks=1)
    assert result.returncode == 75, last_lines(result)
    assert "SIGTERM: nothing new to save; the same command continues" in result.stdout and not checkpoints(config)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_terminated_passes_it_on(launcher: str, plus_settings: dict, tmp_path: Path) -> None:
    """The step is saved, but neither launcher leaves with 75."""
    settings = plus_settings | {"method": {"name": "lora"}}
    settings["training"] = settings["training"] | {"max_steps": 9999, "save_every": None, "eval_every": None}
    config = write_config(settings, tmp_path)
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command(TRAIN, ["--config", str(config)], ranks=2, launcher=launcher),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 200
        log = tmp_path / "run" / "metrics.jsonl"
        while not (log.is_file() and len(log.read_text().splitlines()) > 2) and time.monotonic() < deadline:
            time.sleep(0.2)
        told = psutil.Process(process.pid)
        if launcher == "deepspeed":
            (told,) = told.children()  # the outer one has no handler
        told.terminate()
        assert process.wait(60) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "output").read_text()
    (step,) = checkpoints(config)
    assert said.count(f"SIGTERM: saved step {step}; the same command continues") == 1, said[-4000:]


@pytest.mark.parametrize(
    ("start", "fault", "dead", "seconds"),
    [
        (train_in_forks, "KILL:1:step-5", 1, 30),
        *(
            pytest.param(train_without_launcher, *parameters, marks=pytest.mark.long)
            for parameters in (
                ("KILL:1:step-5", 1, 30),
                ("KILL:0:step-5", 0, 30),  # who holds the store
                ("exit:1:step-1", 1, 30),
                ("STOP:1:step-5", 1, 60),  # its connections stay open: a collective hangs
                ("STOP:0:step-5", 0, 60),
            )
        ),
    ],
)
def test_a_dead_rank_is_named_by_the_other(
    start: Callable[..., list], fault: str, dead: int, seconds: float, plus_settings: dict, tmp_path: Path
) -> None:
    config = write_config(plus_settings, tmp_path)
    ranks = start(config, fault, timeout=150)
    status, output, end = ranks[1 - dead]
    assert status == 1 and end, output
    last_words = (config.parent / f"output-{dead}").stat().st_mtime
    assert end - last_words < seconds, f"{end - last_words} s\n{output}"
    (line,) = errors(output)
    assert line.startswith(f"error: rank {dead} (") and "stopped answering" in line, line
    assert "Traceback" not in output


@pytest.mark.long
def test_under_a_launcher_the_dead_rank_is_named_before_the_others_are_killed(
    plus_settings: dict, tmp_path: Path
) -> None:
    config = write_config(plus_settings, tmp_path)
    started = time.monotonic()
    result = train(config, "KILL:1:step-5")
    assert result.returncode not in (0, 2, 75), last_lines(result)
    assert [line[:14] for line in errors(result.stdout)] == ["error: rank 1 "], last_lines(result)
    assert time.monotonic() - started < 120
    assert newest_valid(config.parent / "run" / "checkpoints")[0] is not None


@pytest.mark.long
def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run(plus_settings: dict, tmp_path: Path) -> None:
    """Rank 1's loss is infinite, with finite gradients, in steps 3 and 4 and from 10 on."""
    config = write_config(plus_settings, tmp_path)
    result = train(config, "nan:1:step-3 nan:1:step-4 nan:1:step-10-")
    assert result.returncode == 1, last_lines(result)
    (line,) = errors(result.stdout)
    assert line.startswith("error: step 13 has loss inf") and "after 3 skipped updates in a row" in line
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4, 10, 11, 12]
    assert all(line["loss"] is None for line in lines if line.get("skipped"))
    assert [line["phase"] for line in lines] == ["select"] * 8 + ["train"] * 4  # six updates before the last cut
    assert [line["active_adapters"] for line in lines] == [14] * 4 + [4] * 8
    assert [line["samples"] for line in lines] == [8 * step for step in range(1, 13)]
    newest, complaints = newest_valid(config.parent / "run" / "checkpoints")
    assert newest is not None and newest.step == 12 and not complaints
    last, before = newest.state, TrainState.load(newest.folder.with_name("step-00000008"))
    assert last.optimizer_steps == {"adapter": 1} and before.progress.phase_skipped == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last.tensors.values())


@pytest.mark.long
def test_a_log_that_cannot_be_written_stops_all_ranks_with_one_line(plus_settings: dict, tmp_path: Path) -> None:
    config = write_config(plus_settings, tmp_path)
    result = train(config, "full:0:step-5")
    assert result.returncode == 2, last_lines(result)
    (line,) = errors(result.stdout)
    assert "No space left on device" in line and "Traceback" not in result.stdout, last_lines(result)
    newest, complaints = newest_valid(config.parent / "run" / "checkpoints")
    assert newest is not None and newest.step == 4 and not complaints


HOLD = """
import sys, time
from sparse_llm_ft.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.lock()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.long
def test_a_second_job_is_refused_and_a_killed_first_one_is_not_in_the_way(plus_settings: dict, tmp_path: Path) -> None:
    config = write_config(plus_settings, tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        result = launch(TRAIN, "--config", str(config), launcher="python", ranks=1)
    finally:
        holder.kill()
        holder.wait()
    assert result.returncode == 2, last_lines(result)
    assert "is in use by another process" in errors(result.stdout)[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    result = train(config, "TERM:0:step-1", launcher="python", ranks=1)
    assert result.returncode == 75 and "saved step 1" in result.stdout, last_lines(result)
