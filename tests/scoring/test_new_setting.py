"""A scoring setting is declared once: on a copy of the package, one line makes it a setting everywhere."""

from __future__ import annotations

from pathlib import Path

from helpers.package_copy import add_line, copy_package, run_python

USES = """
from sparse_llm_ft.config.registry import find_method
from sparse_llm_ft.methods.method import MethodInputs
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import uniform_plan

method = find_method("partial_lora")
settings = method.settings_class(name="partial_lora", rounding="up")
targets = {"model.layers.0.q_proj": (8, 8)}
train = Phase("train", uniform_plan(targets, 2, 4.0))
begun, _ = method(settings, MethodInputs(2, 4.0, 0, 10)).begin(train, None, targets)
assert begun.scoring.derivation.rounding == "up"
saved = begun.to_dict()
assert saved["scoring"]["derivation"]["rounding"] == "up"
assert Phase.from_dict(saved) == begun
"""


def test_one_line_makes_it_a_setting_of_the_method_the_phase_and_the_scores(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    line = 'rounding: Literal["nearest", "up"] = "nearest"'
    add_line(package / "config" / "derivation.py", "flow_preservation: StrictBool", line)
    result = run_python(tmp_path, "-c", USES)
    assert result.returncode == 0, result.stderr[-2000:]
