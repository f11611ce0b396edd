"""Rows -> examples: labels, scores, chats, spans and triples, each with what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.rows import Example, examples_of
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import BadRow, MissingColumn


def read(row: dict[str, Any], **settings: Any) -> list[Example]:
    task = resolve_task(TaskConfig(**{"name": "custom", "path": "."} | settings))
    return [example for _, example in examples_of(task, row, "file", 7)]


def one(row: dict[str, Any], **settings: Any) -> Example:
    (example,) = read(row, **settings)
    assert (example.source, example.line) == ("file", 7)
    return example


def test_a_column_of_the_prompt_may_be_empty_as_long_as_another_is_not() -> None:
    alpaca = {"prompt": "{instruction}\n{input}", "completion": "{output}"}
    row = {"instruction": "Sing.", "input": None, "output": "La."}
    assert one(row, **alpaca).prompt == "Sing.\n"
    with pytest.raises(BadRow, match="column 'instruction', 'input' is empty"):
        read({**row, "instruction": " "}, **alpaca)


def test_each_text_of_an_encoder_is_needed() -> None:
    with pytest.raises(BadRow, match="column 'question2' is empty"):
        read({"question1": "Why?", "question2": "", "label": 0}, name="glue/qqp")


@pytest.mark.parametrize(("value", "label"), [(1, 1), ("1", 1), (" 0 ", 0), ("good", 1)])
def test_a_label_is_its_word_or_its_number_also_as_text(value: Any, label: int) -> None:
    example = one({"t": "a", "label": value}, labels=("bad", "good"), texts=("t",))
    assert example.label == label and example.completion == (" bad", " good")[label]


def test_a_label_word_that_is_a_number_is_that_word() -> None:
    assert one({"t": "a", "label": "0"}, labels=("1", "0"), texts=("t",)).label == 1


@pytest.mark.parametrize("value", ["2", "-1", "", "1.0", 1.0, "9" * 5000, None, True, [1]])
def test_what_is_no_label_is_refused_with_the_labels(value: Any) -> None:
    with pytest.raises(BadRow, match="is not 0 to 1"):
        read({"t": "a", "label": value}, labels=("bad", "good"), texts=("t",))


@pytest.mark.parametrize(("value", "number"), [(1, 0), ("2", 1), (2.0, 1), ("3.0", 2), (3, 2), ("1.00", 0)])
@pytest.mark.parametrize("labels", [("1.0", "2.0", "3.0"), ("1", "2", "3")])
def test_grades_with_a_point_are_words_too(value: Any, number: int, labels: tuple[str, ...]) -> None:
    """1 is the word 1.0, and not the second label."""
    example = one({"t": "a", "label": value}, labels=labels, texts=("t",))
    assert example.label == number and example.completion == f" {labels[number]}"
    with pytest.raises(BadRow, match=r"is not one of task\.labels"):
        read({"t": "a", "label": 0}, labels=labels, texts=("t",))


def test_half_grades() -> None:
    assert one({"t": "a", "label": 1.5}, labels=("1", "1.5"), texts=("t",)).label == 1


@pytest.mark.parametrize("value", [1, "1"])
@pytest.mark.parametrize(("labels", "number"), [(("1", "0"), 0), (("1", "2", "3"), 0), (("no", "yes"), 1)])
def test_a_number_is_the_word_where_words_are_numbers(value: Any, labels: tuple[str, ...], number: int) -> None:
    assert one({"t": "a", "label": value}, labels=labels, texts=("t",)).label == number


@pytest.mark.parametrize(("value", "number"), [(" 1", 0), ("2 ", 1), ("03", 2), (3, 2)])
def test_a_number_is_that_word_however_a_table_writes_it(value: Any, number: int) -> None:
    assert one({"t": "a", "label": value}, labels=("1", "2", "3"), texts=("t",)).label == number


@pytest.mark.parametrize("value", [0, "0", " 0", 4, -1, 1.5, float("nan"), None, "one"])
def test_where_words_are_numbers_another_number_is_no_index(value: Any) -> None:
    """Labels from 0 to 2 beside the words 1, 2, 3 would make one class of 0 and 1."""
    with pytest.raises(BadRow, match=r"is not one of task\.labels, 1, 2, 3"):
        read({"t": "a", "label": value}, labels=("1", "2", "3"), texts=("t",))


@pytest.mark.parametrize("answer", ["", " ", None])
def test_a_template_does_not_fill_an_empty_completion(answer: Any) -> None:
    with pytest.raises(BadRow, match="the completion is empty"):
        read({"t": "a", "answer": answer}, prompt="{t}", completion="Answer: {answer}")


@pytest.mark.parametrize(
    ("value", "score", "completion"),
    [(3.799999952316284, 3.799999952316284, " 3.8"), (5, 5.0, " 5.0"), ("0", 0.0, " 0.0"), ("2.25", 2.25, " 2.2")],
)
def test_a_score_is_written_with_one_decimal(value: Any, score: float, completion: str) -> None:
    example = one({"sentence1": "a", "sentence2": "b", "label": value}, name="glue/stsb")
    assert example.label == score and isinstance(example.label, float)
    assert example.completion == completion and example.references == (completion.strip(),)
    assert example.texts == ("a", "b")


@pytest.mark.parametrize("value", [5.1, -1, "high", None, True, float("nan"), 10**400, "nan"])
def test_what_is_no_score_is_refused_with_its_bounds(value: Any) -> None:
    with pytest.raises(BadRow, match=r"score .* is not a number from 0 to 5"):
        read({"sentence1": "a", "sentence2": "b", "label": value}, name="glue/stsb")


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]


def test_earlier_answers_are_not_learned_whatever_their_weight() -> None:
    turns = [TURNS[1], {**TURNS[2], "weight": 0}, TURNS[1], {**TURNS[2], "weight": 1}]
    assert one({"turns": turns}, messages="turns").completion == "Ho"


def test_the_last_turn_of_a_chat_is_its_completion() -> None:
    example = one(
        {"turns": [*TURNS[:2], {**TURNS[2], "id": 3, "tool_calls": None}], "other": "Hey"},
        messages="turns",
        references=("other",),
    )
    assert example.messages == tuple(TURNS[:2]) and example.completion == "Ho"
    assert example.references == ("Ho", "Hey")
    assert example.prompt == "system:\nBe brief.\n\nuser:\nHi\n\nassistant:\n"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hi", "column 'turns' is not a list of two or more turns"),
        (TURNS[:1], "not a list of two or more turns"),
        (TURNS[:2], "the last turn of column 'turns' is the user's, not the assistant's"),
        (TURNS[::2], "column 'turns' has no turn of the user"),
        ([{"from": "human", "value": "x"}, TURNS[2]], "turn 1 of column 'turns' has from, value; needed role, content"),
        (["x", TURNS[2]], "turn 1 of column 'turns' has str; needed role, content"),
        ([{"role": "bot", "content": "x"}, TURNS[2]], "turn 1 .*: role 'bot' is not system, user, assistant"),
        ([{"role": ["user"], "content": "x"}, TURNS[2]], r"turn 1 .*: role \['user'\] is not system"),
        ([{"role": "user", "content": ["x"]}, TURNS[2]], "column 'content' is list, not text"),
        ([TURNS[1], {"role": "assistant", "content": None}], "turn 2 of column 'turns' is empty"),
        (
            [TURNS[1], {**TURNS[2], "tool_calls": [{"id": "1"}]}],
            "turn 2 of column 'turns' has tool_calls, and only content is read; expected text alone",
        ),
        ([TURNS[1], {**TURNS[2], "reasoning_content": "long thoughts"}], "turn 2 .* has reasoning_content, and only"),
        ([{**TURNS[1], "images": ["a.png"]}, TURNS[2]], "turn 1 .* has images, and only content is read"),
        ([TURNS[1], {**TURNS[2], "weight": 0}], "the last turn of column 'turns' has weight 0, and only the last turn"),
    ],
)
def test_what_is_no_chat_is_refused(turns: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        read({"turns": turns}, messages="turns")


@pytest.mark.parametrize("tools", [[{"name": "search"}], '[{"name": "search"}]'])
@pytest.mark.parametrize("column", ["tools", "functions", "images"])
def test_a_chat_with_tools_is_refused(column: str, tools: Any) -> None:
    with pytest.raises(BadRow, match=f"column '{column}' belongs to the chat, and is not given to its template"):
        read({"turns": TURNS, column: tools}, messages="turns")


@pytest.mark.parametrize("none", [None, [], {}, "", " [] ", "null"])
def test_a_chat_without_any_tools_is_used(none: Any) -> None:
    assert one({"turns": TURNS, "tools": none}, messages="turns").completion == "Ho"
    assert one({"tools": TURNS}, messages="tools").completion == "Ho"


SQUAD = {
    "question": "Where?",
    "context": "In Rome, in Rome.",
    "answers": {"text": ["Rome", "in Rome"], "answer_start": [3, 9]},
}


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_every_answer_of_a_question_counts_and_stands_where_it_is_said(name: str) -> None:
    example = one(SQUAD, name=name)
    assert example.answers == (("Rome", 3), ("in Rome", 9)) and example.texts == ("Where?", "In Rome, in Rome.")
    assert all(example.texts[1][start : start + len(text)] == text for text, start in example.answers)
    assert example.completion == " Rome" and example.references == ("Rome", "in Rome")


def test_a_question_without_answer_is_said_to_be_unanswerable() -> None:
    row = {**SQUAD, "answers": {"text": [], "answer_start": []}}
    example = one(row, name="squad_v2")
    assert example.answers == () and example.completion == " unanswerable" and example.references == ()
    with pytest.raises(BadRow, match="column 'answers' is empty; questions without answer need task squad_v2"):
        read(row, name="squad")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["Rome"], "answer_start": [4]}, "answer 'Rome' is not at character 4 of column 'context'"),
        ({"text": ["Rome"], "answer_start": [-5]}, "is not at character -5"),
        ({"text": ["Rome"], "answer_start": []}, "of equal lengths"),
        ({"text": "Rome", "answer_start": [3]}, "column 'answers' is not"),
        ("{'text': ['Rome']}", "column 'answers' is not"),
        ({"text": ["Rome"], "answer_start": ["3"]}, "has 'Rome' at '3', expected a text and an integer"),
        ({"text": [" "], "answer_start": [2]}, "has ' ' at 2"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(answers: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        read({**SQUAD, "answers": answers}, name="squad")


TRIPLES = [["A", "AREA", "river"], ["A", "SINCE", "1998"]]


@pytest.mark.parametrize(
    "annotations",
    [
        {"source": ["x", "y"], "text": ["One.", "Two."]},
        [{"source": "x", "text": "One."}, {"source": "y", "text": "Two."}],
    ],
)
def test_dart_has_a_row_for_each_sentence_about_its_triples(annotations: Any) -> None:
    task = resolve_task(TaskConfig(name="dart"))
    pairs = list(examples_of(task, {"tripleset": TRIPLES, "annotations": annotations}, "file", 1))
    assert [example.completion for _, example in pairs] == [" One.", " Two."]
    assert {key for key, _ in pairs} == {"A | AREA | river ; A | SINCE | 1998"}
    assert all("A | AREA | river ; A | SINCE | 1998" in example.prompt for _, example in pairs)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tripleset": [["A", "B"]], "annotations": []}, "column 'tripleset' is not a list of"),
        ({"tripleset": [], "annotations": []}, "column 'tripleset' is not a list of"),
        ({"tripleset": TRIPLES, "annotations": []}, "column 'annotations' has no list of texts"),
        ({"tripleset": TRIPLES, "annotations": {"text": [3]}}, "column 'text' is int, not text"),
        ({"tripleset": TRIPLES, "annotations": ["One."]}, "the completion is empty"),
    ],
)
def test_triples_that_cannot_be_used_are_refused(row: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        read(row, name="dart")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("dart", {"tripleset": TRIPLES}, "no column 'annotations'; found tripleset; needed annotations"),
        ("squad", {"question": "a", "context": "b"}, "no column 'answers'; found question, context; needed answers"),
        ("xsum", {}, "no column 'document'; found none; needed document, summary"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(name: str, row: dict, message: str) -> None:
    with pytest.raises(MissingColumn, match=message):
        read(row, name=name)
