"""Any manifest, and any state under good checksums: a checkpoint, or a CheckpointError in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from helpers.inputs import NASTY, VALUES, is_one_line, wounded
from sparse_llm_ft.checkpoint.record import PhaseRecord, RunRecord
from sparse_llm_ft.checkpoint.store import load_checkpoint
from sparse_llm_ft.checkpoint.validation import Expected
from sparse_llm_ft.errors import CheckpointError
from sparse_llm_ft.io.atomic import verify_folder, write_folder
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter

MANIFEST = {"x": {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}}
PLAN = AdapterPlan({"h.0.q": ModuleAdapter(2, 4.0)})
REAL = Expected({"h.0.q": (6, 4)}, {}, 1)
TENSORS = {"value/h.0.q.lora_A": torch.ones(2, 4), "value/h.0.q.lora_B": torch.ones(6, 2)}
PHASE = Phase("train", PLAN).with_batch(2, 8)
RECORD = PhaseRecord.of(PHASE, None, parameters=20, optimizer_bytes=160)
RUN = RunRecord(run="", samples="", micro_batch_size=2, before={"loss": 2.0}, phases=[RECORD], current=RECORD)
STATE = {
    "version": 3,
    "written_by": "0.2.0",
    "optimizer_steps": {"adapter": 3},
    "progress": {"step": 3, "samples": 24, "phase": 0, "phase_step": 3, "start_step": 0, "start_samples": 0},
    "phase": PHASE.to_dict(),
    "callback": None,
    "record": RUN.model_dump(),
}


def folder_of(path: Path, state: Any, tensors: bytes) -> Path:
    def fill(temporary: Path) -> None:
        (temporary / "state.json").write_text(json.dumps(state))
        (temporary / "tensors.safetensors").write_bytes(tensors)

    write_folder(path / "step-00000003", fill)
    return path / "step-00000003"


def is_readable_or_one_line(folder: Path) -> bool:
    try:
        found = load_checkpoint(folder, REAL)
    except CheckpointError as error:
        assert is_one_line(error)
        return False
    assert Phase.from_dict(found.state.phase).to_dict() == found.phase.to_dict()
    return True


def test_the_unwounded_are_good(tmp_path: Path) -> None:
    assert is_readable_or_one_line(folder_of(tmp_path, STATE, save(TENSORS)))


@given(VALUES | wounded(MANIFEST) | st.dictionaries(NASTY, st.just(MANIFEST["x"]), max_size=3))
@example({"../x": MANIFEST["x"]})
@example({"x": {"bytes": 1, "sha256": None}})
def test_manifests(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "c").mkdir(exist_ok=True)
    (tmp_path / "c" / "x").write_bytes(b"x")
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    try:
        verify_folder(tmp_path / "c")
    except CheckpointError as error:
        assert is_one_line(error)
    else:
        assert manifest == MANIFEST


@given(st.binary(max_size=60))
def test_manifests_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        verify_folder(tmp_path)
    assert is_one_line(error.value)


@settings(max_examples=60)  # each is synced to the disk
@given(
    VALUES
    | wounded(STATE)
    | wounded(STATE["phase"]).map(lambda phase: STATE | {"phase": phase})
    | wounded(STATE["record"]).map(lambda record: STATE | {"record": record})
)
@example(STATE | {"record": STATE["record"] | {"before": {"loss": 10**400}}})
@example(STATE | {"optimizer_steps": {"\n\ud800": -1}})
def test_states(tmp_path: Path, state: Any) -> None:
    is_readable_or_one_line(folder_of(tmp_path, state, save(TENSORS)))


SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)
TYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool])
NAMES = st.sampled_from([*TENSORS, "exp_avg/h.0.q.lora_A", "callback/ipt/h.0.q.lora_A.default", "../x", "", "value/"])


@settings(max_examples=40)
@given(st.dictionaries(NAMES, st.builds(lambda shape, kind: torch.ones(shape, dtype=kind), SHAPES, TYPES)))
def test_tensors(tmp_path: Path, tensors: dict) -> None:
    if is_readable_or_one_line(folder_of(tmp_path, STATE, save(TENSORS | tensors))):
        assert all(tensors.get(name, good).shape == good.shape for name, good in TENSORS.items())


@settings(max_examples=40)
@given(st.data())
def test_damaged_tensor_files(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    is_readable_or_one_line(folder_of(tmp_path, STATE, bytes(content)[: data.draw(st.integers(0, len(content)))]))
