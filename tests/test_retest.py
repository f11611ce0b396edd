"""benchmarks/retest.py: settings that parse, which runs come next, and the table of finished ones."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy import stats

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import retest
from retest_systems import BALANCED, JOINT_AT, LORA, SYSTEMS
from todo import Todo

from sparse_llm_ft.config import parse_config

Score = Callable[[retest.Run], dict[str, Any]]


def empty_block(out: Path) -> retest.Block:
    return retest.Block(out, retest.Finished(out / "results.jsonl", retest.KEY))


def finish(block: retest.Block, score: Score) -> None:
    """All runs, as the command would make them."""
    (block.out / "data").mkdir()
    counts = {"train": 12000, "dropped": 3500, "dev": 872, "cut_off": 4000}
    (block.out / "data" / "counts.json").write_text(json.dumps(counts))
    for system in SYSTEMS:
        while runs := block.missing(system):
            for run in runs:
                block.results.add(run.key, score(run))


def result(loss: float, accuracy: float = 80.0) -> dict[str, Any]:
    accuracies = {"accuracy": accuracy, "accuracy_dev": accuracy + 1, "accuracy_cut_off": accuracy - 1}
    return {"held_out_loss": loss, "values": 1000 + retest.HEAD_VALUES, "derived": [], **accuracies}


def test_every_system_is_a_run_that_the_settings_allow(tmp_path: Path) -> None:
    for system in SYSTEMS:
        tree = retest.Run(system, 1e-3, 0).config(Path("models"), tmp_path, tmp_path)
        config = parse_config(tree | {"model": {"name": "org/base", "dtype": "float32"}})
        assert config.training.max_steps == 1000 and config.seed == 0
    assert len({system.folder for system in SYSTEMS}) == len(SYSTEMS)


def test_the_search_comes_first_and_lora_s_before_all_others(tmp_path: Path) -> None:
    block = empty_block(tmp_path)
    assert [block.missing(system) for system in SYSTEMS[1:]] == [[]] * (len(SYSTEMS) - 1)
    runs = block.missing(LORA)
    assert [(run.learning_rate, run.seed) for run in runs] == [
        (rate, seed) for seed in (100, 101) for rate in (2.5e-4, 1e-3, 4e-3)
    ]
    # 4e-3 is the best on one seed, and collapses on the other.
    for run in runs:
        loss = {2.5e-4: 0.45, 1e-3: 0.4, 4e-3: 0.3 if run.seed == 100 else 0.7}[run.learning_rate]
        block.results.add(run.key, result(loss))
    assert block.best_rate(LORA) == 1e-3
    assert [run.seed for run in block.missing(LORA)] == [0, 1, 2, 3, 4]
    assert block.rates(BALANCED) == (1e-3, 4e-3, 1.6e-2)


def test_a_rate_that_can_no_longer_be_the_best_is_not_run_again(tmp_path: Path) -> None:
    block = empty_block(tmp_path)

    def add(rate: float, seed: int, loss: float) -> None:
        block.results.add(retest.Run(LORA, rate, seed).key, result(loss))

    for rate, loss in ((2.5e-4, 0.5), (1e-3, 0.3), (4e-3, 0.7)):
        add(rate, 100, loss)
    rates = [run.learning_rate for run in block.missing(LORA)]
    assert rates == [1e-3, 2.5e-4, 4e-3]  # in the order of their losses
    add(1e-3, 101, 0.35)  # 0.65 in all: 4e-3 has more with one seed, and 2.5e-4 may have less with both
    assert block.best_rate(LORA) is None
    assert [(run.learning_rate, run.seed) for run in block.missing(LORA)] == [(2.5e-4, 101)]
    add(2.5e-4, 101, 0.14)
    assert block.best_rate(LORA) == 2.5e-4 and [run.seed for run in block.missing(LORA)] == [0, 1, 2, 3, 4]


def test_the_table_has_paired_differences_with_t_intervals(tmp_path: Path) -> None:
    block = empty_block(tmp_path)
    generator = np.random.default_rng(0)
    lora, others = generator.normal(82, 2, 5), generator.normal(-0.2, 0.3, 5)

    def score(run: retest.Run) -> dict[str, Any]:
        loss = 0.4 + abs(run.learning_rate - 4e-3)
        accuracy = lora[run.seed] if run.measured else 0.0
        if run.measured and run.system in (BALANCED, JOINT_AT):
            accuracy += others[run.seed]
        return result(loss, float(accuracy))

    finish(block, score)
    lines = [line for line in "\n".join(retest.page(block)).splitlines() if line.startswith("| ")]
    rows = {cells[1]: cells[2:-1] for line in lines for cells in [[cell.strip() for cell in line.split("|")]]}
    assert list(rows)[1:] == [system.name for system in SYSTEMS]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(others), scale=stats.sem(others))
    row = rows[BALANCED.name]
    assert row[0] == "1,000" and row[1] == "0.004*"  # LoRA's best rate lies at an end of its own three
    assert row[2:5] == [f"{mean(lora) + np.mean(others) + shift:.1f}" for shift in (1, -1, 0)]
    assert row[5] == f"{np.mean(others):+.2f} ({low:+.2f} to {high:+.2f})" and row[6] == "yes" and row[7] == "5"
    assert rows[LORA.name][5:7] == ["", ""] and rows["Head alone"][0] == "0"
    assert "Not complete" not in "\n".join(retest.page(block))
    # Single masks have LoRA's accuracies here.
    beside = [line for line in retest.page(block) if line.startswith("- ")]
    assert beside[0] == f"- The joint derivation's masks beside the single one's: {row[5]}"
    assert [line.partition(":")[0] for line in beside] == [f"- {text}" for text, _, _ in retest.BESIDE]

    # Another process reads the same results, and a run that is not in the file is missing.
    assert list(retest.page(empty_block(tmp_path))) == list(retest.page(block))
    last = {"system": LORA.folder, "learning_rate": 4e-3, "seed": 4}
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text(
        "".join(line for line in lines if not last.items() <= json.loads(line).items())
    )
    assert f"Not complete: {LORA.name}." in "\n".join(retest.page(empty_block(tmp_path)))


def test_phrases_of_tested_sentences_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retest, "HELD_OUT", 1)
    monkeypatch.setattr(retest, "CUT_OFF", 2)
    texts = ["held out", "a fine film", "fine", "film of the year", "a fine film of the year ", "a refined one"]
    source = tmp_path / "source" / retest.TASK
    source.mkdir(parents=True)
    for name, rows in (("train", texts), ("validation", ["a dev sentence", "held out"])):
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"sentence": t, "label": 0}) + "\n" for t in rows))
    folder = retest.prepare_data(tmp_path / "source", tmp_path / "out")
    read = lambda name: [json.loads(line)["sentence"] for line in (folder / name).read_text().splitlines()]  # noqa: E731
    assert read("train.jsonl") == [] and read("validation.jsonl") == ["held out"]
    assert read("test.jsonl") == ["a dev sentence", "held out", *texts[-2:]]
    monkeypatch.setattr(retest, "CUT_OFF", 1)
    folder = retest.prepare_data(tmp_path / "source", tmp_path / "again")
    assert read("train.jsonl") == texts[1:5]  # "fine" is no word of "a refined one"


def test_a_thread_goes_on_with_the_next_system_and_waits_only_for_what_chooses_a_rate() -> None:
    """Two threads; b and c become possible with a's result, and last only with both."""
    after = {"a": set[str](), "b": {"a"}, "c": {"a"}, "last": {"b", "c"}}
    done: set[str] = set()
    both, asked = threading.Barrier(2, timeout=10), threading.Event()
    begun: list[str] = []
    order: list[str] = []

    def missing() -> list[str]:
        if begun == ["a"]:  # by the thread that has to wait for a's result
            asked.set()
        return [job for job in after if job not in done and after[job] <= done]

    def run(job: str) -> str:
        assert after[job] <= done
        begun.append(job)
        if job == "a":
            assert asked.wait(10)
        if job in ("b", "c"):
            both.wait()  # broken unless both run at the same time
        order.append(job)
        done.add(job)
        return job

    todo = Todo(missing, done.__contains__)
    assert todo.finish(run, threads=2)
    assert order[0] == "a" and set(order[1:3]) == {"b", "c"} and order[3:] == ["last"]


@pytest.mark.parametrize("raises", [False, True])
def test_after_a_run_that_failed_none_is_begun(raises: bool) -> None:
    begun: list[str] = []

    def run(job: str) -> str:
        begun.append(job)
        if raises:
            raise OSError("no space")
        return "no result"

    todo = Todo(lambda: [job for job in "ab" if job not in begun], lambda job: False)
    if raises:
        with pytest.raises(OSError, match="no space"):
            todo.finish(run, threads=1)
    else:
        assert not todo.finish(run, threads=1)
    assert begun == ["a"]
