"""Train adapters: `deepspeed [launcher flags] launch/train.py --config A.yaml [B.yaml ...] [section.key=value ...]`.

Runs under deepspeed, torchrun and srun, and alone. Later files win over earlier ones, overrides over files. The same as
`sparse-llm-ft train`.
"""

from __future__ import annotations

import sys

from sparse_llm_ft.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
