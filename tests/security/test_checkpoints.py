"""A checkpoint, or a run folder, from a stranger: one line, nothing built, nothing written outside."""

from __future__ import annotations

import copy
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_llm_ft.checkpoint.record import PhaseRecord, RunRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import checkpoint_folder, load_checkpoint, newest_valid, save_checkpoint
from sparse_llm_ft.checkpoint.validation import Expected
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.errors import CheckpointError, ConfigError
from sparse_llm_ft.io.atomic import verify_folder, write_file, write_folder
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter
from sparse_llm_ft.run_folder import RunFolder

TARGETS = {"h.0.q": (6, 4), "h.0.k": (6, 4)}
REAL = Expected(TARGETS, {"score.weight": (2, 6), "h.0.q.weight": (6, 4), "h.0.k.weight": (6, 4)}, 1)
PLAN = AdapterPlan(
    {"h.0.q": ModuleAdapter(2, 4.0, rows=IndexMask(6, (1, 3, 4))), "h.0.k": ModuleAdapter(2, 4.0, train_omega=True)},
    trained=("score",),
)


def good_state() -> TrainState:
    tensors = {
        "h.0.q.lora_A": torch.ones(2, 4),
        "h.0.q.lora_B": torch.ones(3, 2),
        "h.0.k.lora_A": torch.ones(2, 4),
        "h.0.k.lora_B": torch.ones(6, 2),
        "h.0.k.lora_omega": torch.ones(1),
        "score.weight": torch.ones(2, 6),
    }
    moments = {name: {"exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.zeros_like(t)} for name, t in tensors.items()}
    phase = Phase("train", PLAN).with_batch(2, 8).to_dict()
    current = PhaseRecord.of(Phase("train", PLAN).with_batch(2, 8), None, parameters=51, optimizer_bytes=408)
    current.add(24, 99, 0.5)
    record = RunRecord(
        run="", samples="", micro_batch_size=2, before={"loss": float("nan")}, phases=[current], current=current
    )
    return TrainState(tensors, moments, {"adapter": 3}, Progress(3, 24, 0, 3), phase, None, record)


def put(path: str, value: Any) -> Callable[[TrainState], None]:
    """Overwrite one value of the state: ``phase.plan.modules.h/0/q.r``; a slash stands for a dot in a name."""

    def change(state: TrainState) -> None:
        *parts, last = (part.replace("/", ".") for part in path.split("."))
        place: Any = vars(state)
        for part in parts:
            place = vars(place[part]) if isinstance(place[part], Progress | RunRecord) else place[part]
        place[last] = value

    return change


LINE = {"step": 3, "phase": "train", "loss": 1.0, "tokens_per_second": 9.5}
HUGE = {"size": 10**12, "bits": ""}
CLAIMS = [
    (put("phase.name", "../../../etc/cron"), "phase name '../../../etc/cron'"),
    (put("phase.name", "/etc/cron"), "phase name '/etc/cron'"),
    (put("phase.steps", "3"), "steps is '3'"),
    (put("phase.epochs", float("nan")), "epochs is nan"),
    (put("phase.lr_factor", float("inf")), "lr_factor is inf"),
    (put("phase.extra", 1), "Phase is an object with the keys"),
    (put("phase.global_batch_size", 10**12), "global batch 1000000000000"),
    (put("phase.micro_batch_size", 9), "micro-batch 9"),
    (put("phase.micro_batch_size", 0), "a phase without batch sizes"),
    (put("phase.method", 7), "method number 7; the run has 1"),
    (put("phase.subset", {"fraction": 0.5, "shots": None, "seed": "x", "part": "all"}), "seed is 'x'"),
    (put("phase.subset", {"fraction": 0.5, "shots": None, "seed": 1, "part": "most"}), "part is 'most'"),
    (put("phase.cut", [1]), "CutRule is an object with the keys"),
    (put("phase.plan.tuner", "vera"), "tensor 'h.0.q.vera_lambda_d' is missing"),
    (put("phase.plan.modules.h/0/q.r", 10**9), "r is 1000000000; input should be less than or equal to 65536"),
    (put("phase.plan.modules.h/0/q.r", 60_000), "rank 60000 is larger than its matrix"),
    (put("phase.plan.modules.h/0/q.r", 3), "'h.0.q.lora_A' has shape (2, 4); expected (3, 4)"),
    (put("phase.plan.modules.h/0/q.rows", HUGE), "a mask of size 1000000000000 where its matrix has 6"),
    (put("phase.plan.modules.h/0/q.cols", {"size": 4, "bits": "A" * 4000}), "a mask of size 4 has 3000 bytes"),
    (put("phase.plan.modules.h/0/q.group", "../x"), "group is '../x'; string should match pattern '^[^.]+$'"),
    (put("phase.plan.modules.other", None), "module 'other', which is not a target module"),
    (put("phase.plan.options", {"total_step": 10**9}), "option 'total_step' is 1000000000"),
    (put("phase.plan.trained", ["score", "lm_head"]), None),
    (put("phase.plan.trained", []), "tensor 'score.weight' belongs to nothing that the plan trains"),
    (put("tensors.score/weight", torch.ones(3, 6)), "not of its shape"),
    (put("tensors.score/bias", torch.ones(2)), "'score.bias' belongs to nothing"),
    (put("tensors.h/0/k/weight", torch.ones(6, 4)), "'h.0.k.weight' belongs to nothing"),
    (put("tensors.h/0/q/lora_A", torch.full((2, 4), torch.nan)), "holds a value that is not finite"),
    (put("tensors.h/0/q/lora_A", torch.ones(2, 4).double()), "is torch.float64, not float32"),
    (put("tensors.h/0/q/lora_A", torch.ones(2, 4, dtype=torch.int8)), "is torch.int8, not float32"),
    (put("moments.h/0/q/lora_A", {"exp_avg": torch.ones(4, 2)}), "the moments of 'h.0.q.lora_A' are not of its shape"),
    (put("moments.h/0/q/lora_A", {"__dict__": torch.ones(2, 4)}), "is not a tensor of a checkpoint"),
    (put("moments.nothing", {"exp_avg": torch.ones(4, 2)}), "the moments of 'nothing' are not of its shape"),
    (put("callback_tensors", {"__dict__/h.0.q.lora_A.default": torch.ones(2, 4)}), "belongs to no callback"),
    (put("callback", {"moved": 3}), "the state of its callback is {'moved': 3}"),
    (put("optimizer_steps", {"adapter": 10**400}), "'optimizer_steps.adapter' is"),
    (put("optimizer_steps", {"adapter": "3"}), "'optimizer_steps.adapter' is"),
    (put("progress.phase", -1), "'progress.phase' is -1"),
    (put("progress.step", 4), "its state is of step 4"),
    (put("record.phases", {}), "'record.phases' is {}"),
    (put("record.current", {"steps": "x"}), "'record.current.name' is missing"),
    (put("record.current", None), "the record has no current phase"),
    (put("record.micro_batch_size", "2"), "'record.micro_batch_size' is '2'"),
    (put("record.unvalidated", LINE | {"step": 2}), "a line of step 2, phase 'train', in a state of another one"),
    (put("record.unvalidated", LINE | {"phase": "../x"}), "a line of step 3, phase '../x', in a state of another one"),
    (put("record.unvalidated", LINE | {"omega": "x"}), "'record.unvalidated.omega.bool' is 'x'"),
    (put("record.before", [1]), "'record.before' is [1]"),
    (put("record.before", {"loss": "\n"}), "'record.before.loss' is '\\n'"),
    (put("record.before", {str(i): "x" for i in range(10_001)}), "'record.before' is {'0': 'x'"),
]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the values that a claim puts in
@pytest.mark.parametrize(("change", "said"), CLAIMS)
def test_claims_are_checked_before_anything_is_built(
    tmp_path: Path, change: Callable[[TrainState], None], said: str | None
) -> None:
    state = copy.deepcopy(good_state())
    change(state)
    state.save(tmp_path / "step-00000003")
    tracemalloc.start()
    try:
        if said is None:  # more trained whole than there are tensors for: they begin as they were loaded
            load_checkpoint(tmp_path / "step-00000003", REAL)
        else:
            with pytest.raises(CheckpointError) as error:
                load_checkpoint(tmp_path / "step-00000003", REAL)
            assert said in str(error.value) and "step-00000003" in str(error.value) and "\n" not in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_the_good_one_is_good(tmp_path: Path) -> None:
    good_state().save(tmp_path / "step-00000003")
    newest, complaints = newest_valid(tmp_path, REAL)
    assert newest is not None and newest.folder == tmp_path / "step-00000003" and not complaints


def header(entry: dict, data: bytes = b"") -> bytes:
    text = json.dumps({"value/a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",  # a header of exabytes
        header({"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}),
        header({"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}, b"0000"),  # overflows 64 bits
        header({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, b"0000"),
        header({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, b"0000"),
        header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, b"0000"),
        header({"dtype": "X", "shape": [1], "data_offsets": [0, 4]}, b"0000"),
        struct.pack("<Q", 10) + b"[" * 10,
        b"",
    ],
)
def test_tensor_files_that_claim_more_than_they_hold(tmp_path: Path, content: bytes) -> None:
    good_state().save(tmp_path / "good")

    def fill(path: Path) -> None:
        (path / "state.json").write_bytes((tmp_path / "good" / "state.json").read_bytes())
        (path / "tensors.safetensors").write_bytes(content)

    write_folder(tmp_path / "c", fill)
    with pytest.raises(CheckpointError, match="not a checkpoint of this format") as error:
        TrainState.load(tmp_path / "c")
    assert "\n" not in str(error.value)


def edit_manifest(folder: Path, name: str, entry: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ".", "", "a/b", "a\0b", "a\nb", "\ud800"])
def test_a_manifest_names_nothing_outside(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "c", lambda path: (path / "x").touch())
    (tmp_path / "outside").write_text("secret")
    edit_manifest(tmp_path / "c", name, {"bytes": 6, "sha256": "0"})
    with pytest.raises(CheckpointError, match="is missing or not a plain file") as error:
        verify_folder(tmp_path / "c")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"bytes": 10**30, "sha256": "0"}, "has 0 bytes, not 1000"),
        ({"bytes": "0", "sha256": "0"}, "'x' has no bytes and sha256"),
        ({"bytes": True, "sha256": "0"}, "'x' has no bytes and sha256"),
        ([], "'x' has no bytes and sha256"),
        ({"bytes": 0, "sha256": "0"}, "x differs from its checksum"),
    ],
)
def test_a_manifest_of_other_values(tmp_path: Path, entry: Any, said: str) -> None:
    write_folder(tmp_path / "c", lambda path: (path / "x").touch())
    edit_manifest(tmp_path / "c", "x", entry)
    with pytest.raises(CheckpointError, match=said):
        verify_folder(tmp_path / "c")


def link_file(folder: Path, elsewhere: Path) -> None:
    (folder / "state.json").rename(elsewhere)
    (folder / "state.json").symlink_to(elsewhere)


def link_manifest(folder: Path, elsewhere: Path) -> None:
    (folder / "manifest.json").rename(elsewhere)
    (folder / "manifest.json").symlink_to(elsewhere)


def link_folder(folder: Path, elsewhere: Path) -> None:
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def extra_file(folder: Path, elsewhere: Path) -> None:
    (folder / "payload.bin").write_bytes(b"x")


def extra_folder(folder: Path, elsewhere: Path) -> None:
    (folder / "more").mkdir()


def unlisted(folder: Path, elsewhere: Path) -> None:
    """Nothing is listed, so nothing would be checked."""
    (folder / "manifest.json").write_text("{}")


def deep(folder: Path, elsewhere: Path) -> None:
    (folder / "manifest.json").write_text("[" * 200_000)


def twice(folder: Path, elsewhere: Path) -> None:
    (folder / "manifest.json").write_text('{"x": 1, "x": 2}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (link_file, "state.json is missing or not a plain file"),
        (link_manifest, "manifest.json is missing or not a plain file"),
        (link_folder, "a link, not a folder"),
        (extra_file, "payload.bin is not in manifest.json"),
        (extra_folder, "more is missing or not a plain file"),
        (unlisted, "tensors.safetensors is not in manifest.json"),
        (deep, "manifest.json is not readable (nested too deeply)"),
        (twice, "manifest.json is not readable (the key 'x' stands twice)"),
    ],
)
def test_links_and_other_files_are_refused(tmp_path: Path, damage: Any, said: str) -> None:
    folder = checkpoint_folder(tmp_path / "checkpoints", 3)
    good_state().save(folder)
    damage(folder, tmp_path / "elsewhere")
    newest, complaints = newest_valid(tmp_path / "checkpoints", REAL)
    assert newest is None and len(complaints) == 1 and said in complaints[0]


def test_dropping_an_old_checkpoint_that_is_a_link_drops_the_link(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    good_state().save(kept)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-00000001").symlink_to(kept)
    (checkpoints / "step-abcdefgh").mkdir()
    save_checkpoint(checkpoints, good_state(), keep=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000003", "step-abcdefgh"]
    assert (kept / "state.json").is_file()


@pytest.mark.parametrize("name", ["checkpoints", "phases", ".lock", "metrics.jsonl", ".tmp-config.yaml"])
def test_a_run_folder_with_links_is_refused_and_what_they_lead_to_untouched(settings: dict, name: str) -> None:
    config = parse_config(settings)
    run = RunFolder(config.output_dir)
    run.path.mkdir()
    precious = run.path.parent / "precious"
    precious.write_text("mine")
    (run.path / name).symlink_to(precious)
    with pytest.raises(ConfigError, match="is a link; expected plain files and folders"):
        run.check(config)
    if name == ".lock":
        with pytest.raises(ConfigError, match="cannot be written"):
            run.lock()
    if name == ".tmp-config.yaml":
        write_file(run.path / "config.yaml", "new")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["../x.json", "/tmp/x.json", "phases/../../x.json"])
def test_no_file_of_a_run_is_written_outside_of_it(settings: dict, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of the run's folder"):
        RunFolder(settings["output_dir"]).write_json(name, {})
