"""What two finished runs differ in; nothing, if one was killed and the other was not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = ("tokens_per_second", "seconds", "peak_memory_bytes")
Splits = dict[int, list[int]]
"""Optimizer step -> the sample indices of its global batch, in the order in which they are dealt."""


def differences(whole: Path, resumed: Path) -> list[str]:
    """Every difference between two run folders that is not one of clock or process, and everything left half done."""
    found = [*_differing_files(whole, resumed), *_differing_metrics(whole, resumed)]
    summaries = [_without_times(json.loads((run / "summary.json").read_text())) for run in (whole, resumed)]
    if summaries[0] != summaries[1]:
        found.append(f"summary.json: {summaries[1]} in place of {summaries[0]}")
    left_over = [path for path in resumed.rglob("*") if path.name.startswith((".tmp-", ".old-"))]
    return found + [f"left over: {path.relative_to(resumed)}" for path in left_over]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps, without what depends on clock and process."""
    return [_without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def consumed(traces: Path, attempts: int, world_sizes: list[int]) -> Splits:
    """What each step consumed when it was last done.

    Args:
        traces: folder with ``ATTEMPT-RANK.jsonl``, written by `places.record_samples`.
    """
    samples: Splits = {}
    for attempt in range(attempts):
        ranks = [_trace(traces / f"{attempt}-{rank}.jsonl") for rank in range(world_sizes[attempt])]
        for step in set.intersection(*map(set, ranks)):
            rounds = zip(*(rank[step] for rank in ranks), strict=True)
            samples[step] = [index for shares in rounds for share in shares for index in share]
    return samples


def _trace(file: Path) -> dict[int, list[list[int]]]:
    if not file.is_file():
        return {}
    lines = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # of a process that was killed while it wrote
            continue
    return {line["step"]: line["shares"] for line in lines}


def _differing_files(whole: Path, resumed: Path) -> Iterator[str]:
    newest = max((whole / "checkpoints").glob("step-*"))
    files = [
        *sorted((whole / "adapter").iterdir()),
        *sorted((whole / "phases").iterdir()),
        *sorted(whole.glob("predictions-*")),
        whole / "plan.json",
        newest / "tensors.safetensors",  # values, moments and what a rule keeps
    ]
    for file in files:
        name = file.relative_to(whole)
        if not (resumed / name).is_file():
            yield f"{name} is missing"
        elif (resumed / name).read_bytes() != file.read_bytes():
            yield f"{name} differs"
    kept = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, resumed)]
    if kept[0] != kept[1]:
        yield f"checkpoints: {kept[1]} in place of {kept[0]}"


def _differing_metrics(whole: Path, resumed: Path) -> Iterator[str]:
    expected, got = metrics(whole), metrics(resumed)
    steps = [[line["step"] for line in lines] for lines in (expected, got)]
    if steps[0] != steps[1]:
        yield f"metrics.jsonl: steps {steps[1]} in place of {steps[0]}"
        return
    for one, other in zip(expected, got, strict=True):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                yield f"metrics.jsonl: {key} of step {one['step']} is {other.get(key)} in place of {one.get(key)}"


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list) else value
