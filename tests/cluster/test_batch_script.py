"""The batch script and what it is rendered from; `make test-slurm` runs it."""

from __future__ import annotations

import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparse_llm_ft
from sparse_llm_ft.cluster.batch_script import LAUNCHERS, JobOptions, render, seconds_of
from sparse_llm_ft.cluster.sweep import combinations
from sparse_llm_ft.errors import UserError

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(sparse_llm_ft.__file__).parent / "cluster" / "run.sbatch.template"
OPTIONS = JobOptions(nodes=4, gpus_per_node=8, tasks_per_node=8, time="12:00:00")
RUN = Path("/shared/runs/one")


def test_the_template_is_short_shipped_and_lies_in_launch_too() -> None:
    assert len(TEMPLATE.read_text().splitlines()) <= 60
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sparse_llm_ft"]
    assert "cluster/run.sbatch.template" in data
    assert (ROOT / "launch" / "slurm" / TEMPLATE.name).read_text() == TEMPLATE.read_text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("tasks", [0, 6])
@pytest.mark.parametrize("chain", [0, 3])
def test_every_script_is_valid_bash_without_a_word_left(launcher: Any, tasks: int, chain: int, tmp_path: Path) -> None:
    script = render(replace(OPTIONS, launcher=launcher, chain=chain), RUN, tasks)
    assert not [word for word in ("<name>", "<launch>", "<again>", "<options>") if word in script]
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=30).returncode == 0
    assert ("scontrol requeue" in script) is (chain == 0)
    assert ("#SBATCH --requeue" in script, "#SBATCH --no-requeue" in script) == (chain == 0, chain > 0)
    assert ("#SBATCH --array=0-5" in script) is (tasks == 6)
    assert f"#SBATCH --ntasks-per-node={8 if launcher == 'srun' else 1}" in script


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_process_has_its_cores(launcher: Any) -> None:
    """A task of torchrun or deepspeed is all processes of a node."""
    script = render(replace(OPTIONS, launcher=launcher, cpus_per_task=12), RUN)
    assert f"#SBATCH --cpus-per-task={12 if launcher == 'srun' else 96}\n" in script


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_torchrun_waits_for_who_saves(launcher: Any) -> None:
    """It kills 30 s after SIGTERM, however long Slurm would wait."""
    script = render(replace(OPTIONS, launcher=launcher), RUN)
    set_before = script.find("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=") < script.find("torch.distributed.run")
    assert set_before is (launcher == "torchrun")


def test_options_reach_sbatch_and_srun() -> None:
    asked = replace(
        OPTIONS, partition="gpu", account="lab", cpus_per_task=12, leave_before=600, sbatch=("--mem=0", "--qos=high")
    )
    lines = render(asked, RUN).splitlines()
    expected = ["nodes=4", "gpus-per-node=8", "partition=gpu", "account=lab", "cpus-per-task=12", "mem=0", "qos=high"]
    expected += ["time=12:00:00", "signal=USR2@600", "open-mode=append", "output=/shared/runs/one/slurm/%j.log"]
    assert {f"#SBATCH --{line}" for line in expected} <= set(lines)
    assert [line for line in lines if line.startswith("srun --kill-on-bad-exit=1 ")]
    assert lines[0] == "#!/usr/bin/env bash"


def test_no_directive_stands_behind_a_command() -> None:
    """sbatch stops reading at the first one."""
    lines = render(replace(OPTIONS, sbatch=("--mem=0",)), RUN, 2).splitlines()
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < min(commands)


def test_a_container_gets_its_folders_the_hubs_caches_and_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs with an srun that prints its arguments: those of pyxis, and then the command."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", "/base")
    monkeypatch.delenv("HF_DATASETS_CACHE")
    mounts = [Path("/data"), Path("/base"), Path("/data")]
    script = render(replace(OPTIONS, container="nvcr.io#lab/train:1"), RUN, 0, mounts)
    _, _, launch = script.partition("head=$(scontrol")
    launch = f"config=a.yaml\nhead=$(scontrol{launch.partition('status=$?')[0]}"
    play(tmp_path, "srun", 'printf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" "$HF_HOME" "$@"')
    play(tmp_path, "scontrol", '[ "$2" = hostnames ] && echo node7 && exit; echo NodeName=$3 NodeAddr=10.0.0.7 Port=1')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "20123"}
    answer = subprocess.run(["bash", "-euc", launch], capture_output=True, text=True, timeout=30, env=environment)
    assert answer.stdout.splitlines() == [
        "10.0.0.7:28123",
        str(tmp_path),
        "--kill-on-bad-exit=1",
        "--container-image=nvcr.io#lab/train:1",
        f"--container-mounts=/data:/data,/base:/base,{tmp_path}:{tmp_path}",
        "--no-container-entrypoint",
        *["python3", "-m", "sparse_llm_ft", "train", "--config", "a.yaml"],
    ], answer.stderr
    environment["SLURM_RESTART_COUNT"] = "2"  # another port, in case the first is what another program has
    again = subprocess.run(["bash", "-euc", launch], capture_output=True, text=True, timeout=30, env=environment)
    assert again.stdout.splitlines()[0] == "10.0.0.7:30141", again.stderr


@pytest.mark.parametrize(("status", "failures", "calls", "ends"), [(75, 2, 3, 0), (75, 9, 4, 75), (1, 0, 0, 1)])
def test_a_controller_that_is_away_is_asked_again(
    tmp_path: Path, status: int, failures: int, calls: int, ends: int
) -> None:
    """The end of the script, with a scontrol that fails so many times; the run is lost if none succeeds."""
    end = render(OPTIONS, RUN).rpartition("status=$?")[2]
    play(tmp_path, "scontrol", f'echo "$@" >> calls; [ "$(wc -l < calls)" -gt {failures} ]')
    play(tmp_path, "sleep", "")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    command = ["bash", "-uc", f"status={status}\n{end}"]
    assert subprocess.run(command, timeout=30, env=environment, cwd=tmp_path).returncode == ends
    made = (tmp_path / "calls").read_text().splitlines() if calls else []
    assert made == ["requeue 7"] * calls


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    """Of one of its tasks Slurm's number is the array's own, which means all of them, also those that are complete."""
    end = render(OPTIONS, RUN, tasks=3).rpartition("status=$?")[2]
    play(tmp_path, "scontrol", 'echo "$@" >> calls')
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"} | array
    subprocess.run(["bash", "-uc", f"status=75\n{end}"], timeout=30, env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "calls").read_text() == "requeue 7_2\n"


def test_what_an_interactive_shell_has_of_srun_does_not_reach_the_run(tmp_path: Path) -> None:
    """It would bind all tasks to that shell's core. The template forgets it for those who call sbatch themselves."""
    (line,) = (line for line in render(OPTIONS, RUN).splitlines() if line.startswith("unset "))
    left = {"SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_EXPORT_ENV": "NONE"}
    command = ["bash", "-uc", f'{line}; {line}; env | grep -E "CPU_BIND|EXPORT" || echo nothing']
    answer = subprocess.run(command, env={"PATH": "/usr/bin:/bin"} | left, capture_output=True, text=True, timeout=30)
    assert answer.stdout == "nothing\n" and not answer.stderr


@pytest.mark.parametrize("path", ["/a b", "/a:b", "/a,b"])
def test_a_folder_that_pyxis_would_read_otherwise_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="has signs that pyxis reads otherwise"):
        render(replace(OPTIONS, container="lab/train:1"), RUN, 0, [Path(path)])


def play(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("12:00:00", 43200),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-00:00:05", 86405),
    ],
)
def test_times_are_slurms(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1.5", "12h", "1-", "1-2-3"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--time .*: expected HH:MM:SS"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"nodes": 0}, "--nodes 0: expected 1 or more"),
        ({"gpus_per_node": 0, "tasks_per_node": 0}, "--gpus-per-node 0: expected --tasks-per-node"),
        ({"tasks_per_node": 4}, "--tasks-per-node 4: expected 8, one process per GPU"),
        ({"time": "5:00"}, "--time 5:00: 300 s, and the run leaves 300 s before the limit"),
        ({"chain": -1}, "--chain -1: expected 0 or more"),
        ({"chain": 1001}, "--chain 1001: expected 1000 or less"),
        ({"partition": "a\nb"}, "--partition"),
        ({"container": "an image"}, "--container 'an image': expected [REGISTRY#]IMAGE[:TAG]"),
        ({"container": ""}, "--container '': expected [REGISTRY#]IMAGE[:TAG]"),
        ({"container": "/no/such.sqsh"}, "--container /no/such.sqsh: no such file"),
        (
            {"container": "nvcr.io/nvidia/pytorch:26.01-py3"},
            "--container nvcr.io/nvidia/pytorch:26.01-py3: enroot would",
        ),
        ({"container": "image", "launcher": "torchrun"}, "--container image: expected --launcher srun"),
        ({"sbatch": ("mem=0",)}, "--sbatch mem=0: expected an option"),
        ({"sbatch": ("--mem=0\nrm",)}, "--sbatch"),
    ],
)
def test_options_that_cannot_work_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        replace(OPTIONS, **changes).check()
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize("folder", ["/a b", "/a%j", "/a\nb", "/a$b", "/a'b"])
def test_a_folder_that_sbatch_would_read_otherwise_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match="output_dir"):
        render(OPTIONS, Path(folder))


def test_a_sweep_is_the_product_of_its_values() -> None:
    found = dict(combinations(["method.keep=10,20", "seed=0,1,2"]))
    assert list(found) == [f"keep-{keep}_seed-{seed}" for keep in (10, 20) for seed in (0, 1, 2)]
    assert found["keep-20_seed-1"] == ("method.keep=20", "seed=1")
    assert combinations([]) == [("", ())]


def test_commas_in_brackets_belong_to_a_value_and_names_differ() -> None:
    found = combinations(["adapter.target_modules=[q_proj,v_proj],all-linear", "a.x=1", "b.x=+,-"])
    assert [overrides[0] for _, overrides in found[:1]] == ["adapter.target_modules=[q_proj,v_proj]"]
    names = [name for name, _ in found]
    assert len(set(names)) == 4 and names[0] == "target_modules-q_proj-v_proj_a.x-1_b.x--"


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        (["seed"], "--sweep seed: expected section.key=value,value"),
        (["=1"], "--sweep =1: expected"),
        (["seed=1,"], "--sweep seed=1,: a value is empty"),
        (["seed=1,1"], "--sweep seed=1,1: a value is empty or stands there twice"),
        (["seed=1", "seed=2"], "--sweep seed=2: seed stands there twice"),
        (["output_dir=a,b"], "--sweep output_dir"),
        (
            [f"seed={','.join(map(str, range(40)))}", f"adapter.r={','.join(map(str, range(1, 40)))}"],
            "--sweep: 1560 runs",
        ),
    ],
)
def test_sweeps_that_cannot_be_are_refused(sweep: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        combinations(sweep)
    assert str(refused.value).startswith(line)
