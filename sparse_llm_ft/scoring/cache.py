"""A cache of derivations by content; later runs read them from files, other ranks from bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from sparse_llm_ft.adapters import base_tensors
from sparse_llm_ft.config import ModelConfig, RunConfig
from sparse_llm_ft.io.atomic import verify_folder
from sparse_llm_ft.io.content_cache import ContentCache, content_key, hash_files, hash_json
from sparse_llm_ft.io.strict_json_yaml import read_json
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.scoring.derivation import Derivation

VERSION = 1
TENSORS, METADATA = "importance.safetensors", "derivation.json"
_METADATA = "metadata"
"""Among the tensors of `to_bytes`: the metadata's JSON as uint8."""
_LOGGER = logging.getLogger(__name__)


def derivations_folder(cache_dir: str | None) -> Path:
    """The folder of stored derivations.

    Args:
        cache_dir: None: the user's cache folder.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_llm_ft" / "derivations"


def hash_model(model: ModelConfig) -> str:
    """SHA-256 of a local base's files, or of the hashes by which the hub's cache names them."""
    folder = Path(model.name)
    if folder.is_dir():
        return hash_files([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    snapshot = Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
    return content_key(files={path.name: path.resolve().name for path in sorted(snapshot.iterdir())})


def hash_samples(samples: Iterable[object]) -> str:
    """SHA-256 of samples in order; each is a dataclass of JSON values, or a JSON value."""
    return hash_json([asdict(s) if is_dataclass(s) and not isinstance(s, type) else s for s in samples])


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's shape, type and values."""
    return hashlib.sha256(safetensors.torch.save({"": tensor.contiguous()})).hexdigest()


def derivation_key(
    config: RunConfig,
    phase: Phase,
    base: str,
    names: Sequence[str],
    samples: Iterable[object],
    fitted: Sequence[object],
    values: Mapping[str, torch.Tensor],
) -> str:
    """The key of the derivation at a phase's end: a hash of the base's files, D_t, the head, and every setting that
    ratios depend on.

    Args:
        phase: with its steps and a global batch size.
        base: `hash_model`.
        names: of the scored modules.
        samples: D_t.
        fitted: the samples that the phase's head is fitted on.
        values: the trained parameters at the phase's end. Not read if the phase fits a head.
    """
    spec, training = phase.scoring, config.training
    assert spec is not None
    if phase.target_plan is not None:  # how the head is fitted: its values differ in the last bits from run to run
        fitting = training.model_dump(exclude={"micro_batch_size", "learning_rate", "head_learning_rate", *_CADENCE})
        order = [phase.steps, phase.global_batch_size, config.seed, phase.learning_rate, fitting]
        rows = {name: list(kept.indices) for name, kept in phase.plan.rows.items()}
        head: object = [*order, hash_samples(fitted), list(phase.plan.trained), rows]
    else:
        trained = values if phase.method else base_tensors(values)
        head = {name: hash_tensor(tensor) for name, tensor in trained.items()}
    return content_key(
        model=base,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        new_rows=config.seed if config.model.resize_embeddings else None,
        task=config.task.model_dump(include={"name", "mode", "labels"}),  # what an answer may be, which no sample says
        samples=hash_samples(samples),
        head=head,
        modules=list(names),
        search=spec.search,
        compare=spec.compare,
        **spec.derivation.model_dump(exclude={"micro_batch_size"}),
    )


_CADENCE = (
    *("save_every", "eval_every", "log_every", "keep_checkpoints", "max_skipped_updates", "compile"),
    *("prefix_cache", "prefix_cache_bytes", "keep_best", "early_stopping", "on_oom", "device_memory"),
)
"""Settings of training that change nothing in a fitted head."""


def load(folder: Path, key: str, warn: Callable[[str], object] = _LOGGER.warning) -> Derivation | None:
    """The derivation stored under `key`; None if there is none or it cannot be used.

    Args:
        warn: called with a line about a damaged entry.
    """
    return ContentCache(folder, _read).load(key, warn)


def save(folder: Path, key: str, derivation: Derivation) -> None:
    """Store `derivation` under `key`, unless a valid one is there. Raises OSError if the folder is not writable."""

    def fill(temporary: Path) -> None:
        tensors, metadata = derivation.to_tensors()
        safetensors.torch.save_file(tensors, temporary / TENSORS)
        text = json.dumps({"version": VERSION, **metadata}, indent=1)
        (temporary / METADATA).write_text(text + "\n", encoding="utf-8")

    ContentCache(folder, _read).write(key, fill, warn=lambda message: None)


def to_bytes(derivation: Derivation) -> bytes:
    """The derivation as bytes, to be sent to other ranks."""
    tensors, metadata = derivation.to_tensors()
    text = torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8)
    return safetensors.torch.save(tensors | {_METADATA: text})


def from_bytes(data: bytes) -> Derivation:
    """The derivation of `to_bytes`."""
    tensors = safetensors.torch.load(data)
    metadata = json.loads(bytes(tensors.pop(_METADATA).numpy()))
    return Derivation.from_tensors(tensors, metadata)


def _read(entry: Path) -> Derivation:
    verify_folder(entry, (TENSORS, METADATA))
    metadata = read_json(entry / METADATA, constants=True)
    try:
        if metadata.pop("version") != VERSION:
            raise ValueError("it is of another version")
        return Derivation.from_tensors(safetensors.torch.load_file(entry / TENSORS), metadata)
    except (TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
