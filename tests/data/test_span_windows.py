"""Windows over contexts that are too long for one, and where the answers stand in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import RobertaProcessing
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.spans import SpanPreprocessor, SpanSample, collate_spans
from sparse_llm_ft.errors import ConfigError, DataError

CONTEXT = "anna meets tom at the station . tom gives anna a red book ."
"""14 words."""


def encode_spans(examples, tokenizer, max_length: int, stride: int = 128) -> tuple[SpanSample, ...]:
    encode = SpanPreprocessor(tokenizer, max_length, stride)
    return tuple(sample for i, example in enumerate(examples) for sample in encode(example, i))


@pytest.fixture(scope="module")
def tokenizer(encoder_folder: Path):
    return AutoTokenizer.from_pretrained(encoder_folder)


def question(answer: str | None, text: str = "tom gives ?", context: str = CONTEXT) -> Example:
    answers = () if answer is None else ((answer, context.index(answer)),)
    return Example("", "", (), "qa.jsonl", 7, texts=(text, context), answers=answers)


def shown(sample: SpanSample, tokenizer) -> list[str]:
    """The words of a window's context."""
    words = tokenizer.convert_ids_to_tokens(sample.ids)
    return [word for word, offset in zip(words, sample.offsets, strict=True) if offset is not None]


def test_a_context_that_fits_is_one_window(tokenizer) -> None:
    (sample,) = encode_spans([question("red book")], tokenizer, 64)
    words = ["[CLS]", "tom", "gives", "?", "[SEP]", *CONTEXT.split(), "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(sample.ids) == words
    assert sample.type_ids == (0,) * 5 + (1,) * 15
    assert (sample.start, sample.end) == (words.index("red"), words.index("book"))
    assert (sample.null, sample.example) == (0, 0)
    assert [CONTEXT[slice(*offset)] for offset in sample.offsets if offset] == CONTEXT.split()


@pytest.mark.parametrize("stride", [0, 1, 3, 128])
def test_windows_overlap_by_the_stride_and_hold_the_whole_context(tokenizer, stride: int) -> None:
    samples = encode_spans([question("at the station"), question("red book")], tokenizer, 12, stride)
    room, words = 12 - 6, CONTEXT.split()
    shared = min(stride, room // 2)
    for index in (0, 1):
        windows = [shown(sample, tokenizer) for sample in samples if sample.example == index]
        begins = range(0, len(words) - shared, room - shared)
        assert windows == [words[begin : begin + room] for begin in begins]
    assert [sample.example for sample in samples] == sorted(sample.example for sample in samples)


def test_only_a_window_with_the_whole_answer_has_it(tokenizer) -> None:
    samples = encode_spans([question("tom gives anna"), question(None)], tokenizer, 12, 2)
    held = []
    for sample in samples:
        words = shown(sample, tokenizer)
        text = " ".join(tokenizer.convert_ids_to_tokens(sample.ids)[sample.start : sample.end + 1])
        if sample.example == 0 and "tom gives anna" in " ".join(words):
            assert text == "tom gives anna"
            assert sample.start > 0
            held.append(sample)
        else:
            assert (sample.start, sample.end) == (sample.null, sample.null)
            assert text == "[CLS]"
    assert len(held) == 1
    assert any({"tom", "gives"} <= set(shown(s, tokenizer)) and s not in held for s in samples), "one has a part of it"


def test_an_answer_within_words_takes_them_whole_and_the_first_answer_counts(tokenizer) -> None:
    example = Example("", "", (), texts=("tom ?", CONTEXT), answers=(("ation", CONTEXT.index("ation")), ("tom", 11)))
    (sample,) = encode_spans([example], tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(sample.ids)[sample.start : sample.end + 1] == ["station"]


@pytest.mark.parametrize("answer", [" red book", "red book ", " red book ", "book . ", "station . "])
def test_spaces_around_an_answer_are_no_part_of_it(tokenizer, answer: str) -> None:
    context = f"{CONTEXT} "
    example = Example("", "", (), texts=("tom ?", context), answers=((answer, context.index(answer)),))
    (sample,) = encode_spans([example], tokenizer, 64)
    words = tokenizer.convert_ids_to_tokens(sample.ids)[sample.start : sample.end + 1]
    assert words == answer.split()


@pytest.mark.parametrize("length", [64, 14])
def test_an_answer_at_the_contexts_end_may_end_in_what_the_tokenizer_drops(encoder_folder: Path, length: int) -> None:
    """As uncased BERT drops accents, and Hindi's vowel signs with them."""
    dropping = AutoTokenizer.from_pretrained(encoder_folder)
    dropping.backend_tokenizer.normalizer = normalizers.StripAccents()
    context = f"\u0301{CONTEXT.removesuffix(' .')}\u0301"
    for answer, words in (("red book\u0301", ["red", "book"]), ("\u0301anna meets", ["anna", "meets"])):
        example = Example("", "", (), texts=("tom ?", context), answers=((answer, context.index(answer)),))
        held = [
            dropping.convert_ids_to_tokens(sample.ids)[sample.start : sample.end + 1]
            for sample in encode_spans([example], dropping, length, 0)
            if sample.start != sample.null
        ]
        assert held == [words]


@pytest.mark.parametrize("answer", ["北", "北京", "é", "🎉", "in 北"])
def test_an_answer_has_all_tokens_of_its_characters(answer: str) -> None:
    """In RoBERTa's tokenizers, of which bytes are the least tokens, a character may be several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = RobertaProcessing(("</s>", 257), ("<s>", 256), add_prefix_space=False)
    roberta = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="</s>")
    context = "born in 北京 . café 🎉 !"
    example = Example("", "", (), texts=("?", context), answers=((answer, context.index(answer)),))
    (sample,) = encode_spans([example], roberta, 64)
    assert roberta.decode(sample.ids[sample.start : sample.end + 1]) == answer


def test_a_window_is_no_longer_than_the_tokenizers_model(tokenizer, encoder_folder: Path) -> None:
    short = AutoTokenizer.from_pretrained(encoder_folder, model_max_length=10)
    assert {len(sample.ids) for sample in encode_spans([question("red book")], short, 64, 0)} == {10, 8}


def test_batches_are_padded_to_the_right(tokenizer) -> None:
    samples = encode_spans([question("red book"), question(None, context="a cake")], tokenizer, 64)
    batch = collate_spans(samples, 0)
    assert batch["input_ids"].tolist() == [list(samples[0].ids), [*samples[1].ids, *[0] * 12]]
    assert batch["attention_mask"].tolist() == [[1] * 20, [1] * 8 + [0] * 12]
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1] * 15, [0] * 5 + [1] * 3 + [0] * 12]
    assert batch["start_positions"].tolist() == [samples[0].start, 0]
    assert batch["end_positions"].tolist() == [samples[0].end, 0]


def test_a_model_that_does_not_ask_gets_no_type_ids(encoder_folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(encoder_folder, model_input_names=["input_ids", "attention_mask"])
    samples = encode_spans([question("red book")], plain, 64)
    assert samples[0].type_ids is None
    assert "token_type_ids" not in collate_spans(samples, 0)


def test_a_question_that_leaves_no_room_is_refused_with_its_line(tokenizer) -> None:
    with pytest.raises(DataError, match=r"qa.jsonl:7: a question of 5 tokens leaves no room in task.max_length 8"):
        encode_spans([question(None, "tom meets anna at ?")], tokenizer, 8)


class Slow(PreTrainedTokenizer):
    """One token per character."""

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)


def test_tokenizers_without_offsets_or_classification_token_are_refused(tokenizer, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.name: .* has a slow tokenizer"):
        encode_spans([question(None)], Slow(cls_token="c"), 64)
    decoder = AutoTokenizer.from_pretrained(model_folder)
    assert isinstance(decoder, PreTrainedTokenizerFast)
    with pytest.raises(ConfigError, match=r"model.name: .* without classification token"):
        encode_spans([question(None)], decoder, 64)
