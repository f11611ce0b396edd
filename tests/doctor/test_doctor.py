"""The doctor: each finding from a machine that has, or lacks, what it looks at."""

from __future__ import annotations

import errno
import fcntl
import stat
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from sparse_llm_ft.cli import doctor
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.doctor import machine, ranks, software
from sparse_llm_ft.doctor.findings import Finding, Level, ok, problem, run_checks, warning
from sparse_llm_ft.training.records import machine_remarks


def levels(findings: Iterator[Finding]) -> dict[str, Level]:
    """Subject -> its worst level."""
    found: dict[str, Level] = {}
    for finding in findings:
        found[finding.subject] = max(finding.level, found.get(finding.subject, Level.OK))
    return found


def test_a_check_that_fails_is_a_problem_and_the_others_run() -> None:
    def fails() -> Iterator[Finding]:
        raise OSError("no such\ndevice")

    found = list(run_checks([("first", fails), ("second", lambda: [ok("second", "here")])]))
    assert [str(finding) for finding in found] == [
        "problem  first: OSError: no such device; a run would fail here",
        "ok       second: here",
    ]


def test_versions_outside_the_declared_ranges_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(software.versions()) == {"python": Level.OK, "versions": Level.OK}
    of = software.version

    def other(name: str) -> str:
        if name == "safetensors":
            raise software.PackageNotFoundError(name)
        return str(Version("1.0")) if name == "peft" else of(name)

    monkeypatch.setattr(software, "version", other)
    lines = [str(finding) for finding in software.versions() if finding.level is Level.PROBLEM]
    assert any("peft 1.0 is outside" in line and "pip install 'peft" in line for line in lines)
    assert any("safetensors is missing" in line for line in lines)
    assert len(lines) == 2


def test_a_gpu_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert levels(machine.gpus()) == {"gpu": Level.WARNING}
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    (finding,) = machine.gpus()
    assert finding.level is Level.PROBLEM and "torch is built for" in finding.found


def test_a_gpu_that_others_use_and_that_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (2**33 if i else 2**34, 2**34))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(machine, "_output", lambda command: "570.1\n570.1")
    assert [str(finding) for finding in machine.gpus()] == [
        f"ok       gpu driver: 570.1, torch's CUDA {torch.version.cuda}",
        "ok       gpu: 0: Card, 16 GiB, 16 free",
        "warning  gpu: 1: Card, 16 GiB, 8 free; another process uses it",
        "warning  bf16: this GPU emulates it; set model.dtype: float32",
    ]


@pytest.mark.parametrize(("flags", "level"), [("flags : avx2 avx512_bf16", Level.OK), ("flags : avx2", Level.WARNING)])
def test_bf16_of_a_processor(flags: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: flags)
    assert levels(machine.cpu_bf16()) == {"bf16": level}
    warned = [
        "warning: model.dtype is bfloat16, and this processor does not multiply it: set model.dtype: float32, far "
        "faster here"
    ]
    for dtype in ("bfloat16", "float32"):
        config: Any = SimpleNamespace(model=SimpleNamespace(dtype=dtype))
        assert machine_remarks(config) == (warned if (dtype, level) == ("bfloat16", Level.WARNING) else [])


Usage = namedtuple("Usage", "total used free")


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(2**26, 0, 2**26))
    assert levels(machine.shared_memory()) == {"/dev/shm": Level.WARNING}
    assert levels(machine.cache_room(tmp_path / "hub")) == {"model cache": Level.WARNING}
    assert levels(machine.output_folder(tmp_path / "runs"))["disk"] is Level.WARNING


def test_an_output_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = levels(machine.output_folder(tmp_path / "runs" / "new"))
    assert found == {"disk": found["disk"], "file locks": Level.OK, "umask": Level.OK}
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.write_text("")
    assert levels(machine.output_folder(file / "runs")) == {"output": Level.PROBLEM}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    (line,) = [finding for finding in machine.output_folder(tmp_path) if finding.subject == "file locks"]
    assert "has none" in line.found


def test_slurm_without_a_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine, "_output", lambda command: "")
    assert levels(machine.slurm()) == {"slurm": Level.WARNING}


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("unreachable")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_" + "x" * 34)
    (finding,) = software.hub()
    assert finding.level is Level.WARNING and "a token is set" in finding.found and "hf_" not in str(finding)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert levels(software.hub()) == {"hub": Level.OK}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
    assert levels(software.hub()) == {"hub": Level.OK}


def test_four_bit_and_deepspeed_on_this_machine() -> None:
    assert levels(software.four_bit()) == {"4-bit": Level.OK}
    assert levels(software.deepspeed_loads()) == {"deepspeed": Level.OK}


def test_two_processes_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as under `torchrun --nproc-per-node 1`
    (finding,) = ranks.start_ranks(2)
    assert finding.level is Level.OK and finding.found.startswith("2 processes sum over gloo")


def _interpreter(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_process_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", _interpreter(tmp_path / "python", "echo unreachable >&2; exit 1"))
    (finding,) = ranks.start_ranks(2)
    assert finding.level is Level.PROBLEM and "rank 0 of 2 fails: unreachable" in finding.found


def test_processes_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    popen = ranks.subprocess.Popen

    def remembered(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(ranks.subprocess, "Popen", remembered)
    monkeypatch.setattr(ranks, "TIMEOUT", 0.5)
    monkeypatch.setattr(sys, "executable", _interpreter(tmp_path / "python", "exec sleep 60"))
    (finding,) = ranks.start_ranks(2)
    assert finding.level is Level.PROBLEM and "did not finish" in finding.found
    assert all(process.wait(5) != 0 for process in started)


def test_a_slow_connection_between_gpus() -> None:
    assert ranks.judge({"backend": "nccl", "bandwidth": 1e9}, 8).level is Level.WARNING
    assert ranks.judge({"backend": "nccl", "bandwidth": 1e11}, 8).level is Level.OK
    assert ranks.judge({"backend": "gloo", "bandwidth": 1e9}, 8).level is Level.OK


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        ([ok("a", "x")], 0),
        ([ok("a", "x"), warning("b", "y", "do")], 1),
        ([problem("a", "x", "do"), warning("b", "y", "do")], 2),
    ],
)
def test_the_exit_status_is_the_worst_level(
    findings: list[Finding], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_findings", lambda *_: iter(findings))
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == status
    assert capsys.readouterr().out.splitlines() == [str(finding) for finding in findings]


@pytest.mark.parametrize("arguments", [["--processes", "0"], ["--processes", "x"], ["more"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
