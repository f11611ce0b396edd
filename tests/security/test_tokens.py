"""Access tokens stay out of config.yaml, log, errors and summary."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from sparse_llm_ft.config import dump_config, load_config, merge, parse_config
from sparse_llm_ft.distributed.exit_status import one_line_errors
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import CheckpointError, ConfigError, DataError, UserError, holds_token, redact
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.plan import PlanError
from sparse_llm_ft.run_folder import RunFolder

TOKEN = "hf_" + "aB3dE5gH7j" * 3 + "kLmN"
ODD = "s3cret-of-no-known-form"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model.name", f"https://user:{TOKEN}@huggingface.co/org/model"),
        ("model.name", "https://user:password@huggingface.co/org/model"),
        ("model.name", f"org/{TOKEN}"),
        ("model.revision", TOKEN),
        ("task.prompt", f"{{text}} {TOKEN}"),
        ("task.labels", ["yes", TOKEN]),
        ("output_dir", f"/tmp/{TOKEN}"),
        ("deepspeed.wandb", {"enabled": True, "team": TOKEN}),
        ("deepspeed.wandb", {TOKEN: 1}),
        ("model.revision", ODD),
    ],
)
def test_a_setting_with_a_token_is_refused_without_saying_it(
    settings: dict, monkeypatch: pytest.MonkeyPatch, where: str, value: object
) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    section, _, name = where.partition(".")
    with pytest.raises(ConfigError, match=r"holds an access token; .*HF_TOKEN") as error:
        parse_config(merge(settings, {section: {name: value} if name else value}))
    assert str(error.value).startswith(section)
    assert not any(secret in str(error.value) for secret in (TOKEN, ODD, "password"))


def test_a_url_is_no_model(settings: dict) -> None:
    with pytest.raises(ConfigError, match="is a URL; expected a hub id, or a local folder"):
        parse_config(merge(settings, {"model": {"name": "https://huggingface.co/org/model"}}))


def test_a_token_in_an_override_is_not_repeated(tmp_path: Path) -> None:
    for override in (f"model.revision={TOKEN}", f"model.{TOKEN}=1", f"={TOKEN}", f"model.revision=[{TOKEN}"):
        with pytest.raises(UserError) as error:
            load_config([], [override])
        assert TOKEN not in str(error.value)


def test_every_error_is_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    text = f"401 for https://u:{TOKEN}@host/x with {ODD}\nand {TOKEN}"
    made = (UserError(text), ConfigError("a.b", text, text), DataError("f", 1, text), CheckpointError(text))
    for error in (*made, PlanError(text)):
        assert TOKEN not in str(error) and ODD not in str(error) and "\n" not in str(error)


def test_an_error_of_the_hub_reaches_the_terminal_without_its_token(
    settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig

    from sparse_llm_ft.model.loading import empty_model

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(f"401 Unauthorized: Bearer {TOKEN} for https://me:{TOKEN}@huggingface.co")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(SystemExit), one_line_errors(World(0, 1, 0, 1)):
        empty_model(parse_config(settings).model)
    said = capsys.readouterr().err
    assert said.startswith("error: model.name: ") and "***" in said and TOKEN not in said


def test_the_log_is_without_tokens() -> None:
    console = Console(rank=0)
    console.rich = RichConsole(file=io.StringIO(), width=200)
    console.log(f"loading https://u:{TOKEN}@host/model and {TOKEN}")
    assert console.rich.file.getvalue() == "loading https://***@host/model and ***\n"


def test_the_environment_does_not_get_into_the_run_folder(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = parse_config(settings)
    RunFolder(config.output_dir).begin(config, 0)
    written = [path.read_text() for path in Path(config.output_dir).rglob("*") if path.is_file()]
    assert written and TOKEN not in "".join(written) and TOKEN not in dump_config(config)


def test_what_is_no_token_stays(settings: dict) -> None:
    for text in ("hf_transfer", "runs/hf_llama_8b", "meta-llama/Llama-3", "a@b", "see http://host/@x", sys.executable):
        assert redact(text) == text and not holds_token(text)
    parse_config(merge(settings, {"task": {"prompt": "{text} you@example.org"}}))
