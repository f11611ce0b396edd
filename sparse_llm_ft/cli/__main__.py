"""`python -m sparse_llm_ft.cli`, for launchers that start a module."""

from sparse_llm_ft.cli.main import main

main()
