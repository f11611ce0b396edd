"""What a model is worth: loss on completions, greedy generation, ROUGE."""

from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.loss import completion_loss, mean_loss, rank_batches, takes_logits_to_keep
from sparse_llm_ft.evaluation.rouge import rouge

__all__ = ["completion_loss", "generate", "mean_loss", "rank_batches", "rouge", "takes_logits_to_keep"]
