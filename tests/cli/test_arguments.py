"""How arguments are taken apart."""

from __future__ import annotations

import argparse

import pytest

from sparse_llm_ft.cli import run_commands
from sparse_llm_ft.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["a", "--seed", "1", "b"], ["a", "b"]),
        (["--seed", "1", "--", "-5", "--seed"], ["-5", "--seed"]),
        (["a", "--seed", "1", "b", "--", "-c"], ["a", "b", "-c"]),
        (["--", "-5"], ["-5"]),
    ],
)
def test_texts_may_stand_behind_options_and_begin_with_a_dash(
    arguments: list[str], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(run_commands, "_generate", seen.append)
    main(["generate", "RUN", *arguments])
    assert seen[0].texts == texts


def test_an_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "RUN", "a", "--sed", "1", "--", "-5"])
    assert (end.value.code, capsys.readouterr().err) == (2, "error: unrecognized arguments: --sed 1\n")
