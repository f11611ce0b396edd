"""An adapter folder from a stranger: what its configuration claims is refused before a layer is built."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from sparse_llm_ft.adapters import SparseLoraConfig, SparseLoraLayer
from sparse_llm_ft.adapters import layer as layers
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.plan import PlanError

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(model_folder: Path) -> Any:
    return load_model(ModelConfig(name=str(model_folder), dtype="float32"))


@pytest.fixture
def folder(base: Any, model_folder: Path, tmp_path: Path) -> Path:
    """A good adapter of rank 2 on one module."""
    model = get_peft_model(base, SparseLoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def claim(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    for key, value in changes.items():
        if key in settings["plan"]["modules"][NAME]:
            settings["plan"]["modules"][NAME][key] = value
        elif key == "module":
            settings["plan"]["modules"] = {value: settings["plan"]["modules"][NAME]}
        else:
            settings["plan"][key] = value
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "r is 1000000000; input should be less than or equal to 65536"),
        ({"r": 60_000}, "rank 60000 is larger than its matrix"),
        ({"r": 60_000, "tuner": "vera"}, "the plan is for tuner vera; expected sparse_lora"),
        ({"r": 60_000, "tuner": "adalora"}, "the plan is for tuner adalora; expected sparse_lora"),
        ({"rows": {"size": 10**12, "bits": ""}}, "a mask of size 1000000000000 has 0 bytes"),
        ({"rows": {"size": 8, "bits": "/w=="}}, "a mask of size 8 where its matrix has 16"),
        ({"module": "../../model.layers.0.self_attn.q_proj"}, "which is not a linear layer of the model"),
        ({"module": "/etc/passwd"}, "which is not a linear layer of the model"),
        ({"group": "../x"}, "group is '../x'; string should match pattern '^[^.]+$'"),
        ({"trained": ["../x"]}, "fully trains module '../x', which the model lacks"),
        ({"options": {"total_step": 10**12}}, "option 'total_step'"),
    ],
)
def test_claims_are_refused_before_a_layer_is_built(
    model_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, said: str
) -> None:
    base = load_model(ModelConfig(name=str(model_folder), dtype="float32"))
    claim(folder, **changes)
    monkeypatch.setattr(layers, "Pair", lambda *args: pytest.fail("a layer was built"))
    with pytest.raises(PlanError) as error:
        PeftModel.from_pretrained(base, folder)
    assert said in str(error.value) and str(error.value).isprintable()
    assert not any(isinstance(module, SparseLoraLayer) for module in base.modules())


def test_the_good_one_is_good_and_one_of_other_shapes_an_error(model_folder: Path, folder: Path) -> None:
    load = lambda: PeftModel.from_pretrained(  # noqa: E731
        load_model(ModelConfig(name=str(model_folder), dtype="float32")), folder
    )
    load()
    claim(folder, r=3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load()


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickled_adapter_runs_nothing(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Trap(tmp_path / "mark"), folder / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(load_model(ModelConfig(name=str(model_folder), dtype="float32")), folder)
    assert not (tmp_path / "mark").exists()
