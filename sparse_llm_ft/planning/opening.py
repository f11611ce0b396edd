"""Opens a run for planning: its data may be missing, and of its base only config.json need be there."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_llm_ft.config import RunConfig, check_world
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.distributed.world import World

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def open_for_planning(config: RunConfig, world: World) -> RunContext:
    """As `RunContext.open`, which refuses what a run would refuse; but no data are read.

    Raises:
        ConfigError: naming the setting.
    """
    check_world(config, world.size)
    task, folder = resolve_task(config.task), Path(config.model.name)
    alone = folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS)
    return RunContext.open(config, world, task, tokenizer=stand_in() if alone else None)


def stand_in() -> PreTrainedTokenizerBase:
    """A tokenizer of three tokens, for a folder that has none: no text is read with it."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
