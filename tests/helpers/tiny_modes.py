"""A tiny T5 and a tiny BART, and tiny data for each kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.tiny_files import WORDS, write_rows

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SCORE = (0.0, 5.0)


def make_t5(folder: Path) -> None:
    """A random T5ForConditionalGeneration (2 and 2 layers of width 16, shared embeddings), whose texts end in </s>."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    count = _make_tokenizer(folder, "$A </s>", "$A </s> $B </s>")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=count, **sizes, **tokens, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def make_bart(folder: Path) -> None:
    """A random BartForConditionalGeneration (2 and 2 layers of width 16), whose texts stand between <s> and </s>."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    count = _make_tokenizer(folder, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    torch.manual_seed(0)
    layers = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=count, **layers, **sizes, **tokens, dropout=0.0, init_std=0.3)
    model = BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 1
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(folder)


def _make_tokenizer(folder: Path, single: str, pair: str) -> int:
    """Words and special tokens; the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = [(token, vocabulary[token]) for token in SPECIAL[1:3]]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(vocabulary)


def make_summaries(folder: Path) -> None:
    """40 training and 9 validation rows: ``text``, and in ``summary`` and ``other`` two ways to say who buys what."""
    for split, count, offset in (("train", 40, 0), ("validation", 9, 100)):
        rows = []
        for i in range(offset, offset + count):
            who, what = ("anna", "tom")[i % 2], ("book", "cake")[i // 2 % 2]
            where = " ".join(["in the park", "at the station"][: 1 + i % 3 % 2])
            text = f"{who} meets tom {where} : {who} buys a red {what} ."
            rows.append({"text": text, "summary": f"{who} buys a {what} .", "other": f"the {what} to {who}"})
        write_rows(folder / f"{split}.jsonl", rows)


def make_scored(folder: Path) -> None:
    """40 training and 9 validation pairs with a ``score`` from 0 to 5, which grows with the words that both have."""
    for split, count, offset in (("train", 40, 0), ("validation", 9, 100)):
        rows = []
        for i in range(offset, offset + count):
            common = i % 5
            first = ["anna", *WORDS[4 : 4 + common], *["blue"] * (i % 3)]
            second = ["tom", *WORDS[4 : 4 + common], "red"]
            rows.append({"first": " ".join(first), "second": " ".join(second), "score": 1.1 * common + i % 3 / 10})
        write_rows(folder / f"{split}.jsonl", rows)


def make_answers(folder: Path, unanswerable: bool = False) -> None:
    """40 training and 9 validation rows as SQuAD's: where somebody is; of every third nothing is said, if asked for."""
    for split, count, offset in (("train", 40, 0), ("validation", 9, 100)):
        rows: list[dict[str, Any]] = []
        for i in range(offset, offset + count):
            place, who = ("the park", "the station")[i % 2], ("anna", "tom")[i // 2 % 2]
            context = f"{who} buys a cake . " * (i % 3) + f"{who} meets anna in {place} . the book : red ."
            answers = {"text": [place, place[4:]], "answer_start": [context.index(place), context.index(place) + 4]}
            if unanswerable and i % 3 == 0:
                context, answers = context.replace(f"in {place} ", ""), {"text": [], "answer_start": []}
            rows.append({"id": str(i), "context": context, "question": f"{who} in ?", "answers": answers})
        write_rows(folder / f"{split}.jsonl", rows)


def make_inferences(folder: Path) -> None:
    """40 training and twice 9 validation rows as MNLI's, in files named as the hub's splits."""
    for name, count, offset in (("train", 40, 0), ("validation_matched", 9, 100), ("validation_mismatched", 7, 200)):
        rows = []
        for i in range(offset, offset + count):
            words = [WORDS[(i * 7 + j * (3 + i % 5)) % len(WORDS)] for j in range(3 + i % 6)]
            rows.append({"premise": " ".join(words), "hypothesis": " ".join(words[: 1 + i % 2]), "label": i % 3})
        write_rows(folder / f"{name}.jsonl", rows)


SUMMARIES: Mapping[str, Any] = {
    "name": "custom",
    "prompt": "{text} ?",
    "completion": "{summary}",
    "references": ["other"],
    "metrics": ["rouge", "bleu"],
    "max_length": 40,
}
SCORED: Mapping[str, Any] = {
    "name": "custom",
    "prompt": "{first} : {second} ?",
    "texts": ["first", "second"],
    "score": list(SCORE),
    "label_column": "score",
    "max_length": 40,
}
LABELLED: Mapping[str, Any] = {
    "name": "custom",
    "prompt": "{sentence} ?",
    "labels": ["cake", "book"],
    "max_length": 32,
}
INFERENCES: Mapping[str, Any] = {"name": "glue/mnli", "max_length": 32}
ANSWERS: Mapping[str, Any] = {"name": "squad", "max_length": 24}
UNANSWERABLE: Mapping[str, Any] = {"name": "squad_v2", "max_length": 64}
