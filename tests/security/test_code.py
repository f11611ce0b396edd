"""Nothing in the package can unpickle, evaluate text or run a shell: read off its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
EVALUATING = {"eval", "exec", "compile", "__import__"}
UNSAFE = {
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "os.system",
    "os.popen",
    "pandas.read_pickle",
    "torch.hub.load",
    "runpy.run_path",
}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in PICKLING)
        if isinstance(node, ast.Call):
            yield from call_faults(ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node)


def call_faults(name: str, keywords: dict[str | None, str], node: ast.Call) -> Iterator[str]:
    last = name.rpartition(".")[2]
    if name in EVALUATING or name in UNSAFE:
        yield name
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if last == "load" and keywords.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle"
    if name == "yaml.load" and [ast.unparse(argument) for argument in node.args[1:]] != ["_Loader"]:
        yield "yaml.load with a loader of its own"
    if last.endswith(("_object", "_object_list")):
        yield f"{name} unpickles what other processes send"
    if keywords.get("shell") == "True":
        yield f"{name} with a shell"
    if keywords.get("trust_remote_code") == "True":
        yield f"{name} trusts remote code"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.UnsafeLoader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "dist.all_gather_object(out, x)",
        "dist.broadcast_object_list(x)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(faults(ast.parse(code)))


@pytest.mark.parametrize("folder", ["sparse_llm_ft", "launch", "configs", "benchmarks"])
def test_no_file_has_any_of_it(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    found = {str(path): list(faults(ast.parse(path.read_text(encoding="utf-8")))) for path in files}
    assert not {path: what for path, what in found.items() if what}


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from sparse_llm_ft.io.strict_json_yaml import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    plain = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")}
    assert set(_Loader.yaml_constructors) == {*plain, None} and not _Loader.yaml_multi_constructors
