"""Token ids and batches: what is supervised, what is cut, how it is padded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sparse_llm_ft.data.collate import IGNORE_INDEX, collate_causal_lm, collate_classification, collate_prompts
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.tokenization import CausalLMPreprocessor, ClassificationPreprocessor
from sparse_llm_ft.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    return AutoTokenizer.from_pretrained(model_folder)


def example(prompt: str, completion: str) -> Example:
    return Example(prompt, completion, (completion,))


def test_a_completion_ends_with_the_end_of_sequence_token(tokenizer) -> None:
    sample = CausalLMPreprocessor(tokenizer, 16)(example("anna meets tom ?", "red book"))
    assert tokenizer.decode(sample.prompt_ids) == "anna meets tom ?"
    assert sample.completion_ids[-1] == tokenizer.eos_token_id and sample.supervised == 3


def test_a_long_prompt_loses_its_middle_and_the_completion_nothing(tokenizer) -> None:
    sample = CausalLMPreprocessor(tokenizer, 8, 5)(example("anna meets tom at the park in station ?", "red book"))
    assert sample.shortened and sample.length == 8
    assert tokenizer.decode(sample.prompt_ids) == "anna meets tom station ?"
    assert tokenizer.decode(sample.completion_ids[:-1]) == "red book"


def test_the_length_of_a_shortened_prompt_says_nothing_about_its_completion(tokenizer) -> None:
    long, answers = " ".join(["anna"] * 40), ("red", "red book", "red book cake tom")
    for encode, room in ((CausalLMPreprocessor(tokenizer, 20), 15), (CausalLMPreprocessor(tokenizer, 20, 9), 9)):
        assert {len(encode(example(long, answer)).prompt_ids) for answer in answers} == {room}
        completion = " ".join(["red"] * 15)  # longer than the rest: its own prompt gives way
        sample = encode(example(long, completion))
        assert (len(sample.prompt_ids), sample.supervised) == (min(room, 4), 16)
    assert not CausalLMPreprocessor(tokenizer, 20)(example(" ".join(["anna"] * 15), "red")).shortened


def test_a_completion_without_room_for_a_prompt_is_refused(tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"example:0: a completion of 4 tokens and a prompt of 2 do not fit into task.max_length 4"
    ):
        CausalLMPreprocessor(tokenizer, 4)(example("anna ?", "red book cake"))


def test_a_prompt_does_not_end_the_sequence(tokenizer) -> None:
    """Whatever the tokenizer adds to a text of its own."""
    import copy

    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert ending("anna ?")["input_ids"][-1] == tokenizer.eos_token_id
    sample = CausalLMPreprocessor(ending, 16)(example("anna ?", "red"))
    assert sample == CausalLMPreprocessor(tokenizer, 16)(example("anna ?", "red"))


def test_a_chat_template_frames_the_prompt(tokenizer) -> None:
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}the {{ m['content'] }} to {% endfor %}{% if add_generation_prompt %}a :{% endif %}"
    )
    sample = CausalLMPreprocessor(chatty, 16)(example("anna ?", "red"))
    assert chatty.decode(sample.prompt_ids) == "the anna ? to a :"


def test_batches_are_padded_on_the_side_that_their_use_needs() -> None:
    samples = [Sample((5, 6, 7), (8, 2)), Sample((9,), (4, 2))]
    batch = collate_causal_lm(samples, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 3 + [8, 2], [IGNORE_INDEX, 4, 2, IGNORE_INDEX, IGNORE_INDEX]]
    prompts = collate_prompts(samples, pad_token_id=0)
    assert prompts["input_ids"].tolist() == [[5, 6, 7], [0, 0, 9]]
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    prompts = collate_prompts(samples, 0, "right")
    assert prompts["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.fixture(scope="module")
def encoder_tokenizer(encoder_folder: Path):
    return AutoTokenizer.from_pretrained(encoder_folder)


def labelled(label: int, *texts: str) -> Example:
    return Example("", "", (), label=label, texts=texts)


def test_a_completion_sample_knows_its_label(tokenizer) -> None:
    example = Example("anna ?", "red", ("red",), label=1)
    assert CausalLMPreprocessor(tokenizer, 16)(example).label == 1


def test_an_encoder_sees_texts_and_pairs_with_special_tokens(encoder_tokenizer) -> None:
    encode = ClassificationPreprocessor(encoder_tokenizer, 16)
    one, two = encode(labelled(0, "anna meets tom")), encode(labelled(1, "red cake", "a book"))
    assert encoder_tokenizer.convert_ids_to_tokens(one.ids) == ["[CLS]", "anna", "meets", "tom", "[SEP]"]
    assert encoder_tokenizer.convert_ids_to_tokens(two.ids) == ["[CLS]", "red", "cake", "[SEP]", "a", "book", "[SEP]"]
    assert (one.type_ids, two.type_ids) == ((0,) * 5, (0, 0, 0, 0, 1, 1, 1))
    assert (one.label, two.label) == (0, 1)


def test_a_long_text_loses_its_end_and_of_a_pair_the_longer_one_first(encoder_tokenizer) -> None:
    long = "anna meets tom at the park in station"
    encode = ClassificationPreprocessor(encoder_tokenizer, 8)
    samples = [encode(labelled(0, *texts)) for texts in ((long,), (long, "red cake"), ("red",))]
    assert [sample.shortened for sample in samples] == [True, True, False]
    tokens = [encoder_tokenizer.decode(sample.ids) for sample in samples]
    assert tokens == [
        "[CLS] anna meets tom at the park [SEP]",
        "[CLS] anna meets tom [SEP] red cake [SEP]",
        "[CLS] red [SEP]",
    ]


@pytest.mark.parametrize("fast", [True, False])
def test_a_decoder_sees_of_a_long_pair_both_texts(fast: bool, tokenizer, monkeypatch) -> None:
    """It has no separator, and a line break joins the pair; the longer text loses its end, as in an encoder."""
    assert tokenizer.sep_token_id is None
    if not fast:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    long, short = "anna meets tom at the park in station " * 5, "red cake ?"
    encode = ClassificationPreprocessor(tokenizer, 12)
    specials = tokenizer.num_special_tokens_to_add()
    for texts in ((long, short), (short, long), (long, long)):
        sample = encode(labelled(0, *texts))
        found = tokenizer.decode(sample.ids, skip_special_tokens=True).split()
        assert sample.shortened and 12 - 1 <= sample.length <= 12, "at most the line break is no token"
        first, second = texts[0].split(), texts[1].split()
        cut = [min(len(first), 11 - specials - 3), 3] if texts[1] == short else [3, 11 - specials - 3]
        if texts[0] == texts[1]:
            cut = [(11 - specials) // 2, (11 - specials + 1) // 2]
        assert found == first[: cut[0]] + second[: cut[1]]


def test_an_encoder_sees_no_more_than_it_can_take(encoder_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(encoder_tokenizer, "model_max_length", 4)
    sample = ClassificationPreprocessor(encoder_tokenizer, 512)(labelled(0, "anna meets tom at the park"))
    assert sample.length == 4 and sample.shortened


def test_text_batches_are_padded_right_with_types_where_there_are_some() -> None:
    batch = collate_classification([TextSample((2, 5, 3), (0, 0, 1), 1), TextSample((2, 3), (0, 1), 0)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert "token_type_ids" not in collate_classification([TextSample((2, 5, 3), None, 1)], 9)
