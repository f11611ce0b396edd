"""The facts of an adapter that decide how a server loads it: its config, and names and shapes of its tensors."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json, read_json
from sparse_llm_ft.plan import MAX_RANK, ModuleName

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no larger header."""

_WHOLE_NAME = r"(.*\.)?({})$"
"""What PEFT makes of a pattern's key before it matches a module's name."""

_PICKLES = ("adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class PairShape:
    """Shape of a module's A (rank, d_in) and B (d_out, rank)."""

    rank: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class AdapterFacts:
    """What can be known of an adapter without reading a weight.

    Attributes:
        config: ``adapter_config.json``.
        pairs: module -> shape of its A and B; names as in the base model, layer by layer.
        others: names of all other tensors in the file.
        layers: number of layers of the base, if its config is known.
        architecture: name of the base's class, if its config is known.
    """

    config: Mapping[str, Any]
    pairs: Mapping[str, PairShape]
    others: tuple[str, ...] = ()
    layers: int | None = None
    architecture: str | None = None

    @property
    def r(self) -> int:
        """The general rank."""
        return int(self.config["r"])

    @property
    def alpha(self) -> float:
        """The general lora_alpha."""
        return float(self.config["lora_alpha"])

    @property
    def is_lora(self) -> bool:
        """Whether its tensors are those of PEFT's LoRA."""
        return self.config.get("peft_type") == "LORA"

    @cached_property
    def largest_rank(self) -> int:
        """Of the general rank, those in ``rank_pattern`` and those of the tensors."""
        return max((self.r, *self._pattern("rank_pattern").values(), *(pair.rank for pair in self.pairs.values())))

    def rank(self, module: str) -> int:
        """The rank that PEFT gives a module: ``rank_pattern`` over ``r``."""
        return int(_match(self._pattern("rank_pattern"), module) or self.r)

    def scaling(self, module: str) -> float:
        """The factor on B A in PEFT, which is right by definition."""
        alpha = _match(self._pattern("alpha_pattern"), module)
        rank = self.rank(module)
        return float(self.alpha if alpha is None else alpha) / (
            math.sqrt(rank) if self.config.get("use_rslora") else rank
        )

    def _pattern(self, key: str) -> Mapping[str, Any]:
        return self.config.get(key) or {}


def read_facts(folder: Path, base: Path | None = None) -> AdapterFacts:
    """Read an adapter's config and the header of its weights; no weight is read.

    Args:
        base: folder with the base's ``config.json``; None: the base that the adapter names, if that is a folder or in
            the hub's cache.

    Raises:
        UserError: a file is missing or not what it should be, or the weights are a pickle.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected one with {CONFIG} and {WEIGHTS}")
    config = _config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        for name in _PICKLES:
            if (folder / name).is_file():
                raise UserError(f"{folder / name}: a pickle, which may run code; expected {WEIGHTS}")
        raise UserError(f"{folder}: no {WEIGHTS}; expected a PEFT adapter")
    pairs, others = _tensors(folder / WEIGHTS)
    known = _base_config(config, base)
    layers, architectures = known.get("num_hidden_layers"), known.get("architectures")
    return AdapterFacts(
        config,
        pairs,
        others,
        layers if type(layers) is int else None,
        architectures[0] if isinstance(architectures, list) and architectures else None,
    )


def _config(path: Path) -> dict[str, Any]:
    config = _json(path)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f"{path}: no peft_type; expected the config of a PEFT adapter")
    if config.get("target_parameters"):
        raise UserError(
            f"{path}: target_parameters is {config['target_parameters']!r:.60}; expected an adapter of modules, since "
            "no server's code for adapters of parameters was read"
        )
    if config["peft_type"] == "LORA":
        _check_number(path, "r", config.get("r"), whole=True)
        _check_number(path, "lora_alpha", config.get("lora_alpha"))
        for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
            pattern = config.get(key) or {}
            if not isinstance(pattern, dict):
                raise UserError(f"{path}: {key} is {pattern!r:.60}; expected an object of names and numbers")
            for name, value in pattern.items():
                _check_number(path, f"{key}.{name}", value, whole)
                try:
                    re.compile(_WHOLE_NAME.format(name))
                except re.error as error:
                    raise UserError(
                        f"{path}: {key} has the name {name!r:.60}, no regular expression ({error})"
                    ) from None
    return config


def _check_number(path: Path, key: str, value: object, whole: bool = False) -> None:
    kind, most = (int, MAX_RANK) if whole else (int | float, sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, kind) or not (1 if whole else -most) <= value <= most:
        expected = f"a whole number from 1 to {MAX_RANK}" if whole else "a finite number"
        raise UserError(f"{path}: {key:.80} is {value!r:.40}; expected {expected}")


def _tensors(path: Path) -> tuple[dict[str, PairShape], tuple[str, ...]]:
    """Pairs and other names of a safetensors file (format: 8 bytes of length, then a JSON object)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LARGEST_HEADER, path.stat().st_size - 8):
                raise UserError(f"{path}: its header claims {length:,} bytes; expected a safetensors file")
            header = parse_json(file.read(length).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ParseError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: its header cannot be read ({error}); expected a safetensors file") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is no object; expected a safetensors file")
    shapes = {name: _shape(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    pairs = {}
    for name in shapes:
        module = name.removeprefix(PREFIX).removesuffix(A)
        a, b = shapes[name], shapes.get(f"{PREFIX}{module}{B}", [])
        if name == f"{PREFIX}{module}{A}" and len(a) == len(b) == 2 and a[0] == b[1]:
            if not a[0]:
                raise UserError(f"{path}: {name:.80} has shape {a}; expected a rank of at least 1")
            pairs[module] = PairShape(a[0], a[1], b[0])
    paired = {f"{PREFIX}{module}{part}" for module in pairs for part in (A, B)}
    pairs = {module: pairs[module] for module in sorted(pairs, key=lambda m: (ModuleName.parse(m).number or 0, m))}
    return pairs, tuple(name for name in shapes if name not in paired)


def _shape(path: Path, name: str, entry: object) -> list[int]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise UserError(f"{path}: {name:.80} has no shape; expected a safetensors file")
    return shape


def _base_config(config: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    """The base's config.json; empty if it is not on this machine."""
    if base is not None:
        return _text_config(_json(base / "config.json"))
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return {}
    try:
        is_folder = (Path(name) / "config.json").is_file()
    except OSError:  # no name of a folder, or one that this user may not look into
        return {}
    if is_folder:
        return _text_config(_json(Path(name) / "config.json"))
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=config.get("revision"))
    except HFValidationError:  # a folder of another machine
        return {}
    return _text_config(_json(Path(cached))) if isinstance(cached, str) else {}


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """With the number of layers of a multimodal base's language model."""
    text = config.get("text_config")
    return {**text, **config} if isinstance(text, dict) else config


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, constants=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ParseError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: no object; expected a JSON object")
    return value


def _match(pattern: Mapping[str, Any], module: str) -> Any:
    """The first entry that matches, as PEFT's `get_pattern_key` (peft/utils/other.py) finds it; None without one."""
    return next((value for key, value in pattern.items() if re.match(_WHOLE_NAME.format(key), module)), None)
