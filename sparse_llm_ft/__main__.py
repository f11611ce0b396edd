"""`python -m sparse_llm_ft`, for launchers that start a module: `sparse-llm-ft`, or with --config alone its `train`."""

from sparse_llm_ft.cli.main import main

main()
