"""How every command opens a run: settings, data, architecture, tokenizer, objective, methods and first phase."""
