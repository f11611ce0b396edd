"""A new method is one file: another package adds one by an entry point, and no file of this package knows a name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_llm_ft
from helpers.method_settings import config
from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.adapters.tuners import TUNERS
from sparse_llm_ft.config import registry
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.plan import Shape, uniform_plan

METHOD = """
from dataclasses import replace

from pydantic import Field

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.methods.method import Method


class LastLayersSettings(MethodSettings):
    layers: int = Field(2, ge=1)


class LastLayers(Method[LastLayersSettings]):
    settings_class = LastLayersSettings

    def begin(self, phase, state, targets):
        layers = list(dict.fromkeys(name.split(".")[2] for name in targets))[-self.settings.layers:]
        modules = {n: a if n.split(".")[2] in layers else None for n, a in phase.plan.modules.items()}
        return replace(phase, plan=replace(phase.plan, modules=modules)), state
"""
ENTRY_POINTS = """[sparse_llm_ft.methods]
last_layers = last_layers_package:LastLayers
lora = last_layers_package:LastLayers
broken = last_layers_package:Missing
settingless = last_layers_package:replace
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package with methods, as pip would leave it."""
    (tmp_path / "last_layers_package.py").write_text(METHOD)
    metadata = tmp_path / "last_layers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: last-layers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    forget()


def forget() -> None:
    invalidate_caches()
    registry.find_method.cache_clear()
    registry._installed.cache_clear()


def tiny_targets() -> dict[str, Shape]:
    """The linear layers of a Llama with four layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 4}
    with torch.device("meta"):
        return find_targets(LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)), "all-linear")


@pytest.mark.usefixtures("installed")
def test_the_method_of_another_package_is_a_method_like_any_other() -> None:
    targets = tiny_targets()
    chain = build_methods(config({"name": "last_layers", "layers": 1}), total_steps=20)
    first = chain.first(uniform_plan(targets, 2, 6.0), targets)
    assert set(first.plan.active) == {name for name in targets if name.startswith("model.layers.3.")}
    assert first.open_ended and chain.resumed(first) == first
    assert "last_layers" in registry.method_names()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "last_layers", "layer": 1}, r"method\.layer: unknown key; did you mean layers\?"),
        ({"name": "last_layers", "layers": 0}, r"method\.layers: 0 is not allowed; expected greater than or equal to"),
        ("last_layer", r"method\.name: 'last_layer' is unknown; did you mean last_layers\?"),
        (["last_layers", "tied_lora"], r"last_layers does not say how it composes"),
        ("broken", r"method\.name: 'broken': last_layers_package:Missing cannot be imported \(AttributeError"),
        ("settingless", r"method\.name: 'settingless': last_layers_package:replace has no settings_class"),
    ],
)
def test_its_settings_are_checked_like_any_others(method: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(method)


@pytest.mark.usefixtures("installed")
def test_a_built_in_name_cannot_be_taken() -> None:
    assert registry.find_method("lora").__module__ == "sparse_llm_ft.methods.peft_baselines"


def test_every_line_of_the_registry_leads_to_a_method_of_that_name() -> None:
    from sparse_llm_ft.methods.method import Method

    for name in registry.METHODS:
        assert issubclass(registry.find_method(name), Method)
        assert "name" in registry.find_settings(name).model_fields


def test_no_methods_file_imports_torch_before_it_is_needed() -> None:
    code = (
        "import sys\n"
        "from sparse_llm_ft.config.registry import METHODS, find_method\n"
        "for name in METHODS: find_method(name)\n"
        "slow = {'torch', 'transformers', 'peft', 'deepspeed', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def quoted(path: Path) -> set[str]:
    """The string constants of a file, docstrings left out: those stand alone as a statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    }


def test_no_other_file_knows_a_methods_name() -> None:
    """Some methods are called as PEFT's tuner that they train; the tuner's name is in plans, which adapters/ reads."""
    package = Path(sparse_llm_ft.__file__).parent
    names = set(registry.METHODS) - set(TUNERS)
    assert "weight_lora" in names and "full" in names
    found = {
        str(path.relative_to(package)): known
        for path in package.rglob("*.py")
        if path.parent.name != "methods" and path != Path(registry.__file__) and (known := names & quoted(path))
    }
    assert found == {}
