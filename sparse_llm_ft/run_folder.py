"""`RunFolder`: a run's files, and whose run a folder holds. Imports no torch: a wrong folder is refused at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparse_llm_ft.config import RunConfig, dump_config
from sparse_llm_ft.config.registry import find_settings, method_names
from sparse_llm_ft.config.renamed import replace_old_keys
from sparse_llm_ft.errors import AWAY, ConfigError, TrainingError, UserError, may_pass, reaching
from sparse_llm_ft.io.atomic import remove_folder, write_file
from sparse_llm_ft.io.folder_lock import LOCK_FILE, FolderLock
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json, read_json, read_yaml

CONFIG_FILE, PLAN_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "plan.json", "metrics.jsonl", "summary.json"
FORECAST_FILE = "forecast.json"
"""What the run was expected to need; written at its end, for its report."""
STATE_FILE, JOB_FOLDER = "state.json", "slurm"
"""What a job writes before its run begins: the state, and a folder with the batch script, settings and log."""

# Settings that change how a run is executed, not what it computes. A resumed run may differ in them. A method's own are
# in `MethodSettings.free`.
_FREE = {
    "resume",
    "report",
    "trackers",
    "tracker_project",
    "output_dir",
    "training.micro_batch_size",
    "training.device_memory",
    "training.save_every",
    "training.eval_every",
    "training.log_every",
    "training.keep_checkpoints",
    "training.max_skipped_updates",
    "training.prefix_cache",
    "training.prefix_cache_bytes",
    "training.on_oom",
    "training.compile",
    "evaluation.micro_batch_size",
    "task.date",  # of the first start; the samples' key has it
    "model.gradient_checkpointing",
    "model.lean",
    "model.trust_remote_code",
    "model.attn_implementation",
    "model.stage_to",
}


class RunFolder:
    """A run's paths and files. Only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"  # in place of an adapter, after full fine-tuning
        self.phases = self.path / "phases"
        self.report = self.path / "report"
        self.prefix_cache = self.path / "prefix-cache"  # while the run trains
        self.job = self.path / JOB_FOLDER

    def check(self, config: RunConfig, resolved: bool = False) -> None:
        """Refuse a folder into which this run must not write. Changes nothing.

        Args:
            resolved: whether `config` holds what depends on the base: the quantisation in which it is stored, and
                settings that the user has left open. Before the base is read, these may differ.

        Raises:
            ConfigError: the folder holds another run, any run under ``resume: never``, or other files.
            TrainingError: the file server is away.
        """
        with reaching("output_dir"):
            self._check(config, resolved)

    def _check(self, config: RunConfig, resolved: bool) -> None:
        # The folder must be a folder that can be written.
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError("output_dir", f"{str(self.path)!r} is a file", "expected a folder, or none yet")
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError("output_dir", f"{str(existing)!r} cannot be written", "choose a folder that can")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        link = next((entry for entry in self.path.iterdir() if entry.is_symlink()), None)
        if link is not None:  # files written through it would lie elsewhere
            raise ConfigError(
                "output_dir", f"{str(link)!r} is a link", "expected plain files and folders (output_dir may be a link)"
            )
        # If it is not empty, it must hold a run that this one may resume.
        if not (self.path / CONFIG_FILE).is_file():
            prepared = (STATE_FILE, JOB_FOLDER)
            if all(e.name.startswith((LOCK_FILE, ".tmp-", ".nfs")) or e.name in prepared for e in self.path.iterdir()):
                return  # a first start that was killed before it had written its config, or that a job prepared
            raise ConfigError("output_dir", f"{str(self.path)!r} holds files but no run", "choose an empty folder")
        if config.resume == "never":
            raise ConfigError(
                "output_dir",
                f"{str(self.path)!r} holds a run and resume is never",
                "choose another folder, or resume=auto",
            )
        # Both runs must agree in all settings that change results.
        try:
            old = read_yaml(self.path / CONFIG_FILE)
        except OSError as error:
            if may_pass(error):
                raise TrainingError(f"{error}; {AWAY}") from error
            old = None
        except ParseError:
            old = None
        if not isinstance(old, Mapping):
            raise ConfigError(
                "output_dir", f"{str(self.path / CONFIG_FILE)!r} is not readable", "choose another folder"
            )
        mine, theirs = _fixed(config.model_dump(mode="json")), _fixed(replace_old_keys(old, strict=False))
        undecided = set() if resolved else _undecided(config)
        for key in sorted((mine.keys() | theirs.keys()) - undecided):
            if mine.get(key) != theirs.get(key):
                raise ConfigError(
                    "output_dir",
                    f"{str(self.path)!r} holds another run "
                    f"({key:.60}: {theirs.get(key)!r:.100} there, {mine.get(key)!r:.100} here)",
                    "choose another folder",
                )

    @staticmethod
    def identity(config: RunConfig) -> str:
        """A hash that two configs share if and only if a run with one may resume from a checkpoint of the other."""
        return _hash(config.model_dump(mode="json"))

    def stored_identity(self) -> str:
        """`identity` of the run in this folder, as it was written: settings that have come since do not count.

        The folder's config.yaml must be readable (`config`).
        """
        return _hash(read_yaml(self.path / CONFIG_FILE))

    def lock(self) -> None:
        """Hold the folder until this process ends, in whatever way.

        Raises:
            ConfigError: another process holds it, or it cannot be written.
        """
        self._lock = FolderLock(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except BlockingIOError:
            raise ConfigError(
                "output_dir",
                f"{str(self.path)!r} is in use by another process",
                "wait for it, or choose another folder",
            ) from None
        except OSError as error:
            raise ConfigError(
                "output_dir", f"{str(self.path)!r} cannot be written ({error.strerror})", "choose a folder that can"
            ) from error

    def begin(self, config: RunConfig, step: int) -> None:
        """Write the resolved config, and drop logged lines after `step`, whose steps will be repeated."""
        write_file(self.path / CONFIG_FILE, dump_config(config))  # first: it marks the folder as a run's
        self.checkpoints.mkdir(exist_ok=True)
        for left_over in (*self.checkpoints.glob(".tmp-*"), *self.checkpoints.glob(".old-*")):
            remove_folder(left_over)  # of a process that was killed while writing
        kept = [line for line in self._metric_lines() if line["step"] <= step]
        write_file(self.path / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_json(self, name: str, data: Mapping[str, object]) -> None:
        """Replace one JSON file of the run.

        Raises:
            ValueError: the name leads out of the run's folder.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} leads out of the run's folder")
        write_file(self.path / name, json.dumps(data, indent=2) + "\n")

    def is_complete(self) -> bool:
        """Whether the run has ended and its adapter or model is there."""
        return (self.path / SUMMARY_FILE).is_file() and (self.adapter.is_dir() or self.model.is_dir())

    def has_checkpoints(self) -> bool:
        """Whether a run in this folder would be resumed."""
        return any(self.checkpoints.glob("step-*"))

    def has_config(self) -> bool:
        """Whether a run has begun in this folder."""
        return (self.path / CONFIG_FILE).is_file()

    def config(self) -> RunConfig:
        """The settings that the run began with. Paths in them need not exist.

        Raises:
            UserError: they cannot be read.
        """
        path = self.path / CONFIG_FILE
        try:
            tree = read_yaml(path)
            return RunConfig.model_validate(replace_old_keys(tree, strict=False) if isinstance(tree, Mapping) else tree)
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})") from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(
                f"{path}: not a run's settings ({'.'.join(map(str, problem['loc']))}: {problem['msg']})"
            ) from None
        except ParseError as error:
            raise UserError(f"{path}: not readable ({error})") from None

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
            UserError: there is none that can be read.
        """
        path = self.path / SUMMARY_FILE
        if not path.is_file():
            raise UserError(f"{self.path}: no {SUMMARY_FILE}; the run is not there or not finished")
        try:
            summary = read_json(path, constants=True)
        except (OSError, ParseError) as error:
            raise UserError(f"{path}: not readable ({error})") from None
        if not isinstance(summary, dict):
            raise UserError(f"{path}: not readable (a JSON object is needed)")
        return summary

    def _metric_lines(self) -> Iterator[dict[str, Any]]:
        path = self.path / METRICS_FILE
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = parse_json(line, constants=True)
            except ParseError:
                continue  # the last line of a run that was killed while writing it
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def open_run(path: str) -> RunFolder:
    """The folder of a run at `path`.

    Raises:
        UserError: it is not a run's folder, or holds no checkpoint.
    """
    folder = RunFolder(path)
    if not (folder.path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: no {CONFIG_FILE}; expected a run's output_dir")
    if not folder.has_checkpoints():
        raise UserError(f"{path}: no checkpoint yet")
    return folder


def _fixed(config: Mapping[str, object]) -> dict[str, object]:
    """Dotted name -> value of the settings in which a resumed run must not differ."""
    free = _FREE | _free_of_methods(config.get("method"))
    return {key: value for key, value in _leaves(config) if key not in free and not key.startswith("deepspeed.")}


def _hash(config: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(_fixed(config), sort_keys=True).encode()).hexdigest()


def _undecided(config: RunConfig) -> set[str]:
    """Dotted names of the settings that a run decides when it has read its base."""
    sections = len(config.method) > 1
    keys = {
        f"method.{i}.{key}" if sections else f"method.{key}"
        for i, method in enumerate(config.method)
        for key in method.open_keys
    }
    return keys | ({"model.quantization"} if config.model.quantization == "none" else set())


def _free_of_methods(methods: object) -> set[str]:
    """Dotted names of the settings that the config's methods declare free."""
    sections = {f"method.{i}.": section for i, section in enumerate(methods)} if isinstance(methods, list) else {}
    if isinstance(methods, Mapping):
        sections = {"method.": methods}
    known = {
        prefix: section["name"]
        for prefix, section in sections.items()
        if isinstance(section, Mapping) and section.get("name") in method_names()
    }
    return {prefix + key for prefix, name in known.items() for key in find_settings(name).free}


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of every setting."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):  # a list of methods
                yield from _leaves(item, f"{prefix}{key}.{i}.")
        else:
            yield prefix + key, value
