"""A base whose config ties embeddings and head, and whose checkpoint has two different ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.contexts import open_context
from sparse_llm_ft.config import ModelConfig, merge, parse_config
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.engine.build import build_model
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.model.tied import refuse_untied
from sparse_llm_ft.plan import FULL_MODEL

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


def with_tie(model_folder: Path, folder: Path, tie: bool = True) -> ModelConfig:
    shutil.copytree(model_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tie}))
    return ModelConfig(name=str(folder), dtype="float32")


@pytest.mark.parametrize("trained", [(FULL_MODEL,), (EMBEDDINGS,), (HEAD,)])
def test_what_the_config_ties_and_the_checkpoint_does_not_is_not_trained(
    trained: tuple[str, ...], model_folder: Path, tmp_path: Path
) -> None:
    """A run would end well, and none of its checkpoints could be read."""
    base = load_model(with_tie(model_folder, tmp_path / "two"))
    assert not torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)
    message = rf"^model\.name: 'it' has tie_word_embeddings .* {EMBEDDINGS}\.weight and {HEAD}\.weight differ; expected"
    with pytest.raises(ConfigError, match=message):
        refuse_untied(base, trained, "it")
    refuse_untied(base, ("model.norm",), "it")


@pytest.mark.parametrize("change", [{"method": "full"}, {"adapter": {"modules_to_save": ["embed_tokens"]}}])
def test_a_run_refuses_it_when_it_has_loaded_the_base(
    change: dict, settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    base = with_tie(model_folder, tmp_path / "two")
    context = open_context(parse_config(merge(settings, change | {"model": {"name": base.name}})))
    plan = context.first_phase().plan
    with pytest.raises(ConfigError, match=r"^model\.name: .* differ; expected tie_word_embeddings: false there"):
        build_model(context.config, context.task_mode, plan, {}, ONE_PROCESS, Console(0))


def test_one_table_or_two_as_the_config_says_are_trained(model_folder: Path, tmp_path: Path) -> None:
    base = load_model(with_tie(model_folder, tmp_path / "untied", tie=False))
    refuse_untied(base, (FULL_MODEL,), "it")
    base.lm_head.weight = base.model.embed_tokens.weight
    base.config.tie_word_embeddings = True
    base.save_pretrained(tmp_path / "tied")
    shutil.copy(tmp_path / "untied" / "tokenizer.json", tmp_path / "tied")
    refuse_untied(load_model(ModelConfig(name=str(tmp_path / "tied"), dtype="float32")), (FULL_MODEL,), "it")
