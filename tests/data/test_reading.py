"""Splits of a folder and of the hub: which file is read, which rows become samples, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.reading import Skipped, check_columns, examples, has_split, read_split, split_files
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.errors import TrainingError, UserError


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task(folder: Path, **settings: object) -> TaskConfig:
    return TaskConfig(
        **{"name": "custom", "path": str(folder), "prompt": "{text} ?", "completion": " {answer}"} | settings
    )


def test_rows_become_prompt_completion_and_references(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(
        '\ufeff{"dialogue": "A: {hi}", "summary": "one", "summary2": "two", "summary3": "three"}\n\n', encoding="utf-8"
    )
    (example,) = read_split(resolve_task(TaskConfig(name="dialogsum", path=str(tmp_path))), "test")
    assert "A: {hi}" in example.prompt and example.completion == " one"
    assert example.references == ("one", "two", "three")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "answer": "b"', r"train.jsonl:2: not JSON \(.* at column \d+\)"),
        (b'["a"]', "train.jsonl:2: expected a JSON object, not list"),
        (b'{"text": "a\0", "answer": "b"}', r"train.jsonl:2: not JSON \(it holds a NUL byte\)"),
        (b'{"text": "\\u0000", "answer": "b"}', "train.jsonl:2: column 'text' holds a NUL character"),
        (b'{"text": " ", "answer": "b"}', "train.jsonl:2: column 'text' is empty"),
        (b'{"text": null, "answer": "b"}', "train.jsonl:2: column 'text' is empty"),
        (b'{"txt": "a", "answer": "b"}', "train.jsonl:2: no column 'text'; found txt, answer; needed text, answer"),
        (b'{"text": 3, "answer": "b"}', "train.jsonl:2: column 'text' is int, not text"),
        (b'{"text": "\\ud800", "answer": "b"}', "train.jsonl:2: column 'text' holds half of a surrogate pair"),
        (b'{"text": "a", "answer": "  "}', "train.jsonl:2: the completion is empty"),
        (
            b'{"text": "\xff", "answer": "b"}',
            r"train.jsonl:2: not UTF-8 \(.* at byte 10; Latin-1, perhaps: save the file as UTF-8\)",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read_split(resolve_task(task(tmp_path)), "train")


def test_an_empty_and_a_missing_split_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"train.jsonl: no rows"):
        read_split(resolve_task(task(tmp_path)), "train")
    with pytest.raises(UserError, match=r"has no test.jsonl; nor another of .jsonl, .*; found: train.jsonl"):
        read_split(resolve_task(task(tmp_path)), "test")


def test_glue_rows_become_label_words_and_texts(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "train.jsonl", [{"sentence1": "It rains .", "sentence2": "It is wet .", "label": 1, "idx": 0}]
    )
    (example,) = read_split(resolve_task(TaskConfig(name="glue/rte", path=str(tmp_path))), "train")
    assert example.texts == ("It rains .", "It is wet .") and example.label == 1
    assert example.completion == " no" and example.references == ("no",)
    assert "First: It rains ." in example.prompt and example.prompt.endswith("Answer:")


def test_glue_is_read_from_the_hub_by_configuration_and_test_is_validation(monkeypatch) -> None:
    import datasets

    asked = []

    def load_dataset(name, configuration, split, revision, streaming):
        asked.append((name, configuration, split, revision, streaming))
        return [{"sentence": "fine", "label": -1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"nyu-mll/glue/sst2\[validation\]:1: label -1 is not 0 to 1 \(the row has no"):
        read_split(resolve_task(TaskConfig(name="glue/sst2")), "test")
    assert asked == [("nyu-mll/glue", "sst2", "validation", None, False)]


CLASSIFIED = {"prompt": "{text} ?", "completion": None, "labels": ("bad", "good"), "label_column": "mark"}


def test_a_label_is_its_number_or_its_word(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "mark": 1}, {"text": "b", "mark": "bad"}])
    found = read_split(resolve_task(task(tmp_path, **CLASSIFIED)), "train")
    assert [(e.label, e.completion, e.texts) for e in found] == [(1, " good", ("a",)), (0, " bad", ("b",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "mark": 2}, r"train.jsonl:1: label 2 is not 0 to 1 \(task.labels is bad, good\)"),
        ({"text": "a", "mark": -1}, r"label -1 is not 0 to 1 \(the row has no label, as in GLUE's test splits\)"),
        ({"text": "a", "mark": "ugly"}, "train.jsonl:1: label 'ugly' is not 0 to 1"),
        ({"text": "a", "mark": True}, "label True is not 0 to 1"),
        ({"text": "a", "mark": None}, "label None is not 0 to 1"),
        ({"text": "a"}, "train.jsonl:1: no column 'mark'; found text"),
        ({"text": 3, "mark": 0}, "train.jsonl:1: column 'text' is int, not text"),
        ({"txt": "a", "mark": 0}, "train.jsonl:1: no column 'text'; found txt, mark"),
    ],
)
def test_a_bad_label_is_named_by_file_and_line(tmp_path: Path, row: dict, message: str) -> None:
    write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read_split(resolve_task(task(tmp_path, **CLASSIFIED)), "train")


def test_a_file_has_our_name_for_the_split_or_the_hubs(tmp_path: Path) -> None:
    mnli = TaskConfig(name="glue/mnli", path=str(tmp_path))
    for name in ("train.csv", "validation_matched.jsonl", "validation_mismatched.tsv"):
        (tmp_path / name).touch()
    assert split_files(resolve_task(mnli), "train") == (tmp_path / "train.csv",)
    assert (
        split_files(resolve_task(mnli), "validation")
        == split_files(resolve_task(mnli), "test")
        == (tmp_path / "validation_matched.jsonl",)
    )
    assert split_files(resolve_task(mnli), "test", "mismatched") == (tmp_path / "validation_mismatched.tsv",)
    assert has_split(resolve_task(mnli), "validation", "mismatched") and not has_split(
        resolve_task(mnli), "train", "mismatched"
    )
    (tmp_path / "test.jsonl").touch()
    assert split_files(resolve_task(mnli), "test") == (tmp_path / "test.jsonl",)
    assert split_files(resolve_task(mnli), "validation") == (tmp_path / "validation_matched.jsonl",)


def test_glues_validation_is_its_test_where_there_is_no_test_file(tmp_path: Path) -> None:
    (tmp_path / "validation.parquet").touch()
    sst2 = TaskConfig(name="glue/sst2", path=str(tmp_path))
    assert split_files(resolve_task(sst2), "test") == (tmp_path / "validation.parquet",) and not has_split(
        resolve_task(sst2), "train"
    )
    (tmp_path / "test.jsonl").touch()
    assert split_files(resolve_task(sst2), "test") == (tmp_path / "test.jsonl",)
    (tmp_path / "validation.parquet").unlink()
    assert split_files(resolve_task(sst2), "validation") == ()


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("glue/sst2", ["train.csv", "train.jsonl"], "has train.jsonl and train.csv; expected one file for split train"),
        ("glue/mnli", ["validation.csv", "validation_matched.csv"], "has validation.csv and validation_matched.csv"),
    ],
)
def test_two_files_of_one_split_are_named(tmp_path: Path, name: str, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        read_split(resolve_task(TaskConfig(name=name, path=str(tmp_path))), files[0].partition(".")[0])


E2E = [
    {"meaning_representation": mr, "human_reference": text}
    for mr, text in (("name[A]", "It is A."), ("name[B]", "It is B."), ("name[A]", "A it is."), ("name[A]", "It is A."))
]


def test_rows_of_one_group_are_one_sample_with_all_references_but_in_training(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", E2E)
    e2e = TaskConfig(name="e2e_nlg", path=str(tmp_path))
    assert [e.references for e in read_split(resolve_task(e2e), "test")] == [("It is A.", "A it is."), ("It is B.",)]
    assert [e.references for e in read_split(resolve_task(e2e), "test", limit=1)] == [("It is A.", "A it is.")]
    assert [e.completion for e in read_split(resolve_task(e2e), "train")] == [
        f" {row['human_reference']}" for row in E2E
    ]
    assert len(read_split(resolve_task(e2e), "train", limit=3)) == 3


def test_references_of_dialogsum_are_rows_or_columns(tmp_path: Path) -> None:
    rows = [
        {"dialogue": "d", "summary": text, "summary2": other} for text, other in (("a", "b"), ("c", " "), ("a", None))
    ]
    write_rows(tmp_path / "test.jsonl", rows)
    (sample,) = read_split(resolve_task(TaskConfig(name="dialogsum", path=str(tmp_path))), "test")
    assert sample.references == ("a", "b", "c")


def test_a_server_that_goes_away_while_rows_stream_is_one_line_and_not_the_users_fault(monkeypatch) -> None:
    import datasets

    def rows():
        yield {"sentence": "fine", "label": 1}
        raise ConnectionError("could not reach\nhuggingface.co")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    task = resolve_task(TaskConfig(name="glue/sst2", streaming=True))
    found = examples(task, "train", Skipped())
    assert next(found).label == 1
    with pytest.raises(
        TrainingError, match=r"nyu-mll/glue/sst2\[train\]: the row behind number 1 cannot be read"
    ) as error:
        next(found)
    assert "ConnectionError: could not reach huggingface.co" in str(error.value)


def test_the_hubs_conversion_is_read_where_its_set_has_a_loading_script(monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split, revision, streaming: E2E if revision else None
    )
    assert len(read_split(resolve_task(TaskConfig(name="e2e_nlg")), "validation")) == 2
    assert has_split(resolve_task(TaskConfig(name="e2e_nlg")), "test") and not has_split(
        resolve_task(TaskConfig(name="e2e_nlg")), "tests"
    )


MIXED = [
    '{"text": "a", "answer": "b"}',
    "no JSON",
    '{"text": "a"}',
    '{"text": 3, "answer": "b"}',
    '{"text": "c", "answer": "d"}',
]


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(MIXED))
    skipped = Skipped()
    assert [e.line for e in read_split(resolve_task(task(tmp_path, on_bad_row="skip")), "train", skipped=skipped)] == [
        1,
        5,
    ]
    assert skipped.count == 3 and "train.jsonl:2: not JSON" in skipped.reasons[0]
    assert "train.jsonl:3: no column 'answer'" in skipped.reasons[1]
    assert str(skipped).startswith("3 rows left out, the first: ")
    with pytest.raises(UserError, match=r"train.jsonl:2: not JSON"):
        read_split(resolve_task(task(tmp_path)), "train")


def test_a_long_list_of_reasons_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(MIXED[0] + "\n" + "x\n" * 20)
    skipped = Skipped()
    read_split(resolve_task(task(tmp_path, on_bad_row="skip")), "train", skipped=skipped)
    assert skipped.count == 20 and len(skipped.reasons) == 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"txt": "a"}', MIXED[0]], "train.jsonl:1: no column 'text'; found txt; needed text, answer"),
        (["no JSON", '{"txt": "a"}', MIXED[0]], "train.jsonl:2: no column 'text'"),
        (["no JSON", '{"text": 3, "answer": "b"}'], "no rows that can be used; 2 rows left out, the first: .*:1: not"),
    ],
)
def test_a_split_that_has_nothing_to_offer_is_an_error_in_any_case(tmp_path: Path, lines: list, message: str) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        read_split(resolve_task(task(tmp_path, on_bad_row="skip")), "train")
    with pytest.raises(UserError, match=message):
        check_columns(resolve_task(task(tmp_path, on_bad_row="skip")), "train")


def test_columns_are_checked_on_the_first_row_alone(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(MIXED))
    check_columns(resolve_task(task(tmp_path)), "train")
    (tmp_path / "train.jsonl").write_text("\n".join(MIXED[3:]))
    with pytest.raises(UserError, match=r"train.jsonl:1: column 'text' is int, not text"):
        check_columns(resolve_task(task(tmp_path)), "train")
    with pytest.raises(UserError, match=r"has no test.jsonl"):
        check_columns(resolve_task(task(tmp_path)), "test")


def test_examples_are_read_as_they_are_needed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(MIXED))
    found = examples(resolve_task(task(tmp_path)), "train", Skipped())
    assert next(found).line == 1
    with pytest.raises(UserError, match=r"train.jsonl:2: not JSON"):
        next(found)
