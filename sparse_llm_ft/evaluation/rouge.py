"""ROUGE as the summarisation papers report it, by Google's rouge-score."""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L in percent, with Porter stemming.

    Args:
        references: for each prediction one or more texts; the best-matching one counts, as in `score_multi`.

    Raises:
        ValueError: no predictions, or not as many references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references")
    scorer = RougeScorer(list(NAMES), use_stemmer=True)
    scores = [scorer.score_multi(list(texts), text) for texts, text in zip(references, predictions, strict=True)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in NAMES}
