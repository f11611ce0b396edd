"""launch/hostfile: the deepspeed launcher starts a run over ssh on two machines with a network between them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from helpers.launching import TRAIN, free_port, last_lines, launch
from helpers.slurm_jobs import ADAPTER, environment, losses, state
from helpers.two_machines import NAMES, TwoMachines, missing

pytestmark = pytest.mark.slurm
STEPS = 30


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[TwoMachines]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path / "machines"
    folder.mkdir()
    with TwoMachines(folder) as both:
        yield both


def wait(until: Callable[[], bool], what: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def config_file(settings: dict, run: Path) -> Path:
    config = run.parent / f"{run.name}.yaml"
    settings = settings | {"output_dir": str(run), "training": settings["training"] | {"max_steps": STEPS}}
    config.write_text(yaml.safe_dump(settings))
    return config


def test_a_run_by_hostfile_leaves_on_sigterm_and_ends_as_on_one_machine(
    job_settings: dict, tmp_path: Path, machines: TwoMachines
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = config_file(job_settings, run)
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    # deepspeed passes PYTHON* and NCCL* on; a .deepspeed_env in the working directory names all others.
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\nSLOW_STEP=0.4\n")
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))

    def start() -> list[str]:
        port = ["--master_port", str(free_port())]
        return [deepspeed, "--hostfile", "hostfile", *port, str(TRAIN), "--config", str(config)]

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher = machines.start(start(), log, tmp_path, environment(PATH=path))
    wait(lambda: state(run).get("step", 0) >= 3, log.read_text)
    assert (state(run)["processes"], state(run)["host"]) == (2, NAMES[0])
    machines.terminate(launcher)
    wait(
        lambda: launcher.poll() is not None and not machines.processes(),
        lambda: (log.read_text(), machines.processes()),
    )
    left = state(run)
    # pdsh lets go of the output before it passes the signal on; a run that prints in between leaves for that.
    said = left["message"].partition(": saved step ")[0]
    assert left["state"] == "preempted" and said in ("SIGTERM", "SIGPIPE"), log.read_text()
    assert left["step"] < STEPS

    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    launcher = machines.start(start(), log, tmp_path, environment(PATH=path))
    assert launcher.wait(timeout=300) == 0, log.read_text()
    assert (state(run)["state"], state(run)["attempt"]) == ("completed", 2)
    assert not machines.processes()

    alone = launch(TRAIN, "--config", str(config_file(job_settings, tmp_path / "alone")))
    assert alone.returncode == 0, last_lines(alone)
    assert (run / ADAPTER).read_bytes() == (tmp_path / "alone" / ADAPTER).read_bytes()
    assert losses(run) == losses(tmp_path / "alone")
