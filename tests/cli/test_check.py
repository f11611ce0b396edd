"""`check` says what memory a run would need, and refuses one that does not fit where the memory is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_llm_ft.cli.main import main
from sparse_llm_ft.config import merge
from sparse_llm_ft.planning import forecast
from sparse_llm_ft.planning.tables import size_text

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a run of two phases, on a machine without a GPU: status, standard output, standard error."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(name: str, *arguments: str, **training: Any) -> tuple[int, str, str]:
        method = {"method": {"name": "weight_lora", "keep": 3, "steps": 2, "batch_growth": "none"}}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(merge(merge(settings, method), {"training": training})))
        capsys.readouterr()
        try:
            main([name, "--config", str(config), *arguments])
        except SystemExit as ended:
            return int(ended.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def peaks(command: Run, *arguments: str) -> list[int]:
    """Each phase's, as `plan` says."""
    found = json.loads(command("plan", "--json", "--gpu-memory", "80GiB", *arguments)[1])
    return [phase["peak_bytes"] for phase in found["phases"]]


def test_it_says_what_plan_says_of_the_samples_that_it_has_read(command: Run) -> None:
    assert command("check")[0] == 0  # the samples are in the cache from now on
    select, train = peaks(command, "--gpus", "2")
    status, out, _ = command("check", "--processes", "2", "--gpu-memory", "80GiB")
    line = out.splitlines()[-1]
    assert status == 0 and line.startswith(f"planned memory of each GPU: phase select {size_text(select)} ("), line
    assert f", phase train {size_text(train)} (" in line and line.endswith(", of 80.00 GiB")
    assert "the samples are not tokenised yet" not in out


def test_without_a_gpu_it_plans_for_processes_and_refuses_nothing(command: Run) -> None:
    status, out, _ = command("check")
    line = out.splitlines()[-1]
    assert status == 0 and line.startswith("planned memory of each process: phase select ") and " of " not in line[30:]


def test_what_does_not_fit_is_refused_where_the_memory_is_known(command: Run) -> None:
    """One byte less than the highest peak is too little."""
    command("check")
    most = max(peaks(command))
    assert command("check", "--gpu-memory", str(most))[0] == 0
    status, _, error = command("check", "--gpu-memory", str(most - 1))
    assert status == 2 and error.startswith(f"error: --gpu-memory {size_text(most - 1)}: phase select needs "), error
    status, _, error = command("check", device_memory="1KiB")
    assert status == 2 and error.startswith("error: training.device_memory 0.0 MiB: phase select needs "), error
    status, _, error = command("check", "--gpu-memory", "much")
    assert status == 2 and error == "error: --gpu-memory much: expected a size such as 80GiB\n"


def test_a_micro_batch_that_is_sought_is_found_for_the_typed_memory(command: Run) -> None:
    status, _, error = command("check", micro_batch_size="auto")
    assert status == 2 and error.startswith("error: training.device_memory: not given")
    status, out, _ = command("check", "--gpu-memory", "80GiB", micro_batch_size="auto")
    assert status == 0 and "planned memory of each GPU: " in out


def test_a_model_that_cannot_be_traced_is_no_error(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(forecast, "forecast", fails)
    status, out, _ = command("check", "--gpu-memory", "1MiB")
    said = "planned memory: not known for this model (NotImplementedError: no meta kernel)"
    assert status == 0 and out.splitlines()[-1] == said
