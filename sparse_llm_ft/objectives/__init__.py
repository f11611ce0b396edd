"""How samples become a loss: one objective for each way that a model learns a task."""
