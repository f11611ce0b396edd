"""The layers of sparse_llm_ft: a package imports only from layers below its own, and the fast paths import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparse_llm_ft"

LAYERS = (
    ("errors",),
    ("plan_masks",),
    ("plan", "io"),
    ("config", "distributed", "serving"),
    ("phase", "run_folder", "report"),
    ("optim", "data", "cluster"),
    ("model",),
    ("adapters", "objectives"),
    ("scoring", "evaluation", "checkpoint"),
    ("methods", "engine"),
    ("context", "doctor"),
    ("planning",),
    ("inference",),
    ("export",),
    ("training",),
    ("cli",),
    ("__main__",),
)
"""Lowest first, as docs/architecture.md draws them. Packages of one layer do not import each other."""

LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, package) of every import of the package, inside functions and for type checkers too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "sparse_llm_ft":
            modules = [f"sparse_llm_ft.{name.name}" for name in node.names if name.name != "__version__"]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        found += [(node.lineno, m.split(".")[1]) for m in modules if m.startswith("sparse_llm_ft.")]
    return found


def test_every_package_has_a_layer() -> None:
    packages = {package_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert packages == set(LEVEL)


@pytest.mark.parametrize("package", sorted(LEVEL))
def test_a_package_imports_only_from_layers_below(package: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {other}"
        for path in PACKAGE.rglob("*.py")
        if package_of(path) == package
        for line, other in imports(path)
        if other != package and LEVEL[other] >= LEVEL[package]
    ]
    assert not wrong


def test_what_comes_after_a_run_imports_nothing_from_training() -> None:
    after = ("inference", "export", "report", "context", "evaluation", "checkpoint")
    users = {package_of(path) for path in PACKAGE.rglob("*.py") if "training" in dict(imports(path)).values()}
    assert not users & set(after) and users <= {"cli", "training"}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Within a package too. Imports inside functions do not count: they run when both modules are there."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("sparse_llm_ft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in graph:
            return
        for other in sorted(graph[name] - {name}):
            if not name.startswith(f"{other}."):  # a module needs its package, which imports it
                visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "module",
    [
        "launch.train",
        "cli.main",
        "cli.run_commands",
        "cli.task_listing",
        "cli.check_adapter",
        "cli.plan_command",
        "serving.commands",
        "config",
        "context.preflight",
        "report",
    ],
)
def test_what_runs_before_torch_does_not_import_it(module: str) -> None:
    """`--help`, a wrong setting, preflight and the report: they answer within a second."""
    code = "import sys; sys.modules.update(torch=None, transformers=None, peft=None, deepspeed=None); " + (
        "sys.path.insert(0, 'launch'); import train" if module == "launch.train" else f"import sparse_llm_ft.{module}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr[-2000:]
