"""Chat templates: their arguments, a file in their place, the date they ask for, the end of turns, opened thoughts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.contexts import open_context
from sparse_llm_ft.config import TaskConfig, dump_config, load_config, parse_config
from sparse_llm_ft.data.chat import ChatFormat, apply_chat_settings, with_date
from sparse_llm_ft.data.rows import Example
from sparse_llm_ft.data.tokenization import CausalLMPreprocessor
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.training.run import Run

WORLD = World(0, 1, 0, 1)
DATED = "{{ strftime_now('%Y %S') }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
TURNS = "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }}<end>\n{% endfor %}"
PROMPTED = TURNS + "{% if add_generation_prompt %}<start> assistant {% endif %}"
THINKING = (
    TURNS
    + "{% if add_generation_prompt %}<start> assistant {% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% else %}<think>{% endif %}{% endif %}"
)
ENDLESS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    found = AutoTokenizer.from_pretrained(model_folder)
    found.add_tokens(["<start>", "<end>", "<think>", "</think>"], special_tokens=True)
    return found


def chat(tokenizer: Any, template: str, **settings: Any) -> ChatFormat:
    tokenizer.chat_template = None
    return apply_chat_settings(tokenizer, TaskConfig(name="custom", chat_template=template, **settings), True)


def test_arguments_reach_the_template(tokenizer) -> None:
    turns = [{"role": "user", "content": "anna"}]
    usual = chat(tokenizer, THINKING)
    without = chat(tokenizer, THINKING, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(usual.prompt_ids(turns)).replace(" ", "").endswith("<think>")
    assert tokenizer.decode(without.prompt_ids(turns)).replace(" ", "").endswith("<think></think>")


def test_opened_thoughts_are_a_warning_with_what_closes_them(tokenizer) -> None:
    (_, warning) = chat(tokenizer, THINKING).remarks()
    assert "opens <think>" in warning and "task.chat_template_kwargs.enable_thinking=false" in warning
    closed = chat(tokenizer, THINKING, chat_template_kwargs={"enable_thinking": False})
    assert closed.opened is None and chat(tokenizer, PROMPTED).opened is None
    assert chat(tokenizer, ENDLESS + "{% if add_generation_prompt %}[THINK]{% endif %}").opened == "[THINK]"


def test_a_completion_ends_with_the_token_that_ends_turns(tokenizer) -> None:
    row = Example("anna", "red", ("red",))
    for template, end in ((PROMPTED, "<end>"), (ENDLESS, tokenizer.eos_token), (DATED, tokenizer.eos_token)):
        format = chat(tokenizer, template)
        sample = CausalLMPreprocessor(tokenizer, 64, chat=format)(row)
        assert tokenizer.convert_ids_to_tokens(list(sample.completion_ids)) == ["red", end], template
    tokenizer.chat_template = None
    assert ChatFormat(tokenizer).end_token_id == tokenizer.eos_token_id
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert ChatFormat(tokenizer).end_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (
            THINKING,
            {"enable_thinkng": False},
            "task.chat_template_kwargs: 'enable_thinkng' is no argument .*enable_thinking",
        ),
        (THINKING, {"tokenize": False}, "task.chat_template_kwargs: 'tokenize' is no argument of the chat template"),
        (DATED, {"strftime_now": "x"}, "'strftime_now' is no argument of the chat template; known there: none"),
        (None, {"x": 1}, "'x', but the tokenizer has no chat template; expected none"),
        ("{% for %}", {}, "task.chat_template: line 1 is no Jinja"),
    ],
)
def test_wrong_templates_and_arguments_are_one_line(tokenizer, template, arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat(tokenizer, template, chat_template_kwargs=arguments)


def test_models_that_see_plain_texts_take_no_template(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"task.chat_template: given, but this model sees plain texts"):
        apply_chat_settings(tokenizer, TaskConfig(name="custom", chat_template=PROMPTED), False)


def test_the_date_is_that_of_the_settings(tokenizer) -> None:
    turns = [{"role": "user", "content": "anna"}]
    format = chat(tokenizer, DATED, date="1999-05-01T12:30:07")
    assert format.uses_date and format._apply(turns, tokenize=False) == "1999 07 anna "
    assert chat(tokenizer, DATED)._apply(turns, tokenize=False)[:4] == str(datetime.now().year)
    assert not chat(tokenizer, PROMPTED).uses_date
    task = TaskConfig(name="custom", chat_template=DATED)
    assert with_date(task, format, "2001-01-01", str).date == "2001-01-01"
    assert with_date(task, format, None, lambda _: "2002-02-02").date == "2002-02-02"
    assert with_date(task, chat(tokenizer, PROMPTED), None, str).date is None


def test_a_run_keeps_the_date_it_began_with(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(DATED, encoding="utf-8")
    settings["task"]["chat_template"] = str(tmp_path / "dated.jinja")
    first = Run.prepare(open_context(parse_config(settings), WORLD))
    date = first.config.task.date
    assert date is not None and abs((datetime.now() - datetime.fromisoformat(date)).total_seconds()) < 600
    # A run that goes on finds it in its folder, whenever that is; so do `evaluate` and `generate`.
    began = first.config.model_copy(
        update={"task": first.config.task.model_copy(update={"date": "1999-05-01T12:30:07"})}
    )
    first.folder.path.mkdir(parents=True)
    (first.folder.path / "config.yaml").write_text(dump_config(began), encoding="utf-8")
    first.folder.check(parse_config(settings))
    again = Run.prepare(open_context(parse_config(settings), WORLD))
    assert again.config.task.date == first.folder.config().task.date == "1999-05-01T12:30:07"
    assert again.splits.key != first.splits.key
    assert first.folder.identity(again.config) == first.folder.identity(parse_config(settings))


def test_a_template_of_a_file_is_kept_with_the_settings(settings: dict, tmp_path: Path) -> None:
    settings["task"]["chat_template"] = str(tmp_path / "own.jinja")
    with pytest.raises(ConfigError, match=r"task.chat_template: .*own.jinja' cannot be read .*; expected a file"):
        parse_config(settings)
    (tmp_path / "own.jinja").write_text("hello", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no Jinja"):
        parse_config(settings)
    (tmp_path / "own.jinja").write_text(PROMPTED, encoding="utf-8")
    config = parse_config(settings)
    (tmp_path / "own.jinja").unlink()
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config([str(tmp_path / "config.yaml")]).task.chat_template == PROMPTED
    with pytest.raises(ConfigError, match=r"task.date: 'soon' is not allowed; expected a date in ISO 8601"):
        parse_config(settings | {"task": settings["task"] | {"chat_template": None, "date": "soon"}})
