"""After training: completions from a run, its export in several forms, its upload to the hub."""
