"""What can fail at the end of a run fails before its beginning, in every command that opens a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from helpers.contexts import open_context
from helpers.trained_runs import PLANS
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.errors import ConfigError, UserError
from sparse_llm_ft.export import trial
from sparse_llm_ft.export.trial import try_export
from sparse_llm_ft.plan import AdapterPlan
from sparse_llm_ft.training.run import Run

FULL = {"method": {"name": "full"}}
FAULTS: dict[str, tuple[type, Any]] = {
    "tokenizer": (PreTrainedTokenizerBase, OSError("no vocabulary")),
    "config": (PreTrainedConfig, TypeError("Object of type dtype is not JSON serializable")),
    "model": (PreTrainedModel, RuntimeError("shared tensors")),
}


@pytest.mark.parametrize("name", [name for name in PLANS if name != "full"])
def test_the_adapters_of_every_tuner_pass(name: str, settings: dict) -> None:
    try_export(open_context(parse_config(settings)), PLANS[name])


def test_a_head_beside_adapters_passes(settings: dict, encoder_folder: Path, labelled_folder: Path) -> None:
    settings["task"] = {"name": "custom", "path": str(labelled_folder), "labels": ["no", "yes"], "texts": ["sentence"]}
    settings["evaluation"]["samples"] = 0
    context = open_context(parse_config(merge(settings, {"model": {"name": str(encoder_folder)}})))
    assert context.plan.trained == ("classifier",)
    try_export(context, context.plan)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_model_folder_cannot_hold_is_refused_before_the_run(
    fault: str, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, error = FAULTS[fault]

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(kind, "save_pretrained", fail)
    context = open_context(parse_config(merge(settings, FULL)))
    with pytest.raises(
        ConfigError, match=rf"^model.name: what a run would make of .*{error}.*; expected a model whose"
    ):
        Run.prepare(context)
    assert not Path(settings["output_dir"]).exists()


def test_a_template_that_gets_lost_is_refused(settings: dict, model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
    save = PreTrainedTokenizerBase.save_pretrained

    def lossy(self: PreTrainedTokenizerBase, target: Path, **options: Any) -> None:
        save(self, target, **options)
        (Path(target) / "chat_template.jinja").unlink()

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", lossy)
    context = open_context(parse_config(merge(settings, FULL | {"model": {"name": str(folder)}})))
    with pytest.raises(ConfigError, match="the saved tokenizer has another chat template"):
        Run.prepare(context)


def test_modules_that_peft_would_confuse_are_refused(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    context = open_context(parse_config(settings))
    adapter = trial.peft_adapter

    def confused(plan: AdapterPlan, *arguments: Any) -> Any:
        config, weights = adapter(plan, *arguments)
        return config | {"target_modules": ["q_proj"]}, weights

    monkeypatch.setattr(trial, "peft_adapter", confused)
    with pytest.raises(ConfigError, match=r"adapter.target_modules: .*lora_A.weight would be"):
        try_export(context, context.plan)


def test_a_machine_without_room_for_the_trial_says_so(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial.tempfile, "TemporaryDirectory", full)
    with pytest.raises(UserError, match=r"^TMPDIR: no temporary folder can be made .*No space left"):
        Run.prepare(open_context(parse_config(settings)))


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)", "No space left (os error 28)"])
def test_a_disk_that_fills_up_in_the_trial_is_not_the_models_fault(
    text: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizers and safetensors have errors of their own for it."""

    def full(*_: Any) -> None:
        raise Exception(text)

    monkeypatch.setattr(trial, "_try_adapter", full)
    with pytest.raises(UserError, match=r"^TMPDIR: .* has no room \(.*os error 28\)\); expected a folder with room"):
        Run.prepare(open_context(parse_config(settings)))
