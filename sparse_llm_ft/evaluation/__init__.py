"""What a model is worth: the loss of its task, labels chosen, texts generated, spans found, and their metrics."""

from sparse_llm_ft.evaluation.completion import CompletionObjective, LabelWords, Seq2SeqObjective
from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.heads import ClassificationObjective, RegressionObjective
from sparse_llm_ft.evaluation.labels import choose_labels
from sparse_llm_ft.evaluation.loss import lengths_of, mean_loss, rank_batches
from sparse_llm_ft.evaluation.making import check_packing, make_objective
from sparse_llm_ft.evaluation.metrics import METRICS, score
from sparse_llm_ft.evaluation.objective import Objective
from sparse_llm_ft.evaluation.spans import SpanObjective, choose_spans

__all__ = [
    "METRICS",
    "ClassificationObjective",
    "CompletionObjective",
    "LabelWords",
    "Objective",
    "RegressionObjective",
    "Seq2SeqObjective",
    "SpanObjective",
    "check_packing",
    "choose_labels",
    "choose_spans",
    "generate",
    "lengths_of",
    "make_objective",
    "mean_loss",
    "rank_batches",
    "score",
]
