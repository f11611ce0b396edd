"""Loads the pretrained base: tokenizer, architecture without weights, and weights, optionally in 4 bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.errors import ConfigError, reason_of
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.architecture import (
    ARCHITECTURES,
    HEAD_NAMES,
    auto_class,
    base_of,
    find_task_mode,
    has_head,
)
from sparse_llm_ft.model.buffers import remember_fixed
from sparse_llm_ft.model.four_bit import keep_unpacked, release_weights
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.loading_progress import reported
from sparse_llm_ft.model.multimodal import is_multimodal, unreached_parts
from sparse_llm_ft.model.quantization import check_codes, four_bit_options, resolve_quantization, stored_quantization
from sparse_llm_ft.model.resizing import grow_embeddings, resized, token_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_WITH_WEIGHTS = (AutoModelForMultimodalLM, *(architecture.auto for architecture in ARCHITECTURES.values()))

_UNREADABLE = (
    *(OSError, ValueError, ImportError, RuntimeError, LookupError, ArithmeticError, TypeError, AttributeError),
    *(SafetensorError, StrictDataclassError),
)
"""transformers' exceptions for damaged or wrong configs, tokenizers and weights."""


def find_model_task_mode(config: ModelConfig, task: Task, mode: str) -> TaskMode:
    """Resolve ``task.mode`` for the configured model (`find_task_mode`).

    Raises:
        ConfigError: the model cannot be loaded, or does not support the mode.
    """
    return find_task_mode(_settings(config), config.name, task, mode)


def find_quantization(config: ModelConfig) -> ModelConfig:
    """The model's settings with the quantisation that will run (`resolve_quantization`).

    Raises:
        ConfigError: the model cannot be loaded, or is stored in another form.
    """
    return resolve_quantization(config, _settings(config))


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are trained in full, in the model's order; none without a task head.

    They are the head and every module that the checkpoint lacks, such as a pooler, as found by `empty_model` and
    `load_model`.
    """
    base = base_of(model)
    if not has_head(base):
        return ()
    wanted = {*HEAD_NAMES, *getattr(base, _FRESH, ())}
    return tuple(name for name, _ in base.named_modules() if name in wanted)


def load_tokenizer(config: ModelConfig, task_mode: TaskMode = CAUSAL_LM) -> PreTrainedTokenizerBase:
    """The model's tokenizer. If it has no padding token, it pads with its end-of-sequence token.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or lacks a padding token or, for generation, an end-of-sequence
            token.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    if tokenizer.eos_token_id is None and not task_mode.has_head:
        raise ConfigError(
            "model.name",
            f"{config.name!r} has a tokenizer without end-of-sequence token",
            "expected a model for text generation",
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.name", f"{config.name!r} has a tokenizer without padding token", "expected one that has it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "right"  # overrides the saved setting
    return tokenizer


def empty_model(
    config: ModelConfig, attn_implementation: str | None = None, task_mode: TaskMode = CAUSAL_LM
) -> PreTrainedModel:
    """The architecture on the meta device: names and shapes without weights, in about a second.

    With a task head, the checkpoint's tensor names are read too, to find the missing ones (`head_modules`).

    Args:
        attn_implementation: None takes the model's default.

    Raises:
        ConfigError: the model cannot be loaded, does not support the mode, or cannot be resized.
    """
    model = _empty_as_stored(config, attn_implementation, task_mode)
    return resized(model, config, load_tokenizer(config, task_mode)) if config.resize_embeddings else model


def _empty_as_stored(config: ModelConfig, attn_implementation: str | None, task_mode: TaskMode) -> PreTrainedModel:
    settings = _settings(config)
    builder, purpose = auto_class(settings, task_mode.mode), ARCHITECTURES[task_mode.mode].purpose
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = builder.from_config(
                settings, trust_remote_code=config.trust_remote_code, **options
            )
    except _UNREADABLE as error:
        reason = reason_of(error)
        if attn_implementation is not None and isinstance(error, ValueError | ImportError):
            problem = f"{attn_implementation!r} cannot be used ({reason})"
            raise ConfigError("model.attn_implementation", problem, "expected sdpa or eager") from None
        known = "Unrecognized configuration class" not in reason
        raise ConfigError(
            "model.name",
            f"{config.name!r} is a {settings.model_type} model"
            + (f" that cannot be built ({type(error).__name__}: {reason})" if known else ""),
            f"expected one that transformers can load {purpose}",
        ) from None
    if not task_mode.has_head:
        return model
    if stored_quantization(settings) is not None:  # only names and shapes are wanted, those of the plain weights
        plain = _settings(config)
        for part in (plain, plain.get_text_config()):
            part.__dict__.pop("quantization_config", None)
        options["config"] = plain
    return _load_with_head(config, task_mode, device_map={"": "meta"}, **options)


def empty_like_stored(config: ModelConfig, task_mode: TaskMode) -> PreTrainedModel:
    """The architecture that a folder's config names, on the meta device. Unlike `empty_model`, it reads no weights and
    takes the number of labels from the config.

    Raises:
        ConfigError: the config cannot be loaded.
    """
    settings = _settings(config)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(settings, task_mode.mode).from_config(
            settings, trust_remote_code=config.trust_remote_code
        )
    return model


def check_weights(config: ModelConfig) -> None:
    """Refuse a local model folder without loadable weights, before anything is written.

    Raises:
        ConfigError: the folder has no safetensors file.
    """
    folder = Path(config.name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for ending in ("bin", "pt", "pth", "ckpt", "pkl") for path in folder.glob(f"*.{ending}"))
    if pickled:
        raise ConfigError(
            "model.name",
            f"{config.name!r} has its weights in {pickled[0]}, a pickle, which can run any code when it is loaded",
            "expected model.safetensors there",
        )
    raise ConfigError("model.name", f"{config.name!r} has no weights", "expected model.safetensors there")


def load_model(
    config: ModelConfig, task_mode: TaskMode = CAUSAL_LM, seed: int = 0, wait: Wait | None = None
) -> PreTrainedModel:
    """The frozen base with its weights, on this process's device.

    Args:
        seed: seeds torch's generators, so that a new head and new rows of embeddings are the same on every rank.
        wait: shows the progress, in bytes; None: nothing does.

    Raises:
        ConfigError: the weights cannot be loaded.
    """
    # How transformers loads the weights.
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        # Modules trained in full are not quantised; with None, transformers skips only the output embeddings.
        whole = head_modules(empty_model(config, task_mode=task_mode)) if task_mode.has_head else None
        options |= four_bit_options(config.quantization, _settings(config), DTYPES[config.dtype], whole)
    if config.quantization != "none" or torch.cuda.is_available():
        options["device_map"] = {"": device()}  # read onto the device, not through host memory

    # The weights; a missing head is drawn.
    torch.manual_seed(seed)
    load = _load_with_head if task_mode.has_head else load_complete
    with reported(wait):
        model = load(config, task_mode, **options)
    if task_mode.has_head:  # a decoder's head finds each text's last token by the padding
        model.config.get_text_config().pad_token_id = load_tokenizer(config, task_mode).pad_token_id

    multimodal = is_multimodal(model)
    remember_fixed(model, unreached_parts(empty_model(config, task_mode=task_mode), config.name) if multimodal else ())
    if config.resize_embeddings:

        def place(parameter: nn.Parameter) -> None:
            parameter.data = parameter.data.to(options.get("device_map", {"": "cpu"})[""])

        with silence():  # transformers says how it draws
            grow_embeddings(model, token_count(load_tokenizer(config, task_mode)), seed, place=place)

    # The base is frozen and never generates with a cache during training.
    model.requires_grad_(False)
    check_codes(model, config.name)
    keep_unpacked(model)
    release_weights(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    set_use_cache(model, False)
    if config.lean == "auto":
        make_lean(model)
    return model


def enable_checkpointing(model: Any) -> None:
    """Recompute layers in backward, without a graph below the lowest adapter.

    Non-reentrant: the reentrant kind needs inputs that require gradients. transformers makes the embeddings' output
    require them in either case (5.24), and backward would run down to it.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


def load_complete(config: ModelConfig, task_mode: TaskMode, /, **options: Any) -> PreTrainedModel:
    """Load a model whose checkpoint must be complete. transformers alone would draw missing weights and continue.

    Args:
        options: further arguments of `from_pretrained`.

    Raises:
        ConfigError: weights cannot be loaded, are missing, left over or of another shape.
    """
    model: PreTrainedModel
    with silence():  # errors below are one line
        model, report = _from_pretrained(
            auto_class(_settings(config), task_mode.mode),
            config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    for problem, names in (
        ("lacks weights", report["missing_keys"]),
        ("has weights that the model lacks", report["unexpected_keys"]),
        ("has weights of another shape", {name for name, *_ in report["mismatched_keys"]}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError("model.name", f"{config.name!r} {problem}: {shown}", "expected a complete checkpoint")
    return model


def set_use_cache(model: PreTrainedModel, value: bool) -> None:
    """Set `use_cache` in the config that has it, if one has: in a multimodal model that is the language model's."""
    settings = model.config.get_text_config()
    if hasattr(settings, "use_cache"):
        settings.use_cache = value


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


_FRESH = "_sparse_llm_ft_fresh"
"""Attribute of a model with a head: names of the modules that its checkpoint lacks. Only loading finds them."""


def _load_with_head(config: ModelConfig, task_mode: TaskMode, /, **options: Any) -> PreTrainedModel:
    """Load a model with the task's head; missing weights are drawn from torch's generator.

    Raises:
        ConfigError: weights cannot be loaded, or more than a head is missing.
    """
    if task_mode.outputs is not None:
        if "config" in options:
            options["config"].num_labels = task_mode.outputs
        else:
            options["num_labels"] = task_mode.outputs
    with silence():  # transformers reports the missing head at length
        model, report = _from_pretrained(
            auto_class(_settings(config), task_mode.mode),
            config,
            ignore_mismatched_sizes=True,  # a head for another number of labels is replaced too
            output_loading_info=True,
            **options,
        )
    packed = {name.removesuffix(".absmax") for name in report["unexpected_keys"] if name.endswith(".absmax")}
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"] if name not in packed)}
    fresh = tuple(_without_weights(model, missing))
    for name in fresh:
        module = model.get_submodule(name)
        inside_layer = any(part.isdigit() for part in name.split("."))
        if inside_layer or any(isinstance(m, nn.ModuleList | nn.Embedding) for m in module.modules()):
            raise ConfigError(
                "model.name",
                f"{config.name!r} has no fitting weights for {name}",
                "expected a checkpoint that lacks only a head",
            )
    setattr(model, _FRESH, fresh)
    return model


def _without_weights(model: nn.Module, missing: Iterable[str]) -> Iterator[str]:
    """Yield the outermost modules whose parameters are all `missing`, then the owners of other missing parameters."""
    names = {name for name, _ in model.named_parameters()}
    rest = names & set(missing)
    for name, _ in model.named_modules():
        inside = {parameter for parameter in names if parameter.startswith(name + ".")}
        if inside and inside <= rest:
            rest -= inside
            yield name
    yield from sorted({parameter.rpartition(".")[0] for parameter in rest})


@contextmanager
def silence() -> Iterator[None]:
    """Suppress transformers' warnings and progress bar."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _settings(config: ModelConfig) -> PreTrainedConfig:
    return _from_pretrained(AutoConfig, config)


def _from_pretrained(kind: Any, config: ModelConfig, /, **options: Any) -> Any:
    """Load without pickle, and without the repository's code unless the config allows it.

    Raises:
        ConfigError: the repository is missing, unreadable, or holds an adapter.
    """
    if (Path(config.name) / "adapter_config.json").exists():
        # transformers would load the adapter and the base that it names instead of this folder.
        raise ConfigError("model.name", f"{config.name!r} holds an adapter", "expected a model without one")
    if kind in _WITH_WEIGHTS:
        options["use_safetensors"] = True
    if config.name.startswith(("/", "~", ".")) and not Path(config.name).expanduser().is_dir():
        raise ConfigError(
            "model.name", f"{config.name!r} is no folder on this machine", "expected the local folder that the run used"
        )
    try:
        return kind.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except _UNREADABLE as error:
        if not config.trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                "model.trust_remote_code",
                f"false, but {config.name!r} needs code of its own, which would run in this process",
                "expected true, if you trust it",
            ) from None
        reason = reason_of(error)
        raise ConfigError(
            "model.name",
            f"{config.name!r} cannot be loaded ({reason})",
            "expected a hub id or a folder in Hugging Face layout",
        ) from error
