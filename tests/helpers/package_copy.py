"""A copy of the package, to try on it what CONTRIBUTING.md says that an addition takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "sparse_llm_ft"


def copy_package(folder: Path) -> Path:
    return shutil.copytree(PACKAGE, folder / "sparse_llm_ft", ignore=shutil.ignore_patterns("__pycache__"))


def add_line(path: Path, before: str, line: str) -> None:
    """Insert `line` before the one line that begins with `before`, with its indentation."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = (i for i, text in enumerate(lines) if text.strip().startswith(before))
    indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    path.write_text("".join([*lines[:place], f"{indent}{line}\n", *lines[place:]]), encoding="utf-8")


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the copy in `folder` before the installed package."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)
