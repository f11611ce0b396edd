"""What is written in several places and can drift apart: versions, Makefile targets, what the package ships."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sparse_llm_ft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML_FILES = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    *sorted((ROOT / ".github").rglob("*.yaml")),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]


def read_yaml(path: Path) -> Any:
    """The file's value, every scalar as text: YAML 1.1 would read a workflow's key ``on`` as true."""
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


def pinned() -> dict[str, str]:
    """Canonical name -> exact version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    versions = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is not one exact version"
        versions[canonicalize_name(requirement.name)] = specifier.version
    assert len(versions) == len(requirements), "a package stands in constraints.txt twice"
    return versions


def required() -> list[Requirement]:
    project = PROJECT["project"]
    return [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])]


@pytest.mark.parametrize("requirement", required(), ids=lambda requirement: requirement.name)
def test_constraints_lie_in_the_ranges_of_pyproject(requirement: Requirement) -> None:
    version = pinned().get(canonicalize_name(requirement.name))
    assert version is not None, "missing in constraints.txt; run `make constraints`"
    assert requirement.specifier.contains(version, prereleases=True), f"{version} is not in {requirement.specifier}"


def test_constraints_serve_cpu_and_cuda_machines() -> None:
    versions = pinned()
    assert not {name: version for name, version in versions.items() if "+" in version}
    assert canonicalize_name(PROJECT["project"]["name"]) not in versions


def test_the_makefile_installs_the_torch_that_pyproject_asks_for() -> None:
    (torch,) = (str(requirement) for requirement in required() if requirement.name == "torch")
    (installed,) = re.findall(r'"(torch[<>=].*?)"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert str(Requirement(installed)) == torch


def commands(path: Path) -> list[str]:
    """Every line that a workflow, or a shell script, runs."""
    if path.suffix != ".yml":
        return path.read_text(encoding="utf-8").splitlines()
    jobs = read_yaml(path)["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("path", [ROOT / ".ci" / "run", *WORKFLOWS], ids=lambda path: path.name)
def test_what_ci_makes_is_a_target(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    calls = [line.split()[1:] for line in commands(path) if line.split()[:1] == ["make"]]
    made = {word for call in calls for word in call if "=" not in word and not word.startswith("-")}
    assert made and made <= targets


def test_every_target_is_phony_and_has_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    assert targets[0] == "setup" and sorted(targets) == sorted(phony.split())
    assert re.findall(r"^([a-z-]+):.*  ## \S", text, re.MULTILINE) == targets


def test_versions_agree() -> None:
    assert read_yaml(ROOT / "CITATION.cff")["version"] == sparse_llm_ft.__version__
    assert PROJECT["project"]["version"] == sparse_llm_ft.__version__


def test_the_package_ships_its_types() -> None:
    assert (Path(sparse_llm_ft.__file__).parent / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["sparse_llm_ft"]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_files_parse(path: Path) -> None:
    assert isinstance(read_yaml(path), dict)


def test_there_are_workflows() -> None:
    assert {"ci.yml", "long.yml"} <= {path.name for path in WORKFLOWS}


def test_torchrun_outwaits_a_step_and_a_checkpoint_on_kubernetes_too() -> None:
    """By itself it kills 30 s after SIGTERM, in the middle of the pod's grace period."""
    text = (ROOT / "launch" / "k8s" / "trainjob.yaml").read_text(encoding="utf-8")
    runtime, job = yaml.load_all(text, yaml.BaseLoader)
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    grace = node["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    given = {variable["name"]: variable["value"] for variable in job["spec"]["trainer"]["env"]}
    assert int(grace) - 30 <= int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < int(grace)
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in (ROOT / "launch" / "torchrun.sh").read_text(encoding="utf-8")
