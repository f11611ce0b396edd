"""What a model is worth: the loss of its task, labels chosen, greedy generation, ROUGE."""

from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.labels import accuracy, choose_labels, matthews
from sparse_llm_ft.evaluation.loss import mean_loss, rank_batches
from sparse_llm_ft.evaluation.objective import (
    ClassificationObjective,
    CompletionObjective,
    Objective,
    make_objective,
)
from sparse_llm_ft.evaluation.rouge import rouge

__all__ = [
    "ClassificationObjective",
    "CompletionObjective",
    "Objective",
    "accuracy",
    "choose_labels",
    "generate",
    "make_objective",
    "matthews",
    "mean_loss",
    "rank_batches",
    "rouge",
]
