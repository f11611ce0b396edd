"""YAML files and ``key.sub=value`` overrides -> `RunConfig`, and every check that needs neither data nor model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from sparse_llm_ft.config.problems import as_config_error, wanted
from sparse_llm_ft.config.renamed import replace_old_keys
from sparse_llm_ft.config.schema import MANAGED, PASSED_THROUGH, DeepSpeedConfig, EvaluationConfig, RunConfig
from sparse_llm_ft.config.types import is_file
from sparse_llm_ft.config.validation import check_chain, check_data_path
from sparse_llm_ft.errors import ConfigError, UserError, holds_token, reaching
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_yaml, read_yaml

Tree = dict[str, Any]

_DEEPEST = 16
_NO_TOKENS = "expected none: put it into the environment variable HF_TOKEN, or log in with `hf auth login`"


def load_config(paths: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and merge `paths` in order, then `overrides`; later values win, mappings merge key by key.

    Args:
        paths: YAML files.
        overrides: ``section.key=value``; the value is read as YAML.

    Raises:
        UserError: a missing or unreadable file, an unknown key (with the nearest known one), a wrong type, a value
            out of range, settings that contradict each other.
    """
    tree: Tree = {}
    for path in paths:
        tree = merge(tree, _read_yaml(path))
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return parse_config(tree)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate config files from overrides: an argument with "=" is an override, unless a file has that name."""
    files = [argument for argument in arguments if "=" not in argument or is_file(argument)]
    return files, [argument for argument in arguments if argument not in files]


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate one merged tree of settings. Raises as `load_config`."""
    _check_tree(tree)
    tree = {key: value for key, value in replace_old_keys(tree).items() if value is not None}  # empty: the defaults
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise as_config_error(error, tree) from None
    _check_together(config)
    config = config.model_copy(update={"method": tuple(method.with_files() for method in config.method)})
    return _with_chat_template(_with_absolute_paths(config))


def _with_chat_template(config: RunConfig) -> RunConfig:
    """The settings with the chat template's text in place of its file's name.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    given = config.task.chat_template
    if given is None or "{{" in given or "{%" in given:
        return config
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(
            "task.chat_template", f"{given!r} cannot be read ({reason})", "expected a file with a Jinja template"
        ) from None
    if "{{" not in text and "{%" not in text:
        raise ConfigError("task.chat_template", f"{given!r} holds no Jinja", "expected a template with {{ }} or {% %}")
    return config.model_copy(update={"task": config.task.model_copy(update={"chat_template": text})})


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The settings with the local model and the data by their absolute paths.

    config.yaml, the adapter and the checkpoints hold them, and are read from other working directories too.
    """
    name, path = Path(config.model.name).expanduser(), config.task.path
    model = config.model.model_copy(update={"name": str(name.absolute())}) if name.is_dir() else config.model
    task = config.task if path is None else config.task.model_copy(update={"path": str(Path(path).absolute())})
    return config.model_copy(update={"model": model, "task": task})


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Deep merge of two trees of settings; `over` wins. A method of another name replaces the whole section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            renamed = key == "method" and "name" in value and value["name"] != old.get("name")
            merged[key] = dict(value) if renamed else merge(old, value)
        else:
            merged[key] = value
    return merged


def _read_yaml(path: str) -> Tree:
    if not is_file(path):
        raise UserError(f"--config {path}: no such file")
    try:
        data = read_yaml(Path(path))
    except OSError as error:
        raise UserError(f"--config {path}: not readable: {error.strerror}") from None
    except ParseError as error:
        line = f":{error.line}" if error.line else ""
        raise UserError(f"--config {path}{line}: not readable as YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"--config {path}: a mapping of sections is needed, such as 'model:' and 'training:'")
    return data


def _parse_override(text: str) -> Tree:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"argument {text!r}: not an override; write section.key=value")
    try:
        tree = parse_yaml(value)
    except ParseError as error:
        raise UserError(f"argument {text!r}: the value is not readable as YAML ({error}); quote it") from None
    parts = key.split(".")
    if len(parts) > _DEEPEST:
        raise UserError(f"argument {key[:60]!r}: no setting is {len(parts)} levels deep")
    for part in reversed(parts):
        tree = {part: tree}
    return tree


def _check_tree(value: Any, where: str = "", depth: int = 0) -> None:
    """Refuse values that no setting can have, and access tokens, which config.yaml, log and report would show.

    Raises:
        ConfigError: naming the setting.
    """
    if depth > _DEEPEST:
        raise ConfigError(where[:60], "nested too deeply", f"expected at most {_DEEPEST} levels")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(where or "settings", f"the key {key!r:.60} is no text", "quote it")
            if holds_token(key):
                raise ConfigError(where or "settings", "a key holds an access token", _NO_TOKENS)
            _check_tree(inner, f"{where}.{key}" if where else key, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_tree(inner, where, depth + 1)
    elif isinstance(value, str):
        if holds_token(value):
            raise ConfigError(where, "holds an access token", _NO_TOKENS)
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(where, f"{value!r:.60} holds half of a surrogate pair", "expected text")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigError(where, f"{value!r:.60} is of type {type(value).__name__}", "expected text or a number")


def _check_together(config: RunConfig) -> None:
    """Checks that need more than one value, or a folder."""
    training = config.training
    if training.global_batch_size % training.fixed_micro_batch_size:
        raise ConfigError(
            "training.global_batch_size",
            f"{training.global_batch_size} is not a multiple of training.micro_batch_size {training.micro_batch_size}",
            "choose sizes that divide",
        )
    if config.memory_budget is not None and training.micro_batch_size == "auto":
        raise ConfigError(
            "training.micro_batch_size",
            "auto, and method.budget limits the memory that a given micro-batch may need",
            "expected a number",
        )
    check_chain(config.method)
    check_steps(config, training.max_steps)
    for method in config.method:
        method.check_run(config)
    check_data_path(config)
    _check_evaluation(config.evaluation)
    _check_deepspeed(config.deepspeed)
    _check_compile(config)
    _check_on_oom(config)
    with reaching("task.path"):
        if config.task.path is not None and not Path(config.task.path).is_dir():
            raise ConfigError(
                "task.path", f"{config.task.path!r} is not a folder", "expected a folder with train.jsonl"
            )
    name = config.model.name
    if "://" in name:
        raise ConfigError("model.name", f"{name!r} is a URL", "expected a hub id, or a local folder")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1  # no hub id looks like that
    with reaching("model.name"):
        if is_path and not (Path(name).expanduser() / "config.json").is_file():
            raise ConfigError(
                "model.name",
                f"{name!r} has no config.json",
                "expected a model folder in Hugging Face layout, or a hub id",
            )
        if config.model.revision is not None and Path(name).expanduser().is_dir():
            raise ConfigError(
                "model.revision",
                f"{config.model.revision!r}, but {name!r} is a folder, which has none",
                "expected null",
            )


def _check_evaluation(config: EvaluationConfig) -> None:
    if config.temperature > 0 and config.num_beams > 1:
        raise ConfigError(
            "evaluation.temperature",
            f"{config.temperature} samples, and evaluation.num_beams {config.num_beams} searches for the most probable",
            "expected temperature 0 or num_beams 1",
        )
    if config.top_p < 1 and not config.temperature:
        raise ConfigError(
            "evaluation.top_p", f"{config.top_p} is for sampling", "expected evaluation.temperature above 0 beside it"
        )


def _check_compile(config: RunConfig) -> None:
    """Refuse to compile what cannot be traced, or would be compiled again for every layer.

    At ZeRO-3, DeepSpeed's hooks gather weights while a layer runs, and torch traces them empty (pytorch issue 115484).
    bitsandbytes keeps a state in Python beside each 4-bit weight. The adapters draw dropout from seeds that are
    Python's integers. A prefix cache replaces what a stack of layers does.
    """
    training = config.training
    obstacles = {
        f"deepspeed.zero_stage is {config.deepspeed.zero_stage}": config.deepspeed.zero_stage == 3,
        f"model.quantization is {config.model.quantization}": config.model.quantization != "none",
        f"adapter.lora_dropout is {config.adapter.lora_dropout}": config.adapter.lora_dropout > 0,
        f"training.prefix_cache is {training.prefix_cache}": training.prefix_cache != "off",
    }
    for obstacle, there in obstacles.items():
        if there and training.compile == "layers":
            raise ConfigError(
                "training.compile",
                f"layers, but {obstacle}",
                "expected off, or deepspeed.zero_stage 0 to 2, model.quantization none, adapter.lora_dropout 0 and "
                "training.prefix_cache off",
            )


def _check_on_oom(config: RunConfig) -> None:
    """Refuse to shrink the micro-batch where a rank's passes contain collectives, which it cannot leave."""
    obstacles = {
        "deepspeed.zero_stage is 3: a rank out of memory cannot gather the weights that others still wait for":
            config.deepspeed.zero_stage == 3,
        f"training.prefix_cache is {config.training.prefix_cache}: ranks exchange states within a forward pass":
            config.training.prefix_cache != "off",
    }  # fmt: skip
    for obstacle, there in obstacles.items():
        if there and config.training.on_oom == "shrink":
            raise ConfigError(
                "training.on_oom",
                f"shrink, but {obstacle}",
                "expected error, or deepspeed.zero_stage 0 to 2 and training.prefix_cache off",
            )


def _check_deepspeed(config: DeepSpeedConfig) -> None:
    for key, value in config.extra.items():
        if key in MANAGED:
            raise ConfigError(f"deepspeed.{key}", "set by another section", f"use {MANAGED[key]}")
        if key not in PASSED_THROUGH:
            near = difflib.get_close_matches(key, [*PASSED_THROUGH, "zero_stage"], n=1)
            hint = f"did you mean {near[0]}?" if near else "see deepspeed.ai/docs/config-json for its settings"
            raise ConfigError(f"deepspeed.{key}", "unknown key", hint)
        try:
            TypeAdapter(PASSED_THROUGH[key]).validate_python(value)
        except ValidationError as error:
            (problem, *_) = error.errors(include_url=False)
            raise ConfigError(f"deepspeed.{key}", f"{value!r} is not allowed", f"expected {wanted(problem)}") from None
    if "stage" in config.extra.get("zero_optimization", {}):
        raise ConfigError("deepspeed.zero_optimization.stage", "set by another key", "use deepspeed.zero_stage")


def check_steps(config: RunConfig, total_steps: int | None) -> None:
    """Refuse settings that do not fit the run's length. `total_steps` is None while the length is unknown."""
    warmup_steps = config.training.warmup_steps
    if total_steps is not None and warmup_steps > total_steps:
        raise ConfigError(
            "training.warmup_steps",
            f"{warmup_steps} is more than the run's {total_steps} steps",
            f"expected at most {total_steps}",
        )
    training = config.training
    every, follows = training.eval_every, "keep_best" if training.keep_best else "early_stopping"
    if total_steps is not None and training.watched_metric and every is not None and every > total_steps:
        raise ConfigError(
            "training.eval_every",
            f"{every} is more than the run's {total_steps} steps, and training.{follows} needs a validation",
            f"expected at most {total_steps}",
        )
    for method in config.method:
        method.check(total_steps)


def check_world(config: RunConfig, world_size: int, resumes: bool = False) -> None:
    """Refuse batch sizes that `world_size` ranks cannot share equally.

    Args:
        resumes: the run has checkpoints; it finds a micro-batch that fits by itself.
    """
    training = config.training
    share = world_size if resumes else training.fixed_micro_batch_size * world_size
    if training.global_batch_size % share:
        product = (
            f"{world_size} processes"
            if resumes or training.micro_batch_size == "auto"
            else (f"training.micro_batch_size × processes = {training.micro_batch_size} × {world_size}")
        )
        raise ConfigError(
            "training.global_batch_size",
            f"{training.global_batch_size} is not a multiple of {product}",
            f"expected a multiple of {share}",
        )
