"""The pretrained base: its architecture, its limits, its tokenizer and its weights."""
