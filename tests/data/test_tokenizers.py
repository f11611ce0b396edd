"""Tokenizers as models bring them: sentencepiece, tiktoken, no padding token, chat templates with a system turn."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.config import ModelConfig, TaskConfig
from sparse_llm_ft.data.cache import tokenizer_key
from sparse_llm_ft.data.collate import IGNORE_INDEX, collate_causal_lm, collate_packed, collate_prompts
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.rows import examples_of
from sparse_llm_ft.data.samples import Pack
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.data.tokenization import CausalLMPreprocessor, ClassificationPreprocessor
from sparse_llm_ft.errors import DataError
from sparse_llm_ft.model.loading import load_tokenizer
from sparse_llm_ft.objectives.language_modeling import CompletionObjective

SENTENCES = [
    "anna meets tom at the park",
    "tom buys a red cake",
    "anna gives tom the blue book",
    "a station in the park",
]
PAIRS = [("anna buys :", " a red cake"), ("tom meets anna . tom gives", " a  book"), ("in the park\n", "ü?")]


def example(prompt: str, completion: str) -> Example:
    return Example(prompt, completion, (completion,))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    """A folder with a sentencepiece model as Llama's, without padding token; and what else reads it."""
    folder = tmp_path_factory.mktemp("pieces")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_settings(folder, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | names)
    return folder, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_a_sentencepiece_model_is_read_as_its_own_library_reads_it(pieces) -> None:
    folder, processor = pieces
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    encode = CausalLMPreprocessor(tokenizer, 64)
    for prompt, completion in PAIRS:
        completion = completion.lstrip()  # the library would put its own space before one that is there
        sample = encode(example(prompt, completion))
        assert list(sample.prompt_ids) == [processor.bos_id(), *processor.encode(prompt)]
        assert list(sample.completion_ids) == [*processor.encode(completion), processor.eos_id()]


def test_without_a_padding_token_the_end_of_a_completion_is_learned_all_the_same(pieces) -> None:
    """Padding is the end-of-sequence token then, and only what pads is without a label."""
    folder, _ = pieces
    assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    encode = CausalLMPreprocessor(tokenizer, 64)
    samples = [encode(example(*pair)) for pair in PAIRS]
    batch = collate_causal_lm(samples, end)
    width = max(sample.length for sample in samples)
    for row, mask, sample in zip(batch["labels"].tolist(), batch["attention_mask"].tolist(), samples, strict=True):
        padding = width - sample.length
        assert row == [IGNORE_INDEX] * len(sample.prompt_ids) + list(sample.completion_ids) + [IGNORE_INDEX] * padding
        assert mask == [1] * sample.length + [0] * padding
        assert row[sample.length - 1] == end
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    objective = CompletionObjective(end, keeps_logits=True)
    with torch.no_grad():
        losses = objective.losses(model, objective.batch(samples)).tolist()
        for loss, sample in zip(losses, samples, strict=True):
            ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
            labels = torch.tensor([[IGNORE_INDEX] * len(sample.prompt_ids) + list(sample.completion_ids)])
            alone = float(model(input_ids=ids, labels=labels).loss) * len(sample.completion_ids)
            assert loss == pytest.approx(alone, rel=1e-5)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text before it merges bytes."""


def test_a_tiktoken_model_is_read_as_its_own_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of ranks named tokenizer.model, as Llama 3's, with the special tokens behind them."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep a copy of the file
    merged = [b"an", b"na", b" a", b"nna", b"anna", b" anna", b" b", b"oo", b"ook", b"ok", b" book", b"ll"]
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *merged])}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    special = {"<|begin_of_text|>": len(ranks), "<|end_of_text|>": len(ranks) + 1}
    plain = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {str(number): {"content": name} | plain for name, number in special.items()}
    begin, end = special
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    write_settings(tmp_path, names | {"added_tokens_decoder": added})
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path)))
    own = tiktoken.Encoding("llama-3", pat_str=LLAMA_3, mergeable_ranks=ranks, special_tokens=special)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (special[end], special[end])
    for prompt, completion in [*PAIRS, ("you'll see 12345 books", " anna"), (f"{begin}anna", " book!")]:
        sample = CausalLMPreprocessor(tokenizer, 64)(example(prompt, completion))
        assert list(sample.prompt_ids) == own.encode(prompt, allowed_special="all")
        assert list(sample.completion_ids) == [*own.encode(completion), special[end]]


@pytest.fixture
def sided(encoder_folder: Path, model_folder: Path, tmp_path: Path):
    """The tiny models' tokenizers as their settings name a side."""

    def load(kind: str, side: str) -> Any:
        folder = tmp_path / f"{kind}-{side}"
        shutil.copytree(encoder_folder if kind == "encoder" else model_folder, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings | {"padding_side": side, "truncation_side": side})
        )
        assert AutoTokenizer.from_pretrained(folder).padding_side == side
        task_mode = TaskMode("sequence_classification", 2) if kind == "encoder" else CAUSAL_LM
        return load_tokenizer(ModelConfig(name=str(folder)), task_mode)

    return load


def test_the_side_that_a_tokenizer_pads_on_changes_no_batch(sided) -> None:
    batches = []
    for side in ("left", "right"):
        encode = CausalLMPreprocessor(sided("decoder", side), 16)
        samples = [encode(example("anna meets tom ?", "red book")), encode(example("anna ?", "tom"))]
        packs = [Pack(tuple(samples)), Pack((samples[1],))]
        batches.append([collate_causal_lm(samples, 0), collate_prompts(samples, 0), collate_packed(packs, 0)])
    for left, right in zip(*batches, strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_text_loses_its_end_whatever_side_a_tokenizer_names(sided) -> None:
    long = Example("", "", (), label=0, texts=("anna meets tom at the park in station",))
    tokenizers = [sided("encoder", side) for side in ("left", "right")]
    left, right = (ClassificationPreprocessor(tokenizer, 6)(long) for tokenizer in tokenizers)
    assert left == right and left.shortened
    assert tokenizers[0].decode(left.ids) == "[CLS] anna meets tom at [SEP]"


SPEAKERS = "{% set names = {'system': 'the park', 'user': 'tom', 'assistant': 'anna'} %}"
TURNS = "{% for m in messages %}{{ names[m['role']] }} : {{ m['content'] }} . {% endfor %}"
TEMPLATE = SPEAKERS + TURNS + "{% if add_generation_prompt %}anna :{% endif %}"
CHAT = [
    {"role": "system", "content": "red book"},
    {"role": "user", "content": "buys cake ?"},
    {"role": "assistant", "content": "to tom"},
    {"role": "user", "content": "gives to anna ?"},
    {"role": "assistant", "content": "blue cake"},
]


def chat(turns: list[dict]) -> Example:
    task = resolve_task(TaskConfig(name="custom", path=".", messages="turns"))
    ((_, found),) = examples_of(task, {"turns": turns}, "chats.jsonl", 3)
    return found


def test_a_chat_is_written_by_its_template_with_the_system_turn(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    sample = CausalLMPreprocessor(tokenizer, 64)(chat(CHAT))
    said = "the park : red book . tom : buys cake ? . anna : to tom . tom : gives to anna ? . anna :"
    assert tokenizer.decode(sample.prompt_ids) == said
    assert tokenizer.decode(sample.completion_ids) == "blue cake </s>"
    without = CausalLMPreprocessor(tokenizer, 64)(chat(CHAT[1:]))
    assert tokenizer.decode(without.prompt_ids) == said.removeprefix("the park : red book . ")


def test_a_template_that_begins_a_sequence_begins_it_once(pieces) -> None:
    folder, processor = pieces
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    sample = CausalLMPreprocessor(tokenizer, 128)(chat(CHAT))
    assert sample.prompt_ids[0] == processor.bos_id() and sample.prompt_ids.count(processor.bos_id()) == 1
    assert list(sample.completion_ids) == [*processor.encode("blue cake"), processor.eos_id()]


def test_a_template_without_system_turns_refuses_with_the_line(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer.chat_template = refuses + TEMPLATE
    with pytest.raises(DataError, match=r"chats.jsonl:3: the chat template rejects it \(no system turn\)"):
        CausalLMPreprocessor(tokenizer, 64)(chat(CHAT))
    assert CausalLMPreprocessor(tokenizer, 64)(chat(CHAT[1:])).supervised == 3


def test_a_chat_without_template_is_refused(model_folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"chats.jsonl:3: the row is a chat, but the model's tokenizer has no chat template"
    ):
        CausalLMPreprocessor(AutoTokenizer.from_pretrained(model_folder), 64)(chat(CHAT))


def test_the_key_of_a_sentencepiece_model_is_that_of_its_content(pieces, tmp_path: Path) -> None:
    folder, _ = pieces
    shutil.copytree(folder, tmp_path / "elsewhere")
    here, there = (load_tokenizer(ModelConfig(name=str(place))) for place in (folder, tmp_path / "elsewhere"))
    assert tokenizer_key(here) == tokenizer_key(there)
