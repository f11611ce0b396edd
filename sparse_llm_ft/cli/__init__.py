"""The command `sparse-llm-ft`: what is typed and what is printed."""
