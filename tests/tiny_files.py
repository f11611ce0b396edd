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
