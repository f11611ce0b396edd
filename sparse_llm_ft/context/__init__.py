"""Opens a run, in the same way for every command: settings, data, architecture, tokenizer, objective, first phase."""
