"""What a model is worth: its loss, labels chosen, texts generated, spans found, and their metrics."""
