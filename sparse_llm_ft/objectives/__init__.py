"""How samples become a loss: one objective per task mode."""
