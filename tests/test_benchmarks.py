"""The reproduction's systems: every one is a run that the settings allow, and budgets are those of the papers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from jobs import MINILM, SETTINGS, Job, Result, Setting  # noqa: E402
from sparse_llm_ft.adapters import count_parameters  # noqa: E402
from sparse_llm_ft.config import RunConfig, check_steps, parse_config  # noqa: E402
from sparse_llm_ft.methods.chain import build_methods  # noqa: E402
from sparse_llm_ft.plan import uniform_plan  # noqa: E402
from systems import SYSTEMS, System  # noqa: E402
from tables import CLAIMS, MORE, PUBLISHED, SAME, T_975, _untested, _verdict  # noqa: E402

KINDS = {"attention.self.query": (384, 384), "attention.self.key": (384, 384), "attention.self.value": (384, 384)}
KINDS |= {"attention.output.dense": (384, 384), "intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
LAYERS = {f"encoder.layer.{i}.{kind}": shape for i in range(6) for kind, shape in KINDS.items()}
"""The linear layers of all-MiniLM-L6-v2."""


def settings(setting: Setting, system: System, data: Path) -> RunConfig:
    tree = Job(setting, system, setting.tasks[0], 1e-3, 0).config(Path("models"), data, Path("runs"))
    return parse_config(tree | {"model": {"name": "org/base", "dtype": tree["model"]["dtype"]}})


def values(name: str, data: Path) -> int:
    """Trained values of the adapters of MiniLM's last phase but for what scores decide."""
    (system,) = (system for system in SYSTEMS if system.name == name)
    config = settings(MINILM, system, data)
    pattern = config.adapter.target_modules
    assert isinstance(pattern, str)
    targets = {module: shape for module, shape in LAYERS.items() if re.fullmatch(pattern, module)}
    plan = uniform_plan(targets, config.adapter.r, config.adapter.lora_alpha)
    phase = build_methods(config, MINILM.steps).first(plan, targets)
    return count_parameters(phase.target_plan or phase.plan, targets)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.model)
def test_every_system_is_a_run(setting: Setting, tmp_path: Path) -> None:
    for system in setting.systems:
        check_steps(settings(setting, system, tmp_path), setting.steps)
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)


def test_every_claim_is_about_systems_that_run() -> None:
    names = {system.name for system in SYSTEMS}
    assert {side for claim in CLAIMS for side in claim[1:3]} <= names


def test_masks_that_keep_another_share_than_the_papers_do_not_test_its_claim() -> None:
    def untested(system: str, share: float) -> str | None:
        table = {
            name: {"sst2": {seed: Result(80.0, 0.4, parameters, 1.0, ()) for seed in range(3)}}
            for name, parameters in (("LoRA", 1000), (system, round(1000 * share)))
        }
        return _untested(system, table, ["sst2"])

    for system in ("Partial-LoRA", "Targeted-LoRA"):  # whatever they are compared with
        assert untested(system, 0.02) == "not tested: 2% of the values, the paper 10% to 24%"
        assert [untested(system, share) for share in (0.05, 0.18, 0.4)] == [None] * 3
    names = {system.name for system in SYSTEMS}
    assert untested("LoRA-drop", 0.02) is None and PUBLISHED.keys() | {w for w, *_ in PUBLISHED.values()} <= names


def test_a_claim_holds_if_its_interval_is_on_its_side() -> None:
    assert _verdict(MORE, 13.0, T_975[2] * 6.2) == "undecided"  # three seeds, two standard errors
    assert _verdict(MORE, 3.0, 2.0) == "holds" and _verdict(MORE, -3.0, 2.0) == "fails"
    assert _verdict(SAME, -1.0, 0.5) == "fails" and _verdict(SAME, -1.0, 1.5) == "undecided"
    assert _verdict(SAME, 0.0, 1.5) == "holds" and _verdict(SAME, 1.0, float("nan")) == "one seed: says nothing"


def test_budgets_are_equal_where_the_papers_have_them_equal(tmp_path: Path) -> None:
    """Tied-LoRA and Sparse Adapter have half of LoRA's values on query and value; AdaLoRA ends with LoRA's 8 ranks."""
    lora = values("LoRA, query and value", tmp_path)
    assert lora == 73_728 == values("LoRA-drop", tmp_path) == values("Sparse Adapter", tmp_path)  # before they choose
    assert values("Tied-LoRA", tmp_path) == 37_116
    assert abs(values("Tied-LoRA", tmp_path) - lora / 2) < 0.01 * lora
    assert values("AdaLoRA", tmp_path) == values("LoRA", tmp_path) * 12 // 8 + 36 * 12
    adalora = next(system for system in SYSTEMS if system.name == "AdaLoRA")
    assert settings(MINILM, adalora, tmp_path).method[0].target_r == settings(MINILM, SYSTEMS[1], tmp_path).adapter.r
