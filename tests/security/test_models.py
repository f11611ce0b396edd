"""A base model's folder runs no code: no pickle, no module of its own, unless the settings say so, and then the log."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from helpers.contexts import open_context
from sparse_llm_ft.config import ModelConfig, merge, parse_config
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.loading import check_weights, empty_model, load_model


def config(folder: Path, **settings: object) -> ModelConfig:
    return ModelConfig(**{"name": str(folder), "dtype": "float32"} | settings)


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickled(source: Path, target: Path, mark: Path) -> Path:
    """The model folder with its weights in pickles only, as older releases of transformers wrote them; one a trap."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    return target


@pytest.mark.parametrize("kind", ["model", "encoder"])
def test_weights_in_a_pickle_are_refused_unread(
    kind: str, model_folder: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_mode = TaskMode("sequence_classification", 2) if kind == "encoder" else TaskMode()
    folder = pickled(encoder_folder if kind == "encoder" else model_folder, tmp_path / "pickled", tmp_path / "mark")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(ConfigError, match=r"model.name: .*weights in pytorch_model.bin, a pickle.*; expected model"):
        check_weights(config(folder))
    with pytest.raises(ConfigError, match=r"model.name: .* cannot be loaded"):
        load_model(config(folder), task_mode)
    assert not (tmp_path / "mark").exists()


def test_an_ordinary_pickle_of_weights_is_not_loaded_either(model_folder: Path, tmp_path: Path) -> None:
    """transformers itself would load this one."""
    folder = pickled(model_folder, tmp_path / "pickled", tmp_path / "mark")
    torch.save(load_model(config(model_folder)).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model.name: .* cannot be loaded"):
        load_model(config(folder))


def with_code(source: Path, target: Path, mark: Path) -> Path:
    """A model of an unknown kind, with the module that knows it."""
    shutil.copytree(source, target)
    settings = json.loads((target / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings |= {"model_type": "own", "auto_map": names, "architectures": ["OwnModel"]}
    (target / "config.json").write_text(json.dumps(settings))
    (target / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return target


def test_code_of_a_model_runs_only_where_the_setting_says_so(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    folder = with_code(Path(settings["model"]["name"]), tmp_path / "own", mark)
    for build in (empty_model, load_model):
        with pytest.raises(ConfigError, match=r"model.trust_remote_code: false, but .* needs code of its own"):
            build(config(folder))
    assert not mark.exists() and not parse_config(settings).model.trust_remote_code
    trusting = merge(settings, {"model": {"name": str(folder), "trust_remote_code": True}})
    setup = open_context(parse_config(trusting))
    assert type(setup.empty).__name__ == "OwnModel" and mark.exists()
    said = capsys.readouterr().out
    assert said.count("model.trust_remote_code is set: code from") == 1 and str(folder) in said.replace("\n", "")


def test_nothing_is_said_of_code_where_none_may_run(settings: dict, capsys: pytest.CaptureFixture[str]) -> None:
    open_context(parse_config(settings))
    assert "trust_remote_code" not in capsys.readouterr().out


def test_a_folder_with_an_adapter_in_it_is_no_base(model_folder: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, from wherever that is."""
    shutil.copytree(model_folder, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere"}')
    for build in (empty_model, load_model):
        with pytest.raises(ConfigError, match="holds an adapter; expected a model without one"):
            build(config(tmp_path / "both"))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "[" * 100_000, '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": "../llama"}', "\0"],
)
def test_a_damaged_description_is_one_line(model_folder: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(model_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model.name: .*") as error:
        empty_model(config(tmp_path / "damaged"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "foo"}, r"is a llama model that cannot be built \(KeyError: 'foo'\); expected one that"),
        ({"rope_parameters": {"rope_type": "foo"}}, r"is a llama model that cannot be built \(KeyError: 'foo'\)"),
        ({"num_key_value_heads": 0}, "is a llama model that cannot be built"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"model_type": "vit"}, "is a vit model; expected one that transformers can load as a causal language model"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_one_line(
    change: dict, message: str, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "odd")
    path = tmp_path / "odd" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"^model\.name: .*{message}"):
        empty_model(config(tmp_path / "odd"))


def test_weights_that_claim_terabytes_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "huge")
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}})
    data = len(header).to_bytes(8, "little") + header.encode()
    (tmp_path / "huge" / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"model.name: .* cannot be loaded"):
        load_model(config(tmp_path / "huge"))
