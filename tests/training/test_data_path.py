"""Whole runs on one rank and two, packed, streamed and with bad rows: who tokenises, what each step learns, what is
said.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_files import make_data
from helpers.tiny_run import run_settings
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.packing import pack_lengths
from sparse_llm_ft.data.reading import Skipped, examples, read_split
from sparse_llm_ft.data.streaming import shuffled
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tokenization import CausalLMPreprocessor
from sparse_llm_ft.model.loading import load_tokenizer

LONG = " ".join(["anna"] * 40)
STEPS = 6
STREAM = {"streaming": True, "shuffle_buffer": 7}


def spoil(folder: Path, split: str, lines: list[str]) -> None:
    """Put `lines` behind the split's first row."""
    rows = (folder / f"{split}.jsonl").read_text().splitlines()
    (folder / f"{split}.jsonl").write_text("\n".join([rows[0], *lines, *rows[1:]]) + "\n")


def row(text: str, answer: str) -> str:
    return json.dumps({"text": text, "answer": answer})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data-path")


@pytest.fixture(scope="module")
def worlds(model_folder: Path, folder: Path) -> dict[str, dict[str, Any]]:
    unreadable = ["{oops", row("anna", " ")]
    for name, lines in (
        ("good", {}),
        ("bad", {"train": [*unreadable, row("tom", LONG)], "test": [*unreadable, row("tom", LONG)]}),
        ("half-bad", {"train": unreadable}),
        ("too-long", {"train": [row("tom", LONG)]}),
    ):
        (folder / name).mkdir()
        make_data(folder / name)
        for split in lines:
            spoil(folder / name, split, lines[split])

    def world(name: str, ranks: int = 1, data: str = "good", training: dict | None = None, **task: Any) -> dict:
        tree = run_settings(model_folder, folder / data, folder / "runs" / name)
        tree["task"] |= task
        tree["adapter"]["lora_dropout"] = 0.0
        tree["training"] |= {"max_steps": STEPS} | (training or {})
        tree["evaluation"] |= {"samples": 0}
        return {"trees": tree, "world_size": ranks, "before": ["helpers.watching", "watch", str(folder / name)]}

    epochs = {"max_steps": None, "epochs": 2.0, "global_batch_size": 4}
    made = {
        "plain": world("plain", 2),
        "packed": world("packed", packing=True, training=epochs),
        "packed-on-two": world("packed-on-two", 2, packing=True, training=epochs),
        "streamed": world("streamed", **STREAM),
        "streamed-on-two": world("streamed-on-two", 2, **STREAM),
        "killed": world("killed", training={"save_every": 2}, **STREAM),
        "resumed": world("killed", training={"save_every": 2}, **STREAM),
        "skipped": world("skipped", data="bad", on_bad_row="skip"),
        "skipped-streamed": world("skipped-streamed", data="half-bad", on_bad_row="skip", **STREAM),
        "too-long": world("too-long", 2, data="too-long", on_bad_row="skip", **STREAM),
    }
    made["killed"]["before"].append(4)
    made["resumed"]["before"][-1] = str(folder / "resumed")
    made["skipped"]["trees"]["evaluation"] |= {"samples": 4}
    return made


@pytest.fixture(scope="module")
def statuses(worlds: dict[str, dict], folder: Path) -> dict[str, list[int]]:
    return run_worlds(worlds, folder, timeout=300)


def encoded(folder: Path, name: str, rank: int = 0) -> list[str]:
    file = folder / name / f"encoded-{rank}.txt"
    return file.read_text().splitlines() if file.is_file() else []


def steps(folder: Path, name: str, ranks: int = 1) -> list[list[Any]]:
    """Of every step all units, as (prompt, completion) of their samples, in the order in which they are dealt."""
    files = [(folder / name / f"steps-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    found = []
    for lines in zip(*files, strict=True):
        rounds = zip(*map(json.loads, lines), strict=True)
        found.append([unit for micros in rounds for micro in micros for unit in micro])
    return found


def metrics(worlds: dict, name: str) -> list[dict]:
    run = Path(worlds[name]["trees"]["output_dir"])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(worlds: dict, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(worlds[name]["trees"]["output_dir"]) / "adapter" / "adapter_model.safetensors")


def test_every_run_ends_as_it_should(statuses: dict[str, list[int]], folder: Path) -> None:
    for name, status in statuses.items():
        expected = {"killed": [-9], "too-long": [2, -15]}.get(name, [0] * len(status))
        assert status == expected and status, f"{name}: {status}\n{last_lines(folder / name)}"


def test_one_rank_of_a_node_tokenises_and_later_runs_find_it(statuses: dict, folder: Path) -> None:
    assert len(encoded(folder, "plain", 0)) == len(set(encoded(folder, "plain", 0))) == 40
    assert not encoded(folder, "plain", 1) and not encoded(folder, "packed")


def test_packed_runs_count_packs(statuses: dict, folder: Path, worlds: dict) -> None:
    """Two epochs of the packs, four of them a step, each pack twice; on one rank and on two."""
    config = parse_config(worlds["packed"]["trees"])
    encoder = CausalLMPreprocessor(load_tokenizer(config.model), config.task.max_length)
    samples = [encoder(example) for example in read_split(resolve_task(config.task), "train")]
    packs = pack_lengths([sample.length for sample in samples], config.task.max_length)
    expected = sorted([[list(samples[i].prompt_ids), list(samples[i].completion_ids)] for i in pack] for pack in packs)
    assert 12 < len(packs) < 20, "several to a sequence"
    for name, ranks in (("packed", 1), ("packed-on-two", 2)):
        units = steps(folder, name, ranks)
        assert len(units) == math.ceil(2 * len(packs) / 4) and {len(step) for step in units} == {4}
        consumed = [unit for step in units for unit in step]
        assert len({json.dumps(unit) for unit in consumed[:12]}) == 12, "no pack again before the first epoch ends"
        assert all(unit in expected for unit in consumed)
        counted = {json.dumps(unit): consumed.count(unit) for unit in expected}
        assert set(counted.values()) <= {2, 3} and sum(counted.values()) == 4 * len(units)
        losses = [line["loss"] for line in metrics(worlds, name)]
        assert len(losses) == len(units) and all(map(math.isfinite, losses))
    one, two = ([line["loss"] for line in metrics(worlds, name)] for name in ("packed", "packed-on-two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_the_first_loss_of_a_run_is_that_of_its_samples_alone(
    statuses: dict, folder: Path, worlds: dict, model_folder: Path
) -> None:
    """Before the first update the adapters change nothing: the base's loss by transformers, sample by sample."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for name, ranks in (("plain", 2), ("packed", 1), ("packed-on-two", 2), ("streamed", 1)):
        total, tokens = 0.0, 0
        for prompt, completion in (sample for unit in steps(folder, name, ranks)[0] for sample in unit):
            ids = torch.tensor([[*prompt, *completion]])
            labels = torch.tensor([[-100] * len(prompt) + completion])
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * len(completion)
            tokens += len(completion)
        assert metrics(worlds, name)[0]["loss"] == pytest.approx(total / tokens, rel=1e-5), name


def test_streamed_samples_come_through_the_buffer_on_any_number_of_ranks(
    statuses: dict, folder: Path, worlds: dict
) -> None:
    config = parse_config(worlds["streamed"]["trees"])
    encoder = CausalLMPreprocessor(load_tokenizer(config.model), config.task.max_length)
    rows = list(read_split(resolve_task(config.task), "train"))
    order = [row for epoch in (0, 1) for row in shuffled(iter(rows), 7, config.seed, epoch)]
    expected = [[[list(s.prompt_ids), list(s.completion_ids)]] for s in map(encoder, order[: 8 * STEPS])]
    for name, ranks in (("streamed", 1), ("streamed-on-two", 2)):
        assert [unit for step in steps(folder, name, ranks) for unit in step] == expected
    assert encoded(folder, "streamed") == [example.prompt for example in order[: 8 * STEPS]]
    shares = [len(encoded(folder, "streamed-on-two", rank)) for rank in (0, 1)]
    assert shares == [4 * STEPS, 4 * STEPS]
    one, two = ([line["loss"] for line in metrics(worlds, name)] for name in ("streamed", "streamed-on-two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_a_killed_stream_goes_on_where_it_was(statuses: dict, folder: Path, worlds: dict) -> None:
    whole, resumed = adapter(worlds, "streamed"), adapter(worlds, "resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert len(steps(folder, "killed")) == 3
    assert steps(folder, "resumed") == steps(folder, "streamed")[2:], "from the checkpoint of step 2 on"


def test_rows_that_are_left_out_are_said(statuses: dict, folder: Path) -> None:
    said = " ".join((folder / "skipped" / "rank-0.log").read_text().split())
    assert "3 training rows were left out, the first: " in said and "not JSON" in said


def test_predictions_stand_beside_their_references(statuses: dict, folder: Path, worlds: dict) -> None:
    """Of the first five rows that can be read, the second does not fit: the four others are measured."""
    run = Path(worlds["skipped"]["trees"]["output_dir"])
    good = [json.loads(line) for line in (folder / "good" / "test.jsonl").read_text().splitlines()][:4]
    for name in ("predictions-before.jsonl", "predictions-after.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [line["prompt"] for line in lines] == [f"{row['text']} ?" for row in good]
        assert [line["references"] for line in lines] == [[row["answer"]] for row in good]


def test_unreadable_rows_of_a_stream_are_left_out(statuses: dict, folder: Path, worlds: dict) -> None:
    """It learns what the same stream without them does."""
    config = parse_config(worlds["skipped-streamed"]["trees"])
    assert len(list(examples(resolve_task(config.task), "train", Skipped()))) == 40
    assert steps(folder, "skipped-streamed") == steps(folder, "streamed")


def test_a_streamed_sample_that_does_not_fit_ends_the_run_with_one_line(statuses: dict, folder: Path) -> None:
    """Whichever rank was given it."""
    asked = [rank for rank in (0, 1) if "tom ?" in encoded(folder, "too-long", rank)]
    assert asked
    line = (folder / "too-long" / "rank-0.log").read_text().splitlines()[-1]
    assert line.startswith("error: ") and "train.jsonl:2: a completion of 41 tokens" in line, line
