"""A task is one file and one line: on a copy of the package, nothing else is touched."""

from __future__ import annotations

from pathlib import Path

from helpers.package_copy import add_line, copy_package, run_python
from helpers.tiny_files import write_rows

TASK = '''"""Titles of recipes."""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="recipes",
    hub_id=None,
    prompt="Name the dish.\\n\\n{steps}\\n\\nName:",
    completion=" {title}",
    metrics=("rouge",),
    description="titles of recipes",
)
'''


def test_a_task_is_one_file_and_one_line(tmp_path: Path) -> None:
    tasks = copy_package(tmp_path) / "data" / "tasks"
    (tasks / "recipes.py").write_text(TASK)
    add_line(tasks / "__init__.py", '"samsum",', '"recipes",')
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", [{"steps": "Boil the rice.", "title": "Rice"}])
    shown = run_python(tmp_path, "-m", "sparse_llm_ft.cli", "tasks", "recipes", "--path", str(tmp_path / "data"))
    assert shown.returncode == 0, shown.stderr
    assert "titles of recipes" in shown.stdout and "Boil the rice." in shown.stdout and "' Rice'" in shown.stdout
    listed = run_python(tmp_path, "-m", "sparse_llm_ft.cli", "tasks")
    assert "recipes" in listed.stdout
