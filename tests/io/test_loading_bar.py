"""Progress of loading: lines at their distance, and the bytes of the checkpoint's files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.loading_bar import LoadingBar
from sparse_llm_ft.model.loading import load_model


def test_lines_are_apart_in_time_and_end_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with LoadingBar(Console(0), 4, 4 * 2**30) as bar:
        for clock[0] in (104.0, 112.0, 121.0):
            bar.advance(1, 2**30)
    assert capsys.readouterr().out.splitlines() == [
        "loading: 2/4 tensors, 2.0 of 4.0 GiB, 0:12 left",  # nothing after 4 s, nor 9 s after the first line
    ]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadingBar(Console(1), 1, 1, seconds_between_lines=0.0) as bar:
        bar.advance(1, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loading_counts_every_tensor_and_byte_of_the_files(
    model_folder: Path, quantization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = [tensor for file in model_folder.glob("*.safetensors") for tensor in load_file(file).values()]
    steps: list[tuple[int, int]] = []

    class Noting(LoadingBar):
        def advance(self, tensors: int, size: int) -> None:
            steps.append((tensors, size))
            super().advance(tensors, size)

    totals: list[tuple[int, int]] = []

    def begin(tensors: int, size: int) -> LoadingBar:
        totals.append((tensors, size))
        return partial(Noting, Console(0), seconds_between_lines=0.0)(tensors, size)

    config = ModelConfig(name=str(model_folder), dtype="bfloat16", quantization=quantization)
    load_model(config, bar=begin)
    expected = (len(stored), sum(tensor.nbytes for tensor in stored))
    assert totals == [expected]
    assert (sum(tensors for tensors, _ in steps), sum(size for _, size in steps)) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loading: ")]
    assert len(lines) == len(steps) and lines[-1].startswith(f"loading: {len(stored)}/{len(stored)} tensors")
