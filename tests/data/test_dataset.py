"""Splits -> encoded samples: what is tokenised when and by whom, which settings make it anew, what bad rows leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from helpers.tiny_files import write_rows
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.dataset import SplitBuilder, Splits
from sparse_llm_ft.data.packing import PackedDataset
from sparse_llm_ft.data.reading import read_split
from sparse_llm_ft.data.samples import Sample
from sparse_llm_ft.data.spans import SpanPreprocessor
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.data.tokenization import CausalLMPreprocessor, ClassificationPreprocessor
from sparse_llm_ft.data.training_set import TrainingSet
from sparse_llm_ft.distributed import collectives
from sparse_llm_ft.distributed.collectives import ALONE, Coordination, run_on_local_leaders
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError, DataError, UserError

CHAT = "{% for m in messages %}the {{ m['content'] }} to {% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts in the order they are tokenised."""
    seen: list[str] = []
    encode = CausalLMPreprocessor.__call__

    def counted(self: CausalLMPreprocessor, example: Any) -> Sample:
        seen.append(example.prompt)
        return encode(self, example)

    monkeypatch.setattr(CausalLMPreprocessor, "__call__", counted)
    return seen


@pytest.fixture
def own_data(data_folder: Path, tmp_path: Path, settings: dict) -> Path:
    """A copy of the data that the settings name, which a test may change."""
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    settings["task"]["path"] = str(folder)
    return folder


def encoding(tree: dict, change: Callable[[Any], None] | None = None, **options: Any) -> SplitBuilder:
    config = parse_config(tree)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    if change:
        change(tokenizer)
    return SplitBuilder(config, resolve_task(config.task), tokenizer, CAUSAL_LM, **options)


def encode(tree: dict, **options: Any) -> Splits:
    made = encoding(tree, **options)
    return Splits.encode(made.config, made.task, made.tokenizer, made.task_mode, made.ranks)


def test_stored_samples_are_the_encoders(settings: dict) -> None:
    """In file order, encoded one by one here."""
    settings["training"]["eval_every"] = 4
    made = encode(settings)
    config = parse_config(settings)
    encoder = CausalLMPreprocessor(AutoTokenizer.from_pretrained(config.model.name), 32)
    for split, samples in (("train", made.train), ("validation", made.validation)):
        assert list(samples) == [encoder(example) for example in read_split(resolve_task(config.task), split)]
    (part,) = made.measured
    assert list(part.samples) == [
        encoder(example) for example in read_split(resolve_task(config.task), "test", limit=5)
    ]
    assert list(part.examples) == read_split(resolve_task(config.task), "test", limit=5) and len(part.examples) == 5


def test_a_second_run_tokenises_nothing(settings: dict, calls: list[str]) -> None:
    first = encode(settings)
    assert len(calls) == len(set(calls)) == 40 + 5, "each row once, and validation not at all"
    calls.clear()
    second = encode(settings | {"seed": 7, "method": "dora"})
    assert not calls
    assert list(second.train) == list(first.train)


TASK_CHANGES: dict[str, dict] = {
    "length": {"max_length": 31},
    "prompt": {"prompt": "{text} ."},
    "completion": {"completion": "a {answer}"},
    "bad rows": {"on_bad_row": "skip"},
    "labels": {"labels": ["a", "b"], "completion": None, "label_column": "answer"},
}
TOKENIZER_CHANGES: dict[str, Callable[[Any], Any]] = {
    "vocabulary": lambda tokenizer: tokenizer.add_tokens(["railway"]),
    "end": lambda tokenizer: setattr(tokenizer, "eos_token", "."),
    "template": lambda tokenizer: setattr(tokenizer, "chat_template", CHAT),
}


@pytest.mark.parametrize("change", TASK_CHANGES)
def test_other_settings_have_another_key(change: str, settings: dict) -> None:
    before = encoding(settings).key("train", None, None)
    assert encoding(settings).key("train", None, None) == before
    assert encoding(settings).key("validation", None, None) != before
    assert encoding(settings).key("train", None, 3) != before
    settings["task"] = {key: value for key, value in (settings["task"] | TASK_CHANGES[change]).items() if value}
    assert encoding(settings).key("train", None, None) != before


@pytest.mark.parametrize("change", TOKENIZER_CHANGES)
def test_another_tokenizer_has_another_key(change: str, settings: dict) -> None:
    before = encoding(settings).key("train", None, None)
    assert encoding(settings, TOKENIZER_CHANGES[change]).key("train", None, None) != before


def test_another_mode_has_another_key(labelled_folder: Path, encoder_folder: Path, settings: dict) -> None:
    settings["task"] = {
        "name": "custom",
        "path": str(labelled_folder),
        "prompt": "{sentence} ?",
        "labels": ["no", "yes"],
    }
    made = encoding(settings)
    head = SplitBuilder(made.config, made.task, made.tokenizer, TaskMode("sequence_classification", 2))
    assert head.key("train", None, None) != made.key("train", None, None)


def test_samples_are_known_by_the_rows_and_not_by_their_place(
    settings: dict, own_data: Path, calls: list[str], tmp_path: Path
) -> None:
    encode(settings)
    shutil.copytree(own_data, tmp_path / "moved")
    calls.clear()
    settings["task"]["path"] = str(tmp_path / "moved")
    encode(settings)
    assert not calls
    with (tmp_path / "moved" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "anna", "answer": "tom"}) + "\n")
    assert len(encode(settings).train) == 41 and len(calls) == 41


def test_settings_that_do_not_touch_the_samples_find_them(settings: dict, calls: list[str]) -> None:
    encode(settings)
    calls.clear()
    settings["task"] |= {"packing": True, "metrics": ["bleu"]}
    encode(settings)

    def use(tokenizer: Any) -> None:
        tokenizer("anna meets tom at the park", truncation="longest_first", max_length=3)

    encode(settings, change=use)
    assert not calls


def test_only_the_first_rank_of_a_node_tokenises(
    settings: dict, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 3 of 4 on two nodes finds what rank 2, the first of its node, has written."""
    monkeypatch.setattr(collectives, "_worst", lambda own: own)  # there is no other process here
    monkeypatch.setattr(collectives, "first_failure", str)
    waits = lambda action: run_on_local_leaders(World(3, 4, 1, 2), action)  # noqa: E731
    with pytest.raises(UserError, match="No such file"):
        encode(settings, ranks=Coordination(ALONE.on_rank_zero, waits, ALONE.on_every_rank, lambda text: "of rank 0"))
    assert not calls
    said: list[str] = []
    leads = lambda action: run_on_local_leaders(World(2, 4, 0, 2), action)  # noqa: E731
    first = encode(
        settings,
        ranks=Coordination(ALONE.on_rank_zero, leads, ALONE.on_every_rank, lambda text: said.append(text) or text),
    )
    assert len(calls) == 45 and all(said)
    heard = iter(said)
    second = encode(
        settings, ranks=Coordination(ALONE.on_rank_zero, waits, ALONE.on_every_rank, lambda text: next(heard))
    )
    assert list(second.train) == list(first.train) and len(calls) == 45
    with pytest.raises(UserError, match=r"task: this node's .* rows or tokenizer differ from those on rank 0's node"):
        encode(settings, ranks=Coordination(ALONE.on_rank_zero, leads, ALONE.on_every_rank, lambda text: "of rank 0"))


def test_streamed_rows_are_those_of_rank_zero_on_every_rank(own_data: Path, settings: dict) -> None:
    """Ranks share the positions of one stream: another file on another node would be other rows, and no error."""
    settings["task"]["streaming"] = True
    settings["training"]["max_steps"] = 4
    said: list[str] = []
    first = Coordination(
        ALONE.on_rank_zero, ALONE.on_leaders, ALONE.on_every_rank, lambda text: said.append(text) or text
    )
    assert encoding(settings, ranks=first).stream_key() == said[0]
    other = Coordination(ALONE.on_rank_zero, ALONE.on_leaders, ALONE.on_every_rank, lambda text: said[0])
    assert encoding(settings, ranks=other).stream_key() == said[0]
    with (own_data / "train.jsonl").open("a") as file:
        file.write('{"text": "anna", "answer": "tom"}\n')
    with pytest.raises(
        UserError, match=r"task: this node's train rows or tokenizer differ from those on rank 0's node"
    ):
        encoding(settings, ranks=other).stream_key()


LONG = " ".join(["anna"] * 40)


def spoil(folder: Path, split: str) -> None:
    """Among the split's rows: no JSON, an empty answer, and one whose answer does not fit into 32 tokens."""
    lines = (folder / f"{split}.jsonl").read_text().splitlines()
    lines[1:1] = ["{oops", json.dumps({"text": "anna", "answer": " "}), json.dumps({"text": "tom", "answer": LONG})]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def test_bad_training_rows_end_a_run_or_are_counted(settings: dict, own_data: Path) -> None:
    spoil(own_data, "train")
    with pytest.raises(DataError, match=r"train.jsonl:2: not JSON"):
        encode(settings)
    settings["task"]["on_bad_row"] = "skip"
    for _ in range(2):  # written, and found
        samples = encode(settings)
        assert len(samples.train) == 40 and samples.train.skipped == 3
        (line,) = samples.remarks(parse_config(settings).task)
        assert line.startswith("3 training rows were left out, the first: ") and "train.jsonl:2: not JSON" in line
        assert [reason.partition("jsonl:")[2][0] for reason in samples.train.reasons] == ["2", "3", "4"]
        assert "do not fit into task.max_length 32" in samples.train.reasons[2]


def test_texts_that_are_shortened_are_said(settings: dict) -> None:
    settings["task"]["max_length"] = 9
    samples = encode(settings)
    config = parse_config(settings)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    whole = CausalLMPreprocessor(tokenizer, 512)
    count = sum(whole(example).length > 9 for example in read_split(resolve_task(config.task), "train"))
    assert 0 < count < 40
    measured = sum(whole(example).length > 9 for example in read_split(resolve_task(config.task), "test", limit=5))
    assert 0 < measured < 5
    assert samples.remarks(config.task) == [
        f"{count} of 40 training texts were shortened to fit task.max_length 9",
        f"{measured} of 5 measured texts were shortened to fit task.max_length 9",
    ]


def test_a_split_of_which_nothing_is_left_is_an_error(settings: dict, own_data: Path) -> None:
    settings["task"] |= {"on_bad_row": "skip"}
    write_rows(own_data / "train.jsonl", [{"text": "anna", "answer": LONG}] * 3)
    with pytest.raises(UserError, match=r"task: no usable row in train \(.*train.jsonl:1: .* do not fit") as failure:
        encode(settings)
    assert "\n" not in str(failure.value)


def test_references_stay_beside_their_samples_when_rows_are_left_out(settings: dict, own_data: Path) -> None:
    spoil(own_data, "test")
    settings["task"]["on_bad_row"] = "skip"
    settings["evaluation"]["samples"] = 4
    (part,) = encode(settings).measured
    made = encoding(settings)
    assert [made.encoder(example) for example in part.examples] == list(part.samples)
    lines = [json.loads(line) for line in (own_data / "test.jsonl").read_text().splitlines() if line[1] == '"']
    usable = [row for row in lines if row["answer"].strip() and row["answer"] != LONG]
    # Of the first four rows that can be read, one does not fit: the fifth is measured.
    assert [example.prompt for example in part.examples] == [f"{row['text']} ?" for row in usable[:4]]
    assert [example.references for example in part.examples] == [(row["answer"],) for row in usable[:4]]
    assert part.samples.skipped == 3


def test_windows_are_numbered_by_the_examples_that_are_left(
    settings: dict, encoder_folder: Path, tmp_path: Path
) -> None:
    """A question that leaves no room for its context has no windows, and no example beside them."""
    folder = tmp_path / "squad"
    folder.mkdir()
    context = "anna meets tom at the station . tom gives anna a red book ."
    answers = {"text": ["red book"], "answer_start": [context.index("red book")]}
    questions = ["tom gives ?", " ".join(["anna"] * 20), "anna buys ?"]
    write_rows(
        folder / "validation.jsonl",
        [
            {"id": str(i), "question": question, "context": context, "answers": answers}
            for i, question in enumerate(questions)
        ],
    )
    settings["model"]["name"] = str(encoder_folder)
    settings["task"] = {"name": "squad", "path": str(folder), "max_length": 16, "on_bad_row": "skip"}
    config = parse_config(settings)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    made = SplitBuilder(config, resolve_task(config.task), tokenizer, TaskMode("question_answering"))
    (part,) = made.measured()
    assert [example.texts[0] for example in part.examples] == [questions[0], questions[2]]
    encoder = SpanPreprocessor(tokenizer, 16)
    expected = [window for i, example in enumerate(part.examples) for window in encoder(example, i)]
    assert list(part.samples) == expected and {window.example for window in expected} == {0, 1}


def test_packs_hold_all_samples_and_no_more_than_fits(settings: dict) -> None:
    settings["task"]["packing"] = True
    train = encode(settings).train
    config = parse_config(settings)
    packs = TrainingSet(train, resolve_task(config.task), config.task).sequences()
    assert isinstance(packs, PackedDataset) and len(packs) < len(train)
    together = [sample for pack in packs for sample in pack.samples]
    assert sorted(map(hash, together)) == sorted(map(hash, train)) and max(packs.lengths) <= 32
    settings["task"]["packing"] = False
    assert TrainingSet(train, resolve_task(config.task), parse_config(settings).task).sequences() is train


def test_strata_are_labels_and_scores_have_none(settings: dict, labelled_folder: Path) -> None:
    task: dict[str, Any] = {
        "name": "custom",
        "path": str(labelled_folder),
        "texts": ["sentence"],
        "prompt": "{sentence}",
    }
    settings["evaluation"]["samples"] = 0
    for what, expected in (({"labels": ["no", "yes"]}, [0, 1, 0, 1, 0]), ({"score": [0, 5]}, [None] * 5)):
        settings["task"] = task | what
        made = encoding(settings)
        head = SplitBuilder(
            made.config, made.task, made.tokenizer, TaskMode("sequence_classification", made.task.outputs)
        )
        assert isinstance(head.encoder, ClassificationPreprocessor)
        samples = TrainingSet(head.stored("train"), made.task, made.config.task)
        assert samples.strata[:5] == expected


def test_a_task_without_what_such_a_model_sees_is_refused(settings: dict) -> None:
    made = encoding(settings)
    with pytest.raises(ConfigError, match=r"task.texts: not given"):
        SplitBuilder(made.config, made.task, made.tokenizer, TaskMode("sequence_classification", 2))


def test_rows_at_hand_are_all_encoded_or_refused(settings: dict) -> None:
    """Nobody who asks for an answer is left out, as a row of a split may be."""
    settings["task"] |= {"on_bad_row": "skip"}
    made = encoding(settings)
    row = read_split(resolve_task(made.config.task), "test", limit=1)[0]
    assert len(list(made.samples_of([row, row]))) == 2
    with pytest.raises(UserError, match="do not fit"):
        list(made.samples_of([row, replace(row, completion=LONG)]))


def test_every_label_fits_behind_the_longest_prompt(settings: dict, own_data: Path) -> None:
    """As many tokens of a prompt are seen with each label: else its length would give the label away."""
    rows = [{"text": LONG, "label": label} for label in ("red", "a red cake", "tom")]
    write_rows(own_data / "train.jsonl", rows)
    settings["task"] |= {"labels": ["red", "a red cake", "tom"], "completion": None}
    settings["evaluation"]["samples"] = 0
    train = encode(settings).train
    assert {len(sample.prompt_ids) for sample in train} == {32 - 4}
    settings["task"]["max_prompt_length"] = 11
    assert {len(sample.prompt_ids) for sample in encode(settings).train} == {11}
    settings["task"]["max_length"] = 8
    settings["task"]["labels"] = ["red", LONG]
    with pytest.raises(UserError, match=r"task.max_length: 8 leaves no room beside the longest label"):
        encode(settings)


def test_the_key_is_of_all_samples_that_a_run_uses(settings: dict, own_data: Path) -> None:
    """Those that are measured too: else before and after would be of other rows."""
    keys = [encode(settings).key]
    write_rows(own_data / "test.jsonl", [{"text": "anna", "answer": "tom"}] * 5)
    keys.append(encode(settings).key)
    settings["task"]["streaming"] = True
    settings["evaluation"]["samples"] = 0
    keys.append(encode(settings).key)
    assert encode(settings).key == keys[-1]
    write_rows(own_data / "train.jsonl", [{"text": "anna", "answer": "tom"}] * 5)
    keys.append(encode(settings).key)
    assert len(set(keys)) == 4


def test_files_that_cannot_be_read_or_written_are_one_line(
    settings: dict, own_data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE: .*sparse_llm_ft cannot be written \(Not a directory\)"):
        encode(settings)
    cache.unlink()

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"train.jsonl: Permission denied"):
        encode(settings)
    with pytest.raises(UserError, match=r"train.jsonl: Permission denied"):
        read_split(resolve_task(parse_config(settings).task), "train")
