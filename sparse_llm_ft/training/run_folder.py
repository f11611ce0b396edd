"""The folder of a run: whose it is, and what is logged. Imports no torch, so that a wrong folder is said at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparse_llm_ft.config import RunConfig, dump_config
from sparse_llm_ft.errors import ConfigError, UserError
from sparse_llm_ft.folders import write_file

CONFIG, PLAN, METRICS, SUMMARY = "config.yaml", "plan.json", "metrics.jsonl", "summary.json"
LOCK = ".lock"

# Settings that change how a run is carried out, not what it computes: a resumed run may differ in them.
_FREE = {
    "resume",
    "report",
    "output_dir",
    "training.micro_batch_size",
    "training.save_every",
    "training.eval_every",
    "training.log_every",
    "training.keep_checkpoints",
    "training.max_skipped_updates",
    "evaluation.micro_batch_size",
    "model.gradient_checkpointing",
    "model.attn_implementation",
    "method.cache_dir",
    "method.micro_batch_size",
}


class RunFolder:
    """Paths and files of one run. Only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"  # in place of an adapter, after full fine-tuning
        self.phases = self.path / "phases"
        self.report = self.path / "report"

    def check(self, config: RunConfig) -> None:
        """Refuse a folder that this run must not write into. Changes nothing.

        Raises:
            ConfigError: the folder holds another run, or any run under ``resume: never``, or files of no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError("output_dir", f"{str(self.path)!r} is a file", "expected a folder, or none yet")
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError("output_dir", f"{str(existing)!r} cannot be written", "choose a folder that can")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not (self.path / CONFIG).is_file():
            if all(entry.name == LOCK or entry.name.startswith(".tmp-") for entry in self.path.iterdir()):
                return  # a first start that was killed before it had written its config
            raise ConfigError("output_dir", f"{str(self.path)!r} holds files but no run", "choose an empty folder")
        if config.resume == "never":
            raise ConfigError(
                "output_dir",
                f"{str(self.path)!r} holds a run and resume is never",
                "choose another folder, or resume=auto",
            )
        try:
            old = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            old = None
        if not isinstance(old, Mapping):
            raise ConfigError("output_dir", f"{str(self.path / CONFIG)!r} is not readable", "choose another folder")
        mine, theirs = _fixed(config.model_dump(mode="json")), _fixed(old)
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ConfigError(
                    "output_dir",
                    f"{str(self.path)!r} holds another run ({key}: {theirs.get(key)!r} there, {mine.get(key)!r} here)",
                    "choose another folder",
                )

    @staticmethod
    def identity(config: RunConfig) -> str:
        """The same for two configs if and only if a run with the one may go on from a checkpoint of the other."""
        return hashlib.sha256(json.dumps(_fixed(config.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()

    def lock(self) -> None:
        """Hold the folder until this process ends, however it ends; the lock is the kernel's, on ``.lock``.

        Raises:
            ConfigError: another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise ConfigError(
                "output_dir", f"{str(self.path)!r} cannot be written ({error.strerror})", "choose a folder that can"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "output_dir",
                f"{str(self.path)!r} is in use by another process",
                "wait for it, or choose another folder",
            ) from None

    def begin(self, config: RunConfig, step: int) -> None:
        """Write the resolved config and drop logged lines of steps after `step`: they will be done again."""
        write_file(self.path / CONFIG, dump_config(config))  # first: it is what makes the folder a run's
        self.checkpoints.mkdir(exist_ok=True)
        for left_over in (*self.checkpoints.glob(".tmp-*"), *self.checkpoints.glob(".old-*")):
            shutil.rmtree(left_over)  # of a process that was killed while writing
        kept = [line for line in self._metric_lines() if line["step"] <= step]
        write_file(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Replace one JSON file of the run."""
        write_file(self.path / name, json.dumps(data, indent=2) + "\n")

    def is_complete(self) -> bool:
        """Whether the run is over and its adapter, or model, is there."""
        return (self.path / SUMMARY).is_file() and (self.adapter.is_dir() or self.model.is_dir())

    def has_checkpoints(self) -> bool:
        """Whether a run in this folder would be resumed."""
        return any(self.checkpoints.glob("step-*"))

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
            UserError: there is none.
        """
        path = self.path / SUMMARY
        if not path.is_file():
            raise UserError(f"{self.path}: no {SUMMARY}; the run is not there or not finished")
        return json.loads(path.read_text(encoding="utf-8"))

    def _metric_lines(self) -> Iterator[dict[str, Any]]:
        path = self.path / METRICS
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed while writing it
            yield record


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run may not differ in, by their dotted names."""
    return {
        key: value
        for key, value in _leaves(config)
        if ".".join(part for part in key.split(".") if not part.isdigit()) not in _FREE
        and not key.startswith("deepspeed.")
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):  # a list of methods
                yield from _leaves(item, f"{prefix}{key}.{i}.")
        else:
            yield prefix + key, value
