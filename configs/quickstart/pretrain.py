"""Train the quickstart tokenizer and the tiny Llama model the quickstart fine-tunes.

The model reads notes (a few facts) and dialogues of ``make_data.py``, never those of the fine-tuning splits,
each followed by questions and short answers, and little stories about other people. So it learns the language
and how to copy names, places and times out of a dialogue, but never sees a summary or the word that asks for
one: that is left to fine-tuning.

    python configs/quickstart/pretrain.py
"""

import argparse
import io
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from make_data import HERE, Sample, Texts, draw_split, load_texts
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
MAXIMUM_LENGTH = 512
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 512
LAYERS = 4
HEADS = 4
KEY_VALUE_HEADS = 2
INITIALIZER_RANGE = 0.05
WARMUP_STEPS = 100
PEAK_LEARNING_RATE = 3e-3
TOKENIZER_DOCUMENTS = 6000
BATCH_DOCUMENTS = {"notes": 12, "story": 8, "dialogue": 8}
NOTES_STEPS = 600
NOTES_SHARE = 0.1
STORY_SHARE = 0.15
GIVEN_SHARE = 0.7
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class Document(NamedTuple):
    """A text to learn after a text that is only given; one of them may be empty."""

    given: str
    learnt: str


def draw_answers(texts: Texts, sample: Sample, generator: random.Random) -> list[str]:
    """Write the questions about a sample's facts, each with its answer, in any order."""
    questions: dict[str, str] = texts.scenarios[sample.scenario]["questions"]
    lines = [f"{question} {answer}".format(**sample.facts) for question, answer in questions.items()]
    return generator.sample(lines, len(lines))


def notes_document(texts: Texts, sample: Sample, generator: random.Random) -> Document:
    """Write the bare facts of a sample in any order, and questions about them."""
    facts = generator.sample(list(sample.facts.values()), len(sample.facts))
    return Document(f"Notes: {', '.join(facts)}.\n", "\n".join(draw_answers(texts, sample, generator)))


def dialogue_document(texts: Texts, sample: Sample, generator: random.Random) -> Document:
    """Write a dialogue, and questions about its facts and its speakers.

    Most dialogues are only given, so that the answers weigh more than the small talk.
    """
    speakers = [line.split(":")[0] for line in sample.dialogue.split("\n")]
    lines = [
        *draw_answers(texts, sample, generator),
        f"Who is talking? {speakers[0]} and {speakers[1]}.",
        f"Who speaks first? {speakers[0]}.",
        f"Who speaks last? {speakers[-1]}.",
    ]
    dialogue = sample.dialogue + "\n"
    answers = "\n".join(generator.sample(lines, 6))
    only_given = generator.random() < GIVEN_SHARE
    return Document(dialogue, answers) if only_given else Document("", dialogue + answers)


def story_document(texts: Texts, samples: Iterator[Sample], generator: random.Random) -> Document:
    """Write two stories, one after the other, and ask of each who it is about."""
    lines = []
    for sample in itertools.islice(samples, 2):
        story = generator.choice(texts.scenarios[sample.scenario]["stories"]).format(**sample.facts)
        lines.append(f"{story} Who is in the story? {sample.facts['a']} and {sample.facts['b']}.")
    return Document("", "\n".join(lines))


def draw_batches(texts: Texts, seed: int, notes_steps: int) -> Iterator[list[Document]]:
    """Draw batches of documents of one kind without end: notes at first, then mostly dialogues.

    Notes hold little to choose from, so that copying is soon learnt; from dialogues alone it takes much
    longer. The share of notes falls from one to NOTES_SHARE over the first ``notes_steps`` batches.
    """
    generator = random.Random(f"documents {seed}")
    samples = draw_split(texts, "pretraining", seed)
    write: dict[str, Callable[[], Document]] = {
        "notes": lambda: notes_document(texts, next(samples), generator),
        "story": lambda: story_document(texts, samples, generator),
        "dialogue": lambda: dialogue_document(texts, next(samples), generator),
    }
    for step in itertools.count():
        kind = "story" if generator.random() < STORY_SHARE else "dialogue"
        if generator.random() < max(NOTES_SHARE, 1 - step / max(1, notes_steps)):
            kind = "notes"
        yield [write[kind]() for _ in range(BATCH_DOCUMENTS[kind])]


def train_sentencepiece(lines: list[str]) -> bytes:
    """Train a byte-pair model on lines of text and return it as a file's bytes.

    One thread and no sampling of lines make it deterministic. Nothing is normalised, no space is put in
    front, and a newline falls back to its byte, so that decoding gives back every text.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCABULARY_SIZE,
        byte_fallback=True, character_coverage=1.0, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, num_threads=1, shuffle_input_sentence=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def convert_sentencepiece(model: bytes) -> PreTrainedTokenizerFast:
    """Build the equal Hugging Face tokenizer; it puts bos in front of a text and no eos after it."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    # A piece learnt earlier has a smaller index, so going by index gives the merges in the order of learning.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    pairs = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(pairs)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    undo_steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(undo_steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAXIMUM_LENGTH,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, model: bytes, documents: list[str]) -> None:
    """Raise ValueError unless both tokenizers agree on every document and decoding gives it back."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    for document in [*documents, " A café,\n\n  two  spaces & a 漢字.\n"]:
        tokens = tokenizer(document)["input_ids"]
        if tokens != [tokenizer.bos_token_id, *pieces.encode(document)]:
            raise ValueError(f"tokenizer.json and tokenizer.model differ on {document!r}")
        if tokenizer.decode(tokens, skip_special_tokens=True) != document:
            raise ValueError(f"decoding does not give back {document!r}")


def make_tokenizer(texts: Texts, seed: int, output: Path) -> PreTrainedTokenizerFast:
    """Train, check and save the tokenizer: ``tokenizer.model`` and the Hugging Face files."""
    batches = draw_batches(texts, seed, notes_steps=0)
    stream = (given + learnt for batch in batches for given, learnt in batch)
    documents = list(itertools.islice(stream, TOKENIZER_DOCUMENTS))
    model = train_sentencepiece([line for document in documents for line in document.split("\n")])
    tokenizer = convert_sentencepiece(model)
    check_tokenizer(tokenizer, model, documents[:500])
    tokenizer.save_pretrained(output)
    # Version 5 of transformers writes a class name that version 4 does not know; both know this one.
    settings = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (output / "tokenizer.model").write_bytes(model)
    return tokenizer


def encode_batch(tokenizer: PreTrainedTokenizerFast, batch: list[Document]) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, both of shape (documents, longest): bos, given, learnt, eos, padding.

    Labels are -100 on what is given and on padding. No attention mask is needed: padding comes last.
    """
    tokens, labels = [], []
    for given, learnt in batch:
        prefix = tokenizer(given)["input_ids"]
        rest = [*tokenizer(learnt, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens.append(torch.tensor(prefix + rest))
        labels.append(torch.tensor([-100] * len(prefix) + rest))
    return (
        pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


def align_attention(model: LlamaForCausalLM) -> None:
    """Start each query head equal to its key head, and each output the transpose of its value head.

    Attention so begins by looking for tokens like the present one and by copying what it finds (the idea of
    "Mimetic Initialization of Self-Attention Layers", Trockman and Kolter, 2023), which this small a model
    takes long to discover.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        for source, target in ((attention.k_proj, attention.q_proj), (attention.v_proj, attention.o_proj)):
            heads = source.weight.view(KEY_VALUE_HEADS, HIDDEN_SIZE // HEADS, HIDDEN_SIZE)
            rows = heads.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=0).flatten(0, 1)
            with torch.no_grad():
                target.weight.copy_(rows if target is attention.q_proj else rows.T)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the model with random weights, those of attention aligned."""
    special_names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special_ids = {name: getattr(tokenizer, name) for name in special_names}
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=MAXIMUM_LENGTH, tie_word_embeddings=True, initializer_range=INITIALIZER_RANGE,
        **special_ids,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    align_attention(model)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    return model


def learning_rate(step: int, steps: int) -> float:
    """Rise linearly for WARMUP_STEPS, then fall to a tenth along a cosine."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_model(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """Minimise the next-token loss with AdamW, and print it along the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        tokens, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} seconds {time.monotonic() - began:.0f}", flush=True)


def main() -> None:
    """Train and save the tokenizer, then the model."""
    parser = argparse.ArgumentParser(description="Train the quickstart tokenizer and base model.")
    parser.add_argument("--output", type=Path, default=HERE / "model", help="folder for tokenizer and model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--threads", type=int, default=2, help="processor threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    texts = load_texts()
    tokenizer = make_tokenizer(texts, arguments.seed, arguments.output)
    model = make_model(tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
    batches = draw_batches(texts, arguments.seed + 1, NOTES_STEPS)
    train_model(model, (encode_batch(tokenizer, batch) for batch in batches), arguments.steps)
    model.bfloat16().save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
