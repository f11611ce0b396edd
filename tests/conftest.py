"""A tiny Llama, a tiny BERT and tiny data sets, made from scratch: no test needs anything but the repository."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_files import WORDS, make_data, make_model, write_rows
from tiny_run import run_settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training, 8 validation and 6 test rows with the columns ``text`` and ``answer``, of varied length."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForCausalLM (2 layers of width 16) with a word-level tokenizer, in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 12 validation rows with the columns ``sentence`` and ``label``, 1 where the sentence has "red".

    Of every five rows two have label 1.
    """
    folder = tmp_path_factory.mktemp("labelled")
    for split, count, offset in (("train", 40, 0), ("validation", 12, 100)):
        rows = []
        for i in range(offset, offset + count):
            label = int(i % 5 in (1, 3))
            words = ["anna", "buys", "a", ("blue", "red")[label], *(WORDS[(i + j) % 4] for j in range(i % 4))]
            rows.append({"sentence": " ".join(words), "label": label})
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertModel (2 layers of width 16, with pooler, without head) with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_folder: Path, data_folder: Path, tmp_path: Path) -> dict:
    """A complete tree of settings for a run of 8 steps on the tiny model."""
    return run_settings(model_folder, data_folder, tmp_path / "run")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for what is a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
