"""Loading and checking of settings: merge order, every error message, the resolved YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_llm_ft.config import check_steps, check_world, dump_config, load_config, merge, parse_config
from sparse_llm_ft.errors import UserError

MINIMAL = {
    "model": {"name": "org/base"},
    "task": {"name": "custom"},
    "method": {"name": "lora"},
    "output_dir": "runs/a",
}
WEIGHT = {"name": "weight_lora", "keep": 2, "steps": 3}


def test_later_files_and_then_overrides_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(yaml.safe_dump(MINIMAL | {"training": {"learning_rate": 1, "max_steps": 5}, "seed": 1}))
    second.write_text("training: {learning_rate: 2}\nseed: 2\n")
    config = load_config([str(first), str(second)], ["seed=3", "adapter.target_modules=[q_proj, v_proj]"])
    assert (config.training.learning_rate, config.training.max_steps, config.seed) == (2.0, 5, 3)
    assert config.adapter.target_modules == ("q_proj", "v_proj")


def test_an_exponent_without_a_dot_is_a_number() -> None:
    """YAML 1.1 reads 1e-4 as text."""
    assert (
        parse_config(merge(MINIMAL, yaml.safe_load("training: {learning_rate: 1e-4}"))).training.learning_rate == 1e-4
    )


@pytest.mark.parametrize("setting", ["model.lean", "training.prefix_cache", "training.compile"])
def test_off_needs_no_quotes(setting: str, tmp_path: Path) -> None:
    """YAML 1.1 reads off as false, in a file and in an override."""
    section, _, key = setting.partition(".")
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"model": {"name": "org/base", "lean": "auto"}}))
    assert getattr(getattr(load_config([str(file)], [f"{setting}=off"]), section), key) == "off"
    with pytest.raises(UserError, match=f"{setting}: True is not allowed; expected '(auto|off)'"):
        load_config([str(file)], [f"{setting}=on"])


def test_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called $SCRATCH is not what anybody means. A node's own variables are for the node."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    tree = merge(MINIMAL, {"output_dir": "${SCRATCH}/run", "task": {"path": "$SCRATCH"}})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    config = parse_config(merge(tree, {"model": {"name": "$SCRATCH/base", "stage_to": "$NODE_DISK/base"}}))
    assert (config.output_dir, config.task.path) == (f"{tmp_path}/run", str(tmp_path))
    assert (config.model.name, config.model.stage_to) == (f"{tmp_path}/base", "$NODE_DISK/base")
    (tmp_path / "ratios.json").write_text('{"q_proj": 0.5}')
    partial = {"name": "partial_lora", "ratios": "$SCRATCH/ratios.json", "cache_dir": "$SCRATCH/cache"}
    method: Any = parse_config(merge(MINIMAL, {"method": partial})).method[0]
    assert (method.ratios, method.cache_dir) == ('{"q_proj": 0.5}', f"{tmp_path}/cache")  # the table, which was read
    with pytest.raises(UserError, match=r"output_dir: .*expected a path; \$NOWHERE is not set here"):
        parse_config(MINIMAL | {"output_dir": "$NOWHERE/run"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adapter.lora_alpha", 1e39),
        ("training.learning_rate", 1e300),
        ("training.epochs", 1e308),
        ("evaluation.samples", 10**30),
        ("evaluation.max_new_tokens", 10**9),
    ],
)
def test_numbers_that_torch_cannot_hold_are_refused(setting: str, value: float) -> None:
    section, _, key = setting.partition(".")
    with pytest.raises(UserError, match=f"^{setting}: "):
        parse_config(merge(MINIMAL, {section: {key: value}}))


def test_the_best_checkpoint_needs_a_validation() -> None:
    watched = {"keep_best": "loss", "eval_every": 100, "save_every": 100}
    config = parse_config(merge(MINIMAL, {"training": watched}))
    check_steps(config, 100)
    check_steps(config, None)
    with pytest.raises(
        UserError, match=r"eval_every: 100 is more than the run's 99 steps, and training.keep_best needs"
    ):
        check_steps(config, 99)


def test_another_method_replaces_the_whole_section() -> None:
    assert merge({"method": WEIGHT}, {"method": {"name": "lora"}}) == {"method": {"name": "lora"}}
    assert merge({"method": WEIGHT}, {"method": {"keep": 5}})["method"] == WEIGHT | {"keep": 5}


def test_the_resolved_config_gives_the_same_config() -> None:
    config = parse_config(
        merge(MINIMAL, {"method": WEIGHT, "deepspeed": {"zero_optimization": {"overlap_comm": True}}})
    )
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainin": {}}, "trainin: unknown key; did you mean training?"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat: unknown key; did you mean learning_rate?"),
        ({"method": WEIGHT | {"kep": 1}}, "method.kep: unknown key; did you mean keep?"),
        ({"method": WEIGHT | {"expansion": "qr"}}, "method.expansion: unknown key"),
        ({"method": {"name": "weight_lra"}}, "method.name: 'weight_lra' is unknown; did you mean weight_lora?"),
        ({"method": {"name": "weight_lora", "keep": 2}}, "method.steps: not given; it has no default"),
        ({"task": {"labels": [True, False]}}, "task.labels: True is not allowed; expected text; quote what YAML takes"),
        ({"task": {"prompt": {"text": None}}}, "task.prompt: {'text': None} is not allowed; expected text; quote"),
        ({"task": {"prompt": ""}}, "task.prompt: '' is not allowed; expected some text"),
        ({"task": {"metrics": "rouge"}}, "task.metrics: 'rouge' is not allowed; expected a list, as in [a, b]"),
        ({"training": {"early_stopping": {}}}, "training.early_stopping.patience: not given; it has no default"),
        (
            {"training": {"early_stopping": {"patince": 3}}},
            "training.early_stopping.patince: unknown key; did you mean patience?",
        ),
        ({"method": {"name": "partial_lora", "adalora": {"r": 1}}}, "method.adalora.r: unknown key"),
        ({"task": {"labels": ["a"]}}, "task.labels: has too few values; expected at least 2"),
        ({"method": []}, "method: has too few values; expected at least 1"),
        ({"trackers": ["none"]}, "trackers: 'none' is not allowed; expected 'tensorboard'"),
        ({"tracker_project": ""}, "tracker_project: '' is not allowed; expected text that matches pattern"),
        ({"training": {"micro_batch_size": "atuo"}}, "unable to parse string as an integer, or 'auto'"),
        ({"report": "yes"}, "report: 'yes' is not allowed; expected true or false"),
        ({"task": {"score": [0]}}, "task.score: has too few values; expected two"),
        ({"task": {"score": [0, 5, 6]}}, "task.score: has too many values; expected at most 2"),
        ({"method": WEIGHT | {"keep": 0}}, "method.keep: 0 is not allowed; expected greater than or equal to 1"),
        ({"method": WEIGHT | {"steps": 2.5}}, "method.steps: 2.5 is not allowed; expected a valid integer"),
        ({"method": WEIGHT | {"omega_optimizer": "adam"}}, "expected 'sgd' or 'adamw'"),
        ({"method": WEIGHT | {"cut_after": 3}}, "method.cut_after: 3 leaves no cut before step 3"),
        ({"method": WEIGHT, "training": {"max_steps": 3}}, "method.steps: 3 is not before the run's end at step 3"),
        ({"training": {"micro_batch_size": 3}}, "training.global_batch_size: 16 is not a multiple of"),
        ({"training": {"micro_batch_size": True}}, "training.micro_batch_size: True is not allowed; expected a number"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: 'fast' is not allowed"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: nan is not allowed"),
        ({"training": {"schedule": "cosin"}}, "training.schedule: 'cosin' is not allowed; expected 'cosine'"),
        ({"training": {"max_steps": 5, "warmup_steps": 6}}, "training.warmup_steps: 6 is more than the run's 5 steps"),
        ({"adapter": {"r": 0}}, "adapter.r: 0 is not allowed; expected greater than or equal to 1"),
        ({"adapter": {"lora_dropout": 1}}, "adapter.lora_dropout: 1 is not allowed; expected less than 1"),
        ({"model": {"dtype": "fp16"}}, "model.dtype: 'fp16' is not allowed; expected 'float32' or 'bfloat16'"),
        ({"model": {"name": "./nowhere"}}, "model.name: './nowhere' has no config.json"),
        ({"task": {"path": "nowhere"}}, "task.path: 'nowhere' is not a folder"),
        ({"evaluation": {"temperature": 0.7, "num_beams": 4}}, "evaluation.temperature: 0.7 samples, and"),
        ({"evaluation": {"top_p": 0.9}}, "evaluation.top_p: 0.9 is for sampling"),
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage: 4 is not allowed; expected less than or equal to 3"),
        ({"deepspeed": {"optimizer": {}}}, "deepspeed.optimizer: set by another section"),
        (
            {"deepspeed": {"activation_checkpointing": {}}},
            "deepspeed.activation_checkpointing: set by another section; use model.gradient_checkpointing",
        ),
        (
            {"deepspeed": {"zero_stage": 3}, "method": "dora"},
            "deepspeed.zero_stage: 3, but PEFT's DoRA reads full weights",
        ),
        ({"deepspeed": {"zero_stage": 3}, "method": "adalora"}, "deepspeed.zero_stage: 3, but adalora's orthogonality"),
        ({"deepspeed": {"zero_stge": 3}}, "deepspeed.zero_stge: unknown key; did you mean zero_stage?"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "use deepspeed.zero_stage"),
        ({"deepspeed": {"flops_profiler": True}}, "deepspeed.flops_profiler: True is not allowed; expected a mapping"),
        ({"deepspeed": {"wandb": None}}, "deepspeed.wandb: None is not allowed; expected a mapping of settings"),
        (
            {"deepspeed": {"zero_optimization": []}},
            "deepspeed.zero_optimization: [] is not allowed; expected a mapping",
        ),
        (
            {"deepspeed": {"steps_per_print": "5"}},
            "deepspeed.steps_per_print: '5' is not allowed; expected a valid int",
        ),
        ({"deepspeed": {"steps_per_print": 0}}, "deepspeed.steps_per_print: 0 is not allowed; expected greater than"),
        (
            {"deepspeed": {"wall_clock_breakdown": "maybe"}},
            "wall_clock_breakdown: 'maybe' is not allowed; expected true",
        ),
        (
            {"deepspeed": {"gradient_predivide_factor": 0}},
            "gradient_predivide_factor: 0 is not allowed; expected great",
        ),
        ({"deepspeed": {"elasticity": {}}}, "deepspeed.elasticity: unknown key"),
        ({"adapter": {"target_modules": 5}}, "adapter.target_modules: 5 is not allowed"),
        ({"adapter": {"target_modules": [1, 2]}}, "adapter.target_modules: [1, 2] is not allowed"),
        ({"method": WEIGHT | {"omega_lr": True}}, "method.omega_lr: True is not allowed; expected a number"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is not allowed"),
        ({"task": 3}, "task: 3 is not allowed"),
        ({"method": None}, "method: not given; it has no default"),
        ({"method": 7}, "method: 7 is not allowed; expected a mapping of settings"),
        ({"method": WEIGHT | {"lr_scaling": "sqrt"}}, "method.lr_scaling: 'sqrt' has no effect"),
        ({"model": {"gradient_checkpointing": 1}}, "model.gradient_checkpointing: 1 is not allowed"),
        ({"output_dir": ""}, "output_dir: '' is not allowed"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(merge(MINIMAL, change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_section_is_its_defaults() -> None:
    assert parse_config(MINIMAL | {"training": None}) == parse_config(MINIMAL)


def test_a_misspelt_required_key_is_named_rather_than_the_missing_one() -> None:
    tree = {key: value for key, value in MINIMAL.items() if key != "output_dir"} | {"output_dirr": "x"}
    with pytest.raises(UserError, match=r"output_dirr: unknown key; did you mean output_dir\?"):
        parse_config(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntask: {}\nseed: 2", r"broken.yaml:3: not readable as YAML: the key 'seed' stands twice"),
        ("a: [1, 2", r"broken.yaml:\d+: not readable as YAML"),
        ("- 1\n- 2", "a mapping of sections is needed"),
        ("training: &x {a: 1}\n\tb: 2", "not readable as YAML"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config([str(path)])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--config nowhere.yaml: no such file"):
        load_config(["nowhere.yaml"])


@pytest.mark.parametrize("argument", ["seed", "=3", "a..b=1", "seed=[1"])
def test_an_argument_that_is_no_override_is_named(argument: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError, match="argument"):
        load_config([str(path)], [argument])


def test_the_number_of_processes_must_divide_the_global_batch() -> None:
    config = parse_config(MINIMAL)
    check_world(config, 16)
    with pytest.raises(UserError, match=r"16 is not a multiple of .* = 1 × 3; expected a multiple of 3"):
        check_world(config, 3)
    check_world(parse_config(merge(MINIMAL, {"training": {"micro_batch_size": 4}})), 8, resumes=True)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_config(MINIMAL | {"output_dir": "~/runs"}).output_dir == f"{tmp_path}/runs"


METHOD_FILES = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.stem)
def test_every_method_file_loads_over_a_run_and_survives_its_own_dump(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(MINIMAL | {"task": {"name": "dialogsum"}}))
    config = load_config([str(base), str(path)])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config([str(dumped)]) == config
    assert path.read_text().startswith("# deepspeed ")


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml and adapter_config.json are read from other working directories; a hub id stays as it is."""
    for name in ("org/base", "data"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = parse_config(MINIMAL | {"model": {"name": "org/base"}, "task": {"name": "dialogsum", "path": "data"}})
    assert (local.model.name, local.task.path) == (str(tmp_path / "org/base"), str(tmp_path / "data"))
    hub = parse_config(MINIMAL | {"model": {"name": "org/other"}})
    assert hub.model.name == "org/other"


def test_the_table_of_ratios_takes_the_place_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's config.yaml is complete: whoever reads it later needs no file of another working directory."""
    monkeypatch.chdir(tmp_path)
    Path("ratios.yaml").write_text("q_proj: 0.5\nv_proj: [0.25, 1]\n")
    config = parse_config(MINIMAL | {"method": {"name": "partial_lora", "ratios": "ratios.yaml"}})
    Path("ratios.yaml").unlink()
    assert config.method[0].ratios == '{"q_proj": 0.5, "v_proj": [0.25, 1]}'
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    long = MINIMAL | {"method": {"name": "partial_lora", "ratios": '{"' + "m" * 5000 + '": 0.5}'}}
    assert parse_config(long).method[0].ratios == long["method"]["ratios"]
    for text, problem in (('{"a": ', "is not YAML or JSON"), ("{}", "is not a table"), ("x" * 300, "a path that the")):
        with pytest.raises(UserError, match=f"^method.ratios: .*{problem}"):
            parse_config(MINIMAL | {"method": {"name": "partial_lora", "ratios": text}})


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert parse_config(MINIMAL | {"model": {"name": "org/base", "revision": "v1"}}).model.revision == "v1"
    with pytest.raises(UserError, match=r"^model.revision: 'v1', but .* is a folder, which has none; expected null$"):
        parse_config(MINIMAL | {"model": {"name": str(tmp_path), "revision": "v1"}})
