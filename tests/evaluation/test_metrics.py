"""Every metric against its formula, written out here; texts are judged on a small corpus with several references."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from sparse_llm_ft.evaluation.metrics import METRICS, score

PREDICTIONS = [
    "The cat sat on the mat, and it slept.",
    "Anna buys a red book for 3.50 in the city",
    "a dog",
    "it's raining\nstay at home",
]
REFERENCES = [
    ("A cat was sitting on the mat, and it slept.", "The cat slept on the mat"),
    ("Anna buys a blue book for 3.50 in the city", "Tom sells it", "In the city Anna buys a red book"),
    ("the dogs run home",),
    ("stay at home\nit is raining", "it's raining outside, so stay at home"),
]


def random_classes(classes: int, seed: int) -> tuple[list[int], list[int]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=60)
    choices = np.where(generator.random(60) < 0.4, labels, generator.integers(classes, size=60))
    return choices.tolist(), labels.tolist()


def random_scores(seed: int) -> tuple[list[float], list[float]]:
    """Predictions and scores from 0 to 5 in halves, so that ties are many."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(11, size=50) / 2
    return np.round(scores + generator.normal(scale=2, size=50), 0).tolist(), scores.tolist()


def test_accuracy_is_the_share_of_right_classes() -> None:
    assert score(["accuracy"], [1, 0, 2, 2], [1, 1, 2, 0]) == {"accuracy": 50.0}


def f1_of(choices: Sequence[int], labels: Sequence[int], k: int) -> float:
    hits = sum(c == label == k for c, label in zip(choices, labels, strict=True))
    return 2 * hits / (list(choices).count(k) + list(labels).count(k))


@pytest.mark.parametrize("seed", range(3))
def test_f1_is_that_of_class_1_and_of_more_classes_the_mean(seed: int) -> None:
    choices, labels = random_classes(2, seed)
    assert score(["f1"], choices, labels)["f1"] == pytest.approx(100 * f1_of(choices, labels, 1))
    choices, labels = random_classes(4, seed)
    expected = np.mean([f1_of(choices, labels, k) for k in range(4)])
    assert score(["f1"], choices, labels, 4)["f1"] == pytest.approx(100 * expected)
    # Of four labels one is neither there nor predicted, and says nothing.
    few = score(["f1"], [0, 1, 2], [0, 1, 0], 4)["f1"]
    assert few == pytest.approx(100 * sum(f1_of([0, 1, 2], [0, 1, 0], k) for k in range(3)) / 3)
    assert score(["f1"], [0, 2], [0, 2], 20) == {"f1": 100.0}
    assert score(["f1"], [0, 0, 0], [0, 1, 1]) == {"f1": 0.0}, "class 1 is never chosen"


@pytest.mark.parametrize("seed", range(5))
def test_matthews_of_two_classes_is_his_formula(seed: int) -> None:
    choices, labels = random_classes(2, seed)
    pairs = list(zip(choices, labels, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score(["matthews"], choices, labels)["matthews"] == pytest.approx(100 * expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_matthews_of_many_classes_is_the_correlation_of_indicators(seed: int) -> None:
    choices, labels = random_classes(4, seed)
    x, y = np.eye(4)[choices], np.eye(4)[labels]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert score(["matthews"], choices, labels)["matthews"] == pytest.approx(100 * expected, abs=1e-9)


def covariance_ratio(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def ranks(values: Sequence[float]) -> list[float]:
    """How many are smaller, and half of the others that are equal."""
    return [sum(v < value for v in values) + (values.count(value) - 1) / 2 for value in values]


@pytest.mark.parametrize("seed", range(5))
def test_pearson_and_spearman_are_correlations_of_values_and_of_ranks(seed: int) -> None:
    predictions, scores = random_scores(seed)
    found = score(["pearson", "spearman"], predictions, scores)
    assert found["pearson"] == pytest.approx(100 * covariance_ratio(predictions, scores))
    assert found["spearman"] == pytest.approx(100 * covariance_ratio(ranks(predictions), ranks(scores)))
    assert abs(found["pearson"] - found["spearman"]) > 0.01


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.filterwarnings("error")
def test_correlations_at_their_ends_and_where_they_are_not_defined(name: str) -> None:
    def value(predictions: list[int], references: list[int]) -> float:
        return score([name], predictions, references)[name]

    assert value([0, 1, 1], [0, 1, 1]) == pytest.approx(100.0)
    assert value([1, 0, 0], [0, 1, 1]) == pytest.approx(-100.0)
    assert value([1, 1, 1], [0, 1, 1]) == 0.0, "all predictions the same"
    assert value([0, 1, 1], [1, 1, 1]) == 0.0, "all references the same"
    assert value([1, 1], [1, 1]) == 0.0
    assert value([1], [1]) == 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


def f_measure(common: int, predicted: int, wanted: int) -> float:
    return 2 * common / (predicted + wanted) if common else 0.0


def overlap(a: Counter, b: Counter) -> int:
    return sum(min(count, b[key]) for key, count in a.items())


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def test_rouge_counts_ngrams_and_the_longest_common_subsequence() -> None:
    prediction, reference = "the red fox sees a red hat", "a red fox and the blue hat"  # no word has a suffix to stem
    a, b = prediction.split(), reference.split()
    found = score(["rouge"], [prediction], [(reference,)])
    for n in (1, 2):
        x, y = ngrams(a, n), ngrams(b, n)
        assert found[f"rouge{n}"] == pytest.approx(100 * f_measure(overlap(x, y), x.total(), y.total()))
    expected = 100 * f_measure(longest_common(a, b), len(a), len(b))
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(expected)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_rouge_stems_and_takes_lines_as_sentences_for_lsum() -> None:
    assert score(["rouge"], ["dogs running"], [("dog run",)])["rouge1"] == 100.0
    found = score(["rouge"], ["stay at home\nit rains"], [("it rains\nstay at home",)])
    assert found["rougeLsum"] == pytest.approx(100.0), "each line has its subsequence"
    assert found["rougeL"] == pytest.approx(100 * 3 / 5)


def test_rouge_of_each_kind_takes_its_best_reference() -> None:
    found = score(["rouge"], PREDICTIONS, REFERENCES)
    scorer = RougeScorer(list(found), use_stemmer=True)
    for name in found:
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in texts)
            for text, texts in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert found[name] == pytest.approx(100 * sum(best) / 4)


def tokens_13a(text: str) -> list[str]:
    """mteval-v13a: punctuation stands alone, but for apostrophes, hyphens, and "." and "," between digits."""
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {' '.join(text.splitlines())} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu_by_hand(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Papineni et al., 2002, eq. 1-3: clipped n-gram precisions, and the closest reference's length."""
    right, made, length, wanted = Counter(), Counter(), 0, 0
    for text, texts in zip(predictions, references, strict=True):
        tokens, others = tokens_13a(text), [tokens_13a(other) for other in texts]
        length += len(tokens)
        wanted += min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
        for n in range(1, 5):
            found = ngrams(tokens, n)
            most = Counter()
            for other in others:
                most |= ngrams(other, n)
            right[n] += overlap(found, most)
            made[n] += found.total()
    precision = math.prod(right[n] / made[n] for n in range(1, 5)) ** 0.25
    return 100 * precision * min(1.0, math.exp(1 - wanted / length))


def test_bleu_counts_clipped_ngrams_over_the_corpus_with_unequally_many_references() -> None:
    expected = bleu_by_hand(PREDICTIONS, REFERENCES)
    assert 10 < expected < 90
    assert score(["bleu"], PREDICTIONS, REFERENCES) == {"bleu": pytest.approx(expected)}


def test_bleu_punishes_what_is_too_short_but_not_what_is_long() -> None:
    short = [text.rsplit(" ", 2)[0] for text in PREDICTIONS]
    references = [(text,) for text in PREDICTIONS]
    ratio = math.exp(1 - sum(len(tokens_13a(t)) for t in PREDICTIONS) / sum(len(tokens_13a(t)) for t in short))
    assert score(["bleu"], short, references)["bleu"] == pytest.approx(bleu_by_hand(short, references))
    assert score(["bleu"], short, references)["bleu"] == pytest.approx(100 * ratio)
    assert score(["bleu"], PREDICTIONS, references)["bleu"] == pytest.approx(100.0)


def test_bleu_keeps_case_and_smooths_what_has_no_match() -> None:
    assert score(["bleu"], ["THE CAT SAT ON THE MAT"], [("the cat sat on the mat",)])["bleu"] == 0.0
    # Chen and Cherry, 2014, smoothing 3: the k-th order without a match counts 1 / 2^k matches.
    expected = 100 * (4 / 5 * 2 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** 0.25
    assert score(["bleu"], ["a b x c d"], [("a b y c d",)])["bleu"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The Broncos!", ("denver broncos", "Broncos"), 100, 100),
        ("in the year 1066", ("1066",), 0, 100 * 2 * (1 / 3) / (1 / 3 + 1)),
        ("red red hat", ("a red hat", "blue"), 0, 100 * 2 * (2 / 3) / (2 / 3 + 1)),
        ("U.S.", ("us",), 100, 100),
        ("theatre", ("atre",), 0, 0),  # articles are words, not parts of words
        ("", (), 100, 100),
        ("", ("",), 100, 100),
        ("anything", (), 0, 0),
        ("", ("something",), 0, 0),
        ("the", ("The a",), 100, 100),  # all articles: no answer
        ("", ("the", "cat"), 0, 0),  # a reference without tokens is none while there is another
    ],
)
def test_squad_as_its_script(prediction: str, golds: tuple[str, ...], exact: float, f1: float) -> None:
    assert score(["squad"], [prediction], [golds]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_squad_is_the_mean_over_questions() -> None:
    assert score(["squad"], ["a cat", "dog food"], [("cat",), ("dog",)]) == {
        "exact_match": 50.0,
        "f1": pytest.approx(100 * (1 + 2 / 3) / 2),
    }


def inputs(name: str) -> tuple[list, list]:
    if name in ("rouge", "bleu", "squad"):
        return PREDICTIONS, list(REFERENCES)
    return random_scores(0) if name in ("pearson", "spearman") else random_classes(3, 0)


@pytest.mark.parametrize("name", list(METRICS))
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    predictions, references = inputs(name)
    shuffled = np.random.default_rng(0).permutation(len(predictions))
    expected = score([name], predictions, references, 3)
    found = score([name], [predictions[i] for i in shuffled], [references[i] for i in shuffled], 3)
    assert found == pytest.approx(expected)
    assert all(isinstance(value, float) and -100 <= value <= 100 for value in expected.values())


@pytest.mark.parametrize("name", list(METRICS))
def test_unequally_many_and_none_are_refused(name: str) -> None:
    predictions, references = inputs(name)
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        score([name], [], [])
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions and 1 references"):
        score([name], predictions, references[:1])


@pytest.mark.parametrize("name", ["rouge", "bleu"])
def test_a_text_without_reference_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="sample 1 has no reference"):
        score([name], ["a", "b"], [("a",), ()])


def test_metrics_come_in_the_order_of_their_names() -> None:
    assert list(score(["matthews", "accuracy"], *random_classes(2, 0))) == ["matthews", "accuracy"]
