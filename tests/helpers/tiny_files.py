"""A tiny Llama and tiny data, made from scratch, for scripts and fixtures alike."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = [*"anna tom meets buys gives a the red blue book cake to in at park station . : ?".split()]  # noqa: SIM905


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path) -> None:
    """40 training, 8 validation and 6 test rows with the columns ``text`` and ``answer``, of varied length."""
    for split, count, offset in (("train", 40, 0), ("validation", 8, 100), ("test", 6, 200)):
        rows = []
        for i in range(offset, offset + count):
            words = [WORDS[(i * 7 + j * (3 + i % 5)) % len(WORDS)] for j in range(3 + i % 6)]
            rows.append({"text": " ".join(words), "answer": " ".join(words[: 1 + i % 3])})
        write_rows(folder / f"{split}.jsonl", rows)


def make_model(folder: Path) -> None:
    """A random LlamaForCausalLM (2 layers of width 16) with a word-level tokenizer, in Hugging Face layout."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


NEW_TOKENS = ["<think>", "</think>"]


def grow_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer has `NEW_TOKENS`, beyond the rows of its embeddings."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([*(f"<filler{i}>" for i in range(rows - len(tokenizer))), *NEW_TOKENS])
    tokenizer.save_pretrained(folder)
    return folder


def make_labelled(folder: Path) -> None:
    """40 training and 12 validation rows with the columns ``sentence`` and ``label``, 1 where the sentence has "red".

    Of every five rows two have label 1.
    """
    for split, count, offset in (("train", 40, 0), ("validation", 12, 100)):
        rows = []
        for i in range(offset, offset + count):
            label = int(i % 5 in (1, 3))
            words = ["anna", "buys", "a", ("blue", "red")[label], *(WORDS[(i + j) % 4] for j in range(i % 4))]
            rows.append({"sentence": " ".join(words), "label": label})
        write_rows(folder / f"{split}.jsonl", rows)


def make_encoder(folder: Path) -> None:
    """A random BertModel (2 layers of width 16, with pooler, without head) with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

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
