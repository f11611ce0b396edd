"""Spans chosen by a search over all windows, written out in plain loops; losses; and an encoder that learns answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.spans import SpanPreprocessor, SpanSample
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.evaluation.metrics import score
from sparse_llm_ft.evaluation.spans import choose_spans, rank_spans, spans_of
from sparse_llm_ft.objectives.spans import SpanObjective

OBJECTIVE = SpanObjective(0)
STORY = "anna meets tom at the station . tom gives anna a red book . the cake in the park : blue"


def encode_spans(examples, tokenizer, max_length: int, stride: int = 128) -> tuple[SpanSample, ...]:
    encode = SpanPreprocessor(tokenizer, max_length, stride)
    return tuple(sample for i, example in enumerate(examples) for sample in encode(example, i))


@pytest.fixture(scope="module")
def tokenizer(encoder_folder: Path):
    return AutoTokenizer.from_pretrained(encoder_folder)


def asked(context: str, answer: str | None, question: str = "tom ?") -> Example:
    answers = () if answer is None else ((answer, context.index(answer)),)
    return Example("", "", (), texts=(question, context), answers=answers)


class Given(nn.Module):
    """Logits that were given for each row of token ids."""

    def __init__(self, samples: list[SpanSample], logits: list[np.ndarray]) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.known = {sample.ids: values for sample, values in zip(samples, logits, strict=True)}
        assert len(self.known) == len(samples)

    def forward(self, input_ids, attention_mask, token_type_ids):
        logits = torch.full((*input_ids.shape, 2), 100.0)  # padding looks best
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            length = int(mask.sum())
            logits[row, :length] = torch.tensor(self.known[tuple(ids[:length].tolist())], dtype=torch.float32)
        return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])


def by_search(example: Example, windows: list[tuple[SpanSample, np.ndarray]], unanswerable: bool) -> str:
    """Every pair of positions of every window, as BERT's script goes through them."""
    found, null = [], []
    for sample, logits in windows:
        starts, ends = logits[:, 0], logits[:, 1]
        null.append(starts[0] + ends[0])
        for start in np.argsort(-starts)[:20]:
            for end in np.argsort(-ends)[:20]:
                first, last = sample.offsets[start], sample.offsets[end]
                if first is not None and last is not None and start <= end and end - start + 1 <= 30:
                    found.append((starts[start] + ends[end], example.texts[1][first[0] : last[1]]))
    best = max(found, default=(-np.inf, ""))
    return "" if unanswerable and min(null) > best[0] else best[1]


def random_case(tokenizer, seed: int, words: int = 18) -> tuple[list[Example], list[SpanSample], list[np.ndarray]]:
    """Examples whose windows overlap, with logits for each window, among them large ones where no span may be."""
    generator = np.random.default_rng(seed)
    vocabulary = np.array([word for word in tokenizer.get_vocab() if word.isalpha()])
    examples = [asked(" ".join(generator.choice(vocabulary, size=words + 3 * i)), None) for i in range(4)]
    samples = list(encode_spans(examples, tokenizer, 14 if words < 30 else 128, stride=3))
    logits = [generator.normal(scale=3, size=(len(sample.ids), 2)).round(4) for sample in samples]
    return examples, samples, logits


@pytest.mark.parametrize("unanswerable", [True, False])
@pytest.mark.parametrize(("seed", "words"), [(0, 18), (1, 18), (2, 18), (3, 60), (4, 60), (5, 100)])
def test_the_best_span_of_all_windows_is_chosen(tokenizer, seed: int, words: int, unanswerable: bool) -> None:
    examples, samples, logits = random_case(tokenizer, seed, words)
    assert words > 30 or len(samples) > 2 * len(examples)
    pairs = list(zip(samples, logits, strict=True))
    expected = [
        by_search(example, [pair for pair in pairs if pair[0].example == i], unanswerable)
        for i, example in enumerate(examples)
    ]
    assert any(expected)
    model = Given(samples, logits).train()
    for size in (1, 3, 50):
        assert choose_spans(model, examples, samples, OBJECTIVE, size, 0, 1, unanswerable) == expected
    assert model.training


def test_ranks_choose_what_one_does(tokenizer) -> None:
    examples, samples, logits = random_case(tokenizer, 1)
    model = Given(samples, logits)
    whole, *parts = (rank_spans(model, samples, OBJECTIVE, 2, rank, size) for rank, size in ((0, 1), (0, 2), (1, 2)))
    scores, spans = (sum(part) for part in zip(*parts, strict=True))
    assert torch.equal(scores, whole[0]) and torch.equal(spans, whole[1])
    expected = choose_spans(model, examples, samples, OBJECTIVE, 2, 0, 1, True)
    assert spans_of(examples, samples, scores, spans, True) == expected


def peaks(sample: SpanSample, start: int, end: int, height: float) -> np.ndarray:
    logits = np.zeros((len(sample.ids), 2))
    logits[start, 0], logits[end, 1] = height, height
    return logits


def test_a_text_is_cut_from_the_context_and_no_answer_must_win_in_every_window(tokenizer) -> None:
    examples = [asked("anna  meets tom at\tthe station . tom gives anna a red book", None)]  # spaces as they stand
    samples = list(encode_spans(examples, tokenizer, 12, 2))
    assert len(samples) == 3
    best = [peaks(sample, 4, 6, height) for sample, height in zip(samples, (2.0, 1.0, 1.5), strict=True)]
    for nulls, expected in (((9, 9, 9), ""), ((9, 3.9, 9), "anna  meets tom"), ((9, 4.1, 9), "")):
        for values, null in zip(best, nulls, strict=True):
            values[0] = null / 2
        model = Given(samples, best)
        assert choose_spans(model, examples, samples, OBJECTIVE, 3, 0, 1, True) == [expected]
        assert choose_spans(model, examples, samples, OBJECTIVE, 3, 0, 1, False) == ["anna  meets tom"]


def test_an_answer_has_at_most_thirty_tokens(tokenizer) -> None:
    examples = [asked(" ".join(["anna"] * 50), None)]
    samples = list(encode_spans(examples, tokenizer, 64))
    first = samples[0].offsets.index((0, 4))
    for length, expected in ((30, 30), (31, 2)):
        logits = peaks(samples[0], first, first + length - 1, 5.0)
        logits[first + 1, 1] = 4.0  # the next best
        (text,) = choose_spans(Given(samples, [logits]), examples, samples, OBJECTIVE, 1, 0, 1, False)
        assert len(text.split()) == expected


def windows(tokenizer) -> list[SpanSample]:
    examples = [asked(STORY, "the station"), asked("tom buys a cake", "a cake"), asked("the park", None)]
    return list(encode_spans(examples, tokenizer, 16, 4))


def encoder(tokenizer, seed: int = 0) -> BertForQuestionAnswering:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, **still, initializer_range=0.3)
    return BertForQuestionAnswering(config).eval()


@torch.no_grad()
def alone(model: nn.Module, sample: SpanSample) -> tuple[float, bool]:
    """Loss and whether both ends are right, of a window without padding."""
    output = model(torch.tensor([sample.ids]), token_type_ids=torch.tensor([sample.type_ids]))
    starts, ends = output.start_logits[0].log_softmax(-1), output.end_logits[0].log_softmax(-1)
    right = int(starts.argmax()) == sample.start and int(ends.argmax()) == sample.end
    return -float(starts[sample.start] + ends[sample.end]) / 2, right


def test_a_windows_loss_is_the_mean_over_its_ends_whatever_the_batch(tokenizer, process_group) -> None:
    model, samples = encoder(tokenizer), windows(tokenizer)
    assert len({len(sample.ids) for sample in samples}) > 1
    for index, sample in enumerate(samples):  # some are right
        if index % 2:
            output = model(torch.tensor([sample.ids]), token_type_ids=torch.tensor([sample.type_ids]))
            ends = (int(output.start_logits.argmax()), int(output.end_logits.argmax()))
            samples[index] = SpanSample(sample.ids, sample.type_ids, *ends, 0, sample.example, sample.offsets)
    losses, right = zip(*(alone(model, sample) for sample in samples), strict=True)
    assert len(set(right)) == 2
    batch = OBJECTIVE.batch(samples)
    assert OBJECTIVE.losses(model, batch).tolist() == pytest.approx(losses, rel=1e-5)
    assert OBJECTIVE.loss(model, batch).item() == pytest.approx(sum(losses), rel=1e-5)
    assert OBJECTIVE.loss(model, batch).dtype == torch.float32
    assert OBJECTIVE.correct(model, batch).tolist() == list(map(int, right))
    for size in (1, 2, 9):
        assert mean_loss(model, samples, OBJECTIVE, size, 0, 1) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_without_padding_the_loss_is_the_models_own(tokenizer) -> None:
    model, samples = encoder(tokenizer), windows(tokenizer)[:2]
    batch = OBJECTIVE.batch(samples)
    assert batch["attention_mask"].all()
    assert OBJECTIVE.loss(model, batch).item() == pytest.approx(2 * model(**batch).loss.item(), rel=1e-5)


def test_the_model_is_not_given_the_positions(tokenizer) -> None:
    seen = {}
    model = encoder(tokenizer)

    def forward(**inputs):
        seen.update(inputs)
        return model(**inputs)

    OBJECTIVE.loss(forward, OBJECTIVE.batch(windows(tokenizer)))
    assert set(seen) == {"input_ids", "attention_mask", "token_type_ids"}


def test_units_are_windows_and_the_majority_is_the_commonest_place(tokenizer) -> None:
    samples = windows(tokenizer)
    assert [OBJECTIVE.units(sample) for sample in samples] == [OBJECTIVE.scored(sample) for sample in samples]
    assert OBJECTIVE.units(samples[0]) == 1
    assert OBJECTIVE.tokens(samples[0]) == 16
    nowhere = sum(sample.start == sample.null for sample in samples)
    assert nowhere > 1
    assert OBJECTIVE.majority(samples) == nowhere / len(samples)
    with pytest.raises(TypeError, match="spans are not labels"):
        OBJECTIVE.losses_and_predictions(encoder(tokenizer), OBJECTIVE.batch(samples))


def test_an_encoder_learns_four_questions(tokenizer) -> None:
    examples = [
        asked(STORY, "red book", "tom gives ?"),
        asked(STORY, "the station", "anna meets at ?"),
        asked("tom buys a blue cake in the park", "a blue cake", "buys ?"),
        asked("the red cake", None, "book ?"),
    ]
    samples = encode_spans(examples, tokenizer, 20, 4)
    assert len(samples) > 4, "the stories have several windows"
    model = encoder(tokenizer)
    references = [[text for text, _ in example.answers or ()] for example in examples]

    def measured() -> dict[str, float]:
        texts = choose_spans(model, examples, samples, OBJECTIVE, 3, 0, 1, unanswerable=True)
        return score(["squad"], texts, references)

    assert measured()["exact_match"] < 50
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = OBJECTIVE.batch(samples)
    for _ in range(60):
        optimizer.zero_grad()
        OBJECTIVE.loss(model, batch).backward()
        optimizer.step()
    assert measured() == {"exact_match": 100.0, "f1": 100.0}
