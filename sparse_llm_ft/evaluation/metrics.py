"""The papers' metrics, all in percent: accuracy, F1, correlations, ROUGE, BLEU, and exact match and F1 of answers.

A metric takes one prediction and one reference per sample: classes (int), scores (float), or a text and its reference
texts. Libraries are imported inside the functions: each import takes up to a second, and a run needs one of them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from sparse_llm_ft.config.schema import Metric

Compute = Callable[..., dict[str, float]]
"""(predictions, references) -> numbers by name; `_f1` also takes the number of labels."""

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
    names: Iterable[Metric], predictions: Sequence[Any], references: Sequence[Any], labels: int = 2
) -> dict[str, float]:
    """The numbers of the named metrics, in their order.

    Args:
        predictions: (samples,) ints for ``accuracy``, ``f1`` and ``matthews``; floats for ``pearson`` and
            ``spearman``; texts for ``rouge``, ``bleu`` and ``squad``.
        references: (samples,) ints, floats, or for texts sequences of reference texts of any length.
        labels: number of labels, for ``f1``.

    Raises:
        ValueError: there are no predictions, the numbers differ, or a text lacks a reference.
    """
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references")
    found: dict[str, float] = {}
    for name in names:
        found |= METRICS[name](predictions, references, *([labels] if name == "f1" else []))
    return found


def _accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Percentage of correct predictions."""
    right = sum(prediction == label for prediction, label in zip(predictions, references, strict=True))
    return {"accuracy": 100 * right / len(references)}


def _f1(predictions: Sequence[int], references: Sequence[int], labels: int) -> dict[str, float]:
    """F1 of class 1, as in GLUE's MRPC and QQP; with more than two classes macro F1, as in SuperGLUE's CB, over the
    classes that occur in predictions or references (scikit-learn's choice).
    """
    from sklearn.metrics import f1_score

    average = "binary" if labels == 2 else "macro"
    return {"f1": 100 * float(f1_score(references, predictions, zero_division=0, average=average))}


def _matthews(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Matthews' correlation coefficient; for more than two classes Gorodkin's R_K (2004). Constant predictions or
    references, for which it is undefined, give 0.
    """
    from sklearn.metrics import matthews_corrcoef

    constant = _constant(predictions) or _constant(references)
    return {"matthews": 0.0 if constant else 100 * float(matthews_corrcoef(references, predictions))}


def _pearson(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation; 0 for constant values, for which it is undefined."""
    from scipy.stats import pearsonr

    return {"pearson": _correlation(pearsonr, predictions, references)}


def _spearman(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation of the ranks, with mean ranks for ties; 0 for constant values."""
    from scipy.stats import spearmanr

    return {"spearman": _correlation(spearmanr, predictions, references)}


def _correlation(compute: Callable[..., Any], predictions: Sequence[float], references: Sequence[float]) -> float:
    constant = _constant(predictions) or _constant(references)
    return 0.0 if constant else 100 * float(compute(predictions, references).statistic)


def _constant(values: Sequence[float]) -> bool:
    return len(set(values)) == 1


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, 2, L and Lsum by Google's rouge-score, with Porter stemming.

    It drops every character but a to z and 0 to 9, so texts in other scripts score 0. With several references, the
    best-matching one counts, separately for each of the four. Lsum treats lines as sentences; for single-line texts it
    equals L.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_references(references)
    scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
    scores = [scorer.score_multi(list(texts), text) for text, texts in zip(predictions, references, strict=True)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in _ROUGE}


def _bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU by sacreBLEU with its defaults: case-sensitive, 13a tokens, exponential smoothing, and the closest
    reference length for the brevity penalty.
    """
    import sacrebleu

    _check_references(references)
    streams = list(zip_longest(*references))  # the first references, the second ones or None, ...
    # force: no warning about tokenised predictions, which end in " ." in lower-cased data sets.
    return {"bleu": float(sacrebleu.corpus_bleu(predictions, streams, force=True).score)}


def _squad(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and token F1 of SQuAD 2's evaluation script: texts without case, punctuation, articles and extra
    space; the best reference counts. A question without references has the empty answer.

    Source: Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250, and 2018, https://arxiv.org/abs/1806.03822.
    """
    exact = f1 = 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        answer = _answer_tokens(prediction)
        golds = [tokens for tokens in map(_answer_tokens, texts) if tokens] or [[]]
        exact += max(answer == gold for gold in golds)
        f1 += max(_token_f1(answer, gold) for gold in golds)
    return {"exact_match": 100 * exact / len(predictions), "f1": 100 * f1 / len(predictions)}


def _answer_tokens(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _token_f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = (Counter(answer) & Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold))  # 2 P R / (P + R) with P = common / answer, R = common / gold


def _check_references(references: Sequence[Sequence[str]]) -> None:
    for i, texts in enumerate(references):
        if not texts:
            raise ValueError(f"sample {i} has no reference")


METRICS: Mapping[Metric, Compute] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "rouge": _rouge,
    "bleu": _bleu,
    "squad": _squad,
}
"""Metric -> function. Each returns one number of its own name, except ``rouge`` (``rouge1``, ``rouge2``, ``rougeL``,
``rougeLsum``) and ``squad`` (``exact_match``, ``f1``)."""


def numbers_of(names: Iterable[Metric]) -> tuple[str, ...]:
    """Names of the numbers that `score` gives for these metrics."""
    several = {"rouge": _ROUGE, "squad": ("exact_match", "f1")}
    return tuple(number for name in names for number in several.get(name, (name,)))
