"""`plan --solve` and ``training.micro_batch_size: auto``, against trying every value."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cli.plan_command import parse_size
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.config.types import bytes_of
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.cache import cache_folder, schema_of, write_cached
from sparse_llm_ft.data.dataset import SplitBuilder
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError, UserError
from sparse_llm_ft.planning.devices import planned_device
from sparse_llm_ft.planning.forecast import forecast
from sparse_llm_ft.planning.micro_batch import settle_micro_batch, with_micro_batch
from sparse_llm_ft.planning.opening import open_for_planning
from sparse_llm_ft.planning.samples import SampleSizes, sample_sizes
from sparse_llm_ft.planning.solve import _search, solve

SAMPLES = SampleSizes.assumed(32)


def opened(settings: dict[str, Any], ranks: int = 2, **training: Any) -> RunContext:
    settings["training"] |= {"global_batch_size": 16, "micro_batch_size": 1} | training
    return open_for_planning(parse_config(settings), World(0, ranks, 0, ranks))


def peak(settings: dict[str, Any], section: str, key: str, value: Any, ranks: int = 2, length: int = 32) -> int:
    """Of a run that is opened with the value, where `solve` varies an open one."""
    changed = settings | {section: settings.get(section, {}) | {key: value}}
    context = open_for_planning(parse_config(changed), World(0, ranks, 0, ranks))
    return forecast(context, samples=SampleSizes.assumed(length), on_gpu=False).peak_bytes


@pytest.mark.parametrize(
    ("field", "section", "key", "values"),
    [
        ("micro_batch_size", "training", "micro_batch_size", [1, 2, 4, 8]),
        ("r", "adapter", "r", list(range(1, 17))),
        ("max_length", "task", "max_length", [16, 17, 18]),
    ],
)
def test_the_answer_is_that_of_trying_every_value(
    settings: dict, field: str, section: str, key: str, values: list
) -> None:
    context = opened(settings)
    needed = {v: peak(settings, section, key, v, length=v if field == "max_length" else 32) for v in values}
    assert sorted(needed.values()) == list(needed.values()), "the values come in the order of what they need"
    for fits, beyond in itertools.pairwise(values):
        if needed[fits] == needed[beyond]:
            continue
        for memory in (needed[fits], needed[beyond] - 1):
            found = solve(field, context, memory, SAMPLES, on_gpu=False)
            assert (found.value, found.beyond) == (fits, beyond)
            assert (found.peak, found.beyond_peak) == (needed[fits], needed[beyond])
        if field == "max_length":
            break


def test_the_lowest_stage_that_fits_whatever_the_others_need(settings: dict) -> None:
    context = opened(settings)
    needed = {stage: peak(settings, "deepspeed", "zero_stage", stage) for stage in (0, 1, 2, 3)}
    assert len(set(needed.values())) > 2
    for memory in (*needed.values(), min(needed.values()) - 1):
        found = solve("zero_stage", context, memory, SAMPLES, on_gpu=False)
        lowest = min((stage for stage, need in needed.items() if need <= memory), default=None)
        assert (found.value, found.beyond) == (lowest, 3 if lowest is None else lowest - 1 if lowest else None)


def test_where_none_or_every_value_fits(settings: dict) -> None:
    context = opened(settings)
    none, every = (solve("micro_batch_size", context, memory, SAMPLES, on_gpu=False) for memory in (1, 2**60))
    assert (none.value, none.beyond, every.value, every.beyond) == (None, 1, 8, None)


def test_nodes_are_the_fewest_that_fit(settings: dict) -> None:
    context = opened(settings)  # nodes of 2, at stage 2
    needed = {n: forecast(context, 2 * n, SAMPLES, on_gpu=False).peak_bytes for n in (1, 2, 4, 8)}
    assert needed[1] > needed[2] > needed[4]
    found = solve("nodes", context, needed[2], SAMPLES, on_gpu=False, gpus_per_node=2)
    assert (found.value, found.peak, found.beyond, found.beyond_peak) == (2, needed[2], 1, needed[1])


def test_keep_is_asked_of_the_method_that_has_it(settings: dict) -> None:
    settings["method"] = {"name": "weight_lora", "keep": 2, "steps": 4}
    found = solve("keep", opened(settings), 2**60, SAMPLES, on_gpu=False)
    assert (found.value, found.beyond) == (14, None)  # all of the tiny model's adapters


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_edge_of_any_rising_function(seed: int) -> None:
    draws = random.Random(seed)
    needs = sorted(draws.choices(range(10_000), k=draws.randint(1, 400)))
    values = sorted(draws.sample(range(100_000), len(needs)), reverse=seed % 2 == 1)
    asked: list[int] = []

    def need(index: int) -> int:
        asked.append(index)
        return needs[index]

    for memory in draws.choices(range(-1, 10_001), k=20):
        assert _search(values, need, memory) == sum(one <= memory for one in needs)
    assert len(set(asked)) <= len(needs)


def test_a_line_is_found_in_a_few_tries() -> None:
    asked: set[int] = set()

    def need(index: int) -> int:
        asked.add(index)
        return 1000 + 7 * index

    assert _search(range(8, 8193), need, 1000 + 7 * 5000) == 5001 and len(asked) <= 6


def test_the_command_prints_the_answer(settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    for memory, status, value in (("2GiB", 0, 4), ("1KiB", 3, None)):
        with pytest.raises(SystemExit) as end:
            main(
                [
                    "plan",
                    "--config",
                    str(path),
                    "--gpus",
                    "2",
                    "--gpu-memory",
                    memory,
                    "--solve",
                    "micro_batch_size",
                    "--json",
                ]
            )
        found = json.loads(capsys.readouterr().out)
        assert end.value.code == status and found["value"] == value
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config", str(path), "--solve", "batch"])
    assert end.value.code == 2 and "--solve batch: expected one of micro_batch_size, " in capsys.readouterr().err


def test_auto_takes_what_fits_and_writes_it_down(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """On two ranks; a run that goes on keeps it, whatever memory it then has."""
    tree = run_settings(model_folder, data_folder, tmp_path / "run")
    tree["evaluation"] |= {"samples": 0}
    tree["training"] |= {"max_steps": 3, "save_every": 1, "micro_batch_size": 2}
    context = open_for_planning(parse_config(tree), World(0, 2, 0, 2))
    tree["training"]["micro_batch_size"] = "auto"
    trees = []
    for memory in (2**40, 1):
        trees.append({**tree, "training": tree["training"] | {"device_memory": memory}})
    trees[1]["training"] |= {"micro_batch_size": "auto"}
    killed = {"before": ["helpers.starving", "starve", 1, "forward", [], 9, 3]}
    worlds = {"first": {"trees": trees[0], "world_size": 2} | killed, "second": {"trees": trees[1], "world_size": 2}}
    statuses = run_worlds(worlds, tmp_path / "logs", timeout=300)
    assert statuses["first"][0] == -9 and statuses["second"] == [0, 0], last_lines(tmp_path / "logs" / "second")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert stored["micro_batch_size"] == 4 and context.world.size == 2
    assert "micro_batch_size: 4 fits" in (tmp_path / "logs" / "first" / "rank-0.log").read_text()
    assert "4 fits" not in (tmp_path / "logs" / "second" / "rank-0.log").read_text()
    phase = json.loads((tmp_path / "run" / "summary.json").read_text())["phases"][0]
    assert (phase["micro_batch_size"], phase["global_batch_size"], phase["steps"]) == (4, 8, 3)


def test_a_cache_that_is_cut_short_or_has_no_row_is_planned_as_none(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run refuses the one, and writes the other anew."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # other tests read the common one
    context = opened(settings)
    builder = SplitBuilder(context.config, context.task, context.tokenizer, context.task_mode)
    entry = cache_folder(builder.key("train"))
    assert sample_sizes(context) == SampleSizes.assumed(context.config.task.max_length)
    builder.stored("train")
    assert sample_sizes(context).count == 40
    path = entry / "samples.arrow"
    path.write_bytes(path.read_bytes()[:100])
    assert not sample_sizes(context).known
    shutil.rmtree(entry)
    write_cached(entry.name, builder.kind, schema_of(builder.kind, False), list, lambda: {"skipped": 40, "reasons": []})
    assert not sample_sizes(context).known


def test_what_auto_chose_counts_from_the_first_checkpoint_on(settings: dict) -> None:
    """A run that was killed before it may be started again on more processes, which the number need not go with."""
    context = opened(settings, 2, micro_batch_size="auto", device_memory="1TiB")
    context.folder.begin(with_micro_batch(context, 8).config, 0)
    more = opened(settings, 4, micro_batch_size="auto", device_memory="1TiB")
    assert settle_micro_batch(more, planned_device(more.config)).training.micro_batch_size == 4
    (context.folder.checkpoints / "step-00000001").mkdir()
    assert settle_micro_batch(more, planned_device(more.config)).training.micro_batch_size == 8


def test_auto_without_a_known_memory_or_without_room_is_refused(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings["training"] |= {"micro_batch_size": "auto"}
    context = open_for_planning(parse_config(settings), World(0, 1, 0, 1))
    with pytest.raises(ConfigError, match=r"^training.device_memory: not given, and training.micro_batch_size is auto"):
        settle_micro_batch(context, planned_device(context.config))
    settings["training"] |= {"device_memory": "1KiB"}
    context = open_for_planning(parse_config(settings), World(0, 1, 0, 1))
    with pytest.raises(ConfigError, match=r"^training.micro_batch_size: auto, but 1 needs"):
        settle_micro_batch(context, planned_device(context.config))


@pytest.mark.parametrize(("given", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5kib", 1536), ("7", 7)])
def test_sizes(settings: dict, given: str, size: int) -> None:
    assert bytes_of(given) == size and bytes_of("80 apples") is None
    settings["training"]["device_memory"] = given
    assert parse_config(settings).training.device_memory == size


@pytest.mark.parametrize("given", ["0", "0GiB", "plenty", "", "9" * 400])
def test_memory_that_is_none_is_refused_and_not_taken_for_this_machine_s(given: str) -> None:
    with pytest.raises(UserError, match=r"^--gpu-memory .*: expected a size such as 80GiB"):
        parse_size(given)


@pytest.mark.parametrize("given", ["plenty", 0, True, "-1GiB", "9" * 400])
def test_sizes_that_are_none(settings: dict, given: object) -> None:
    settings["training"]["device_memory"] = given
    with pytest.raises(ConfigError, match=r"^training.device_memory: "):
        parse_config(settings)
