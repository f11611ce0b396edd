"""`evaluate`: the numbers of training again, on one process or two, at another stage; and the run stays as it is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.inference.evaluate import evaluate, evaluate_again

METHODS: dict[str, Any] = {
    "weight_lora_plus": {"name": "weight_lora_plus", "keep": 4, "steps": 4, "cut_after": 2, "omega_lr": 0.5},
    "partial_lora": {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5},
    "full": "full",
    "head": "lora",
}


TEMPLATE = """\
{% if strftime_now('%Y') == '2001' %}anna{% elif strftime_now('%Y') == '2002' %}tom tom{% else %}a red cake{% endif %} \
{% for m in messages %}{{ m['content'] }} {% endfor %}{% if loud is defined and loud %}in the park{% endif %}"""


@pytest.fixture(scope="module")
def runs(
    model_folder: Path,
    data_folder: Path,
    encoder_folder: Path,
    labelled_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """For each method a run; and what it is measured as by one process, by two, and by two at stage 3."""
    folder = tmp_path_factory.mktemp("evaluated")
    worlds: dict[str, Any] = {}
    for name, method in METHODS.items():
        tree = run_settings(model_folder, data_folder, folder / name) | {"method": method, "report": False}
        if name == "head":
            tree["model"]["name"] = str(encoder_folder)
            tree["task"] = {"name": "custom", "path": str(labelled_folder), "max_length": 32}
            tree["task"] |= {"labels": ["no", "yes"], "texts": ["sentence"], "metrics": ["f1", "matthews"]}
            tree["evaluation"] |= {"split": "validation", "samples": 11}
        worlds[f"{name}-train"] = {"trees": tree, "world_size": 1}
        again = ["evaluate", str(folder / name)]
        for other, ranks, settings in (
            ("same", 1, []),
            ("two", 2, ["evaluation.micro_batch_size=3"]),
            ("stage-3", 2, ["deepspeed.zero_stage=3", "evaluation.micro_batch_size=1"]),
        ):
            output = ["--output", str(folder / f"{name}-{other}")]
            worlds[f"{name}-{other}"] = {"trees": {"command": [*again, *output, *settings]}, "world_size": ranks}
    worlds |= chats(run_settings(model_folder, data_folder, folder / "chat"), folder)
    statuses = run_worlds(worlds, folder / "logs")
    for name, ranks in statuses.items():
        assert ranks and not any(ranks), last_lines(folder / "logs" / name)
    return folder


def chats(tree: dict, folder: Path) -> dict[str, Any]:
    """A run of two ranks that live in 2001 and 2002, evaluated in 2010; and one whose template has no argument."""
    (folder / "dated.jinja").write_text(TEMPLATE)
    tree["task"] |= {"chat_template": str(folder / "dated.jinja"), "chat_template_kwargs": {"loud": True}}
    quiet = tree | {"task": tree["task"] | {"chat_template_kwargs": {}}, "output_dir": str(folder / "quiet")}
    again = ["evaluate", str(folder / "chat"), "--output", str(folder / "chat-same")]
    worlds = {
        "chat-train": {"trees": tree, "world_size": 2},
        "quiet-train": {"trees": quiet, "world_size": 2},
        "chat-same": {"trees": {"command": again}, "world_size": 2},
    }
    for name, world in worlds.items():
        year = 2010 if name == "chat-same" else 2001
        world["before"] = ["helpers.clocks", "years", year, str(folder / f"clock-{name}")]
    return worlds


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_settings_give_the_numbers_of_training(runs: Path, name: str) -> None:
    result = read(runs / f"{name}-same" / "metrics.json")
    assert result["metrics"] == read(runs / name / "summary.json")["metrics"]["after"]
    assert result["metrics"] != read(runs / name / "summary.json")["metrics"]["before"]
    assert result["step"] == 8
    predictions = (runs / name / "predictions-after.jsonl").read_text()
    assert (runs / f"{name}-same" / "predictions.jsonl").read_text() == predictions


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("other", ["two", "stage-3"])
def test_ranks_batches_and_stages_change_nothing(runs: Path, name: str, other: str) -> None:
    one, two = (read(runs / f"{name}-{which}" / "metrics.json") for which in ("same", other))
    assert one["metrics"].keys() == two["metrics"].keys()
    for key, value in one["metrics"].items():
        assert two["metrics"][key] == pytest.approx(value, rel=1e-5), key
    assert (two["world_size"], two["zero_stage"]) == (2, 3 if other == "stage-3" else 2)
    rows = [(runs / f"{name}-{which}" / "predictions.jsonl").read_text() for which in ("same", other)]
    assert rows[0] == rows[1]


def test_a_template_sees_the_date_that_the_run_began_with_on_every_rank(runs: Path, model_folder: Path) -> None:
    dates = [path.read_text() for path in sorted(runs.glob("clock-*/date-*"))]
    assert dates == ["2001-05-01T12:30:00"] * 6
    result = read(runs / "chat-same" / "metrics.json")["metrics"]
    after = read(runs / "chat" / "summary.json")["metrics"]["after"]
    assert result == pytest.approx(after, rel=1e-6)
    quiet = read(runs / "quiet" / "summary.json")["metrics"]["before"]
    assert quiet["loss"] != pytest.approx(read(runs / "chat" / "summary.json")["metrics"]["before"]["loss"], rel=1e-3)
    samples = {}
    for name in ("chat-train", "chat-same", "quiet-train"):
        files = sorted((runs / f"clock-{name}").glob("cache/sparse_llm_ft/*/samples.arrow"))
        samples[name] = {
            tuple(row["prompt_ids"][:1] + row["prompt_ids"][-3:]) for f in files for row in Dataset.from_file(str(f))
        }
    loud, other, plain = samples.values()
    vocabulary = AutoTokenizer.from_pretrained(model_folder).get_vocab()
    assert {prompt[0] for prompt in loud | other | plain} == {vocabulary["anna"]}
    park = tuple(vocabulary[word] for word in ("in", "the", "park"))
    assert {prompt[1:] for prompt in loud | other} == {park} and park not in {prompt[1:] for prompt in plain}


def test_a_run_is_only_read(runs: Path) -> None:
    assert {path.name for path in (runs / "partial_lora").iterdir()} == {
        *("config.yaml", "plan.json", "phases", "checkpoints", "metrics.jsonl", "tensorboard", "summary.json"),
        *("adapter", "predictions-before.jsonl", "predictions-after.jsonl", ".lock"),
        "state.json",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.max_steps=9"], "training.max_steps=9: expected a setting of evaluation., deepspeed., task.path="),
        (["evaluation.split=validaton"], "evaluation.split: 'validaton' is not allowed"),
        (["evaluation.samples=0"], "evaluation.samples: 0 measures nothing; expected 1 or more"),
        (["--output", "."], "exists"),
        (["task.path=/nowhere"], "task.path: '/nowhere' is not a folder"),
    ],
)
def test_wrong_input_is_one_line(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(runs / "head"), *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and message in said[0]


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, UserError)):
        main(["evaluate", str(tmp_path)])
    assert "no config.yaml; expected a run's output_dir" in capsys.readouterr().err


@pytest.mark.usefixtures("process_group")
def test_evaluations_of_one_run_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each took its number at the start, and the later one's measurement had nowhere to go."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "evaluation-2").write_text("a file of the user's")
    run: Any = SimpleNamespace(context=SimpleNamespace(world=ONE_PROCESS))

    def measure(run: Any, draft: Path) -> dict[str, int]:
        first = not (folder / "evaluation-1").exists()
        if first:  # another one ends in the middle of it
            monkeypatch.setattr("sparse_llm_ft.inference.evaluate._measure", write)
            with ThreadPoolExecutor(1) as pool:  # drafts belong to threads
                assert pool.submit(evaluate_again, run, folder).result() == ({"by": 2}, folder / "evaluation-1")
        return write(run, draft, by=1)

    def write(run: Any, draft: Path, by: int = 2) -> dict[str, int]:
        (draft / "metrics.json").write_text(str(by))
        return {"by": by}

    monkeypatch.setattr("sparse_llm_ft.inference.evaluate._measure", measure)
    assert evaluate_again(run, folder) == ({"by": 1}, folder / "evaluation-3")
    assert [(folder / f"evaluation-{n}" / "metrics.json").read_text() for n in (1, 3)] == ["2", "1"]
    assert (folder / "evaluation-2").read_text() == "a file of the user's" and len(list(folder.iterdir())) == 3


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("interrupted", [True, False])
def test_an_evaluation_has_its_folder_when_it_is_whole(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed leaves none, which the same command would refuse."""
    output = tmp_path / "run" / "evaluation-1"

    def measure(run: Any, folder: Path) -> dict[str, int]:
        (folder / "metrics.json").write_text("{}")
        assert not output.exists()
        if interrupted:
            raise KeyboardInterrupt
        return {"step": 1}

    monkeypatch.setattr("sparse_llm_ft.inference.evaluate._measure", measure)
    run: Any = SimpleNamespace(context=SimpleNamespace(world=ONE_PROCESS))
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        evaluate(run, output)
    assert [path.name for path in output.parent.iterdir()] == ([] if interrupted else ["evaluation-1"])
