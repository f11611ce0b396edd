"""Files and the terminal: atomic folders, strict JSON and YAML, progress lines."""
