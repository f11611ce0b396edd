"""Measure a trained run: `deepspeed [launcher flags] launch/evaluate.py RUN [--output FOLDER] [section.key=value ...]`.

The same as `sparse-llm-ft evaluate`, on as many processes as the launcher starts.
"""

from __future__ import annotations

import sys

from sparse_llm_ft.cli.main import main

if __name__ == "__main__":
    # The deepspeed launcher puts its own option first, and srun and torchrun none.
    main(["evaluate", *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))])
