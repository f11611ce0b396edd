"""Evaluates a model: loss, predicted labels, generated texts, spans, and their metrics."""
