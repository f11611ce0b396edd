"""Write the quickstart data set: short dialogues, each with a summary of one sentence.

A row is drawn by filling one scenario of ``scenarios.yaml`` with names, days, places and things. Which split
a row belongs to follows from its summary alone (a checksum), so that splits share neither facts, summaries
nor dialogues, whatever the seed. Reruns with one seed write identical bytes.

    python configs/quickstart/make_data.py
"""

import argparse
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SPLIT_SIZES = {"train": 2000, "validation": 100, "test": 100}
# Of every 20 checksums, these belong to each split. Only pretrain.py draws from "pretraining".
SPLIT_BUCKETS = {
    "pretraining": range(10),
    "train": range(10, 18),
    "validation": range(18, 19),
    "test": range(19, 20),
}
MAX_TURNS = 8


@dataclass(frozen=True)
class Texts:
    """What ``scenarios.yaml`` holds; the keys are described at its top."""

    pools: dict[str, list[str]]
    openings: list[list[str]]
    closings: list[list[str]]
    scenarios: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One filled scenario: ``facts`` maps each slot, and the speakers ``a`` and ``b``, to its words."""

    scenario: str
    facts: dict[str, str]
    dialogue: str
    summary: str


def load_texts(path: Path = HERE / "scenarios.yaml") -> Texts:
    """Read the word pools and scenarios."""
    return Texts(**yaml.safe_load(path.read_text(encoding="utf-8")))


def draw_facts(texts: Texts, scenario: str, generator: random.Random) -> dict[str, str]:
    """Fill the slots of a scenario; slots of one pool get different words."""
    pool_of_slot = {"a": "name", "b": "name", **texts.scenarios[scenario]["slots"]}
    facts: dict[str, str] = {}
    for slot, pool in pool_of_slot.items():
        taken = {facts[other] for other in facts if pool_of_slot[other] == pool}
        facts[slot] = generator.choice([word for word in texts.pools[pool] if word not in taken])
    return facts


def draw_dialogue(texts: Texts, scenario: str, facts: dict[str, str], generator: random.Random) -> str:
    """Write the turns of a dialogue, one line each, as ``Name: words``."""
    middle = [generator.choice(alternatives) for alternatives in texts.scenarios[scenario]["turns"]]
    opening = [turn.split(": ", 1) for turn in generator.choice(texts.openings)]
    closing = generator.choice(texts.closings)
    if len(opening) + len(middle) + len(closing) > MAX_TURNS:
        closing = []
    turns = [(speaker, words) for speaker, words in opening]
    turns += [("ab"[position % 2], words) for position, words in enumerate(middle + closing)]
    lines = []
    for speaker, words in turns:
        # Only closings name {partner}: who speaks them depends on the number of turns before.
        partner = facts["b" if speaker == "a" else "a"]
        lines.append(f"{facts[speaker]}: {words.format(partner=partner, **facts)}")
    return "\n".join(lines)


def draw_sample(texts: Texts, generator: random.Random) -> Sample:
    """Draw a scenario, its facts, its dialogue and its summary."""
    scenario = generator.choice(sorted(texts.scenarios))
    facts = draw_facts(texts, scenario, generator)
    dialogue = draw_dialogue(texts, scenario, facts, generator)
    summary = generator.choice(texts.scenarios[scenario]["summaries"]).format(**facts)
    return Sample(scenario, facts, dialogue, summary)


def split_of(summary: str) -> str:
    """Name the only split that may hold a row with this summary."""
    bucket = zlib.crc32(summary.encode()) % 20
    return next(split for split, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def draw_split(texts: Texts, split: str, seed: int) -> Iterator[Sample]:
    """Draw samples of one split without end, no dialogue and no summary twice."""
    generator = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while True:
        sample = draw_sample(texts, generator)
        if split_of(sample.summary) == split and not seen & {sample.dialogue, sample.summary}:
            seen |= {sample.dialogue, sample.summary}
            yield sample


def check_disjoint(rows: dict[str, list[dict[str, str]]]) -> None:
    """Raise ValueError if a dialogue or a summary occurs twice, in one split or in two."""
    for column in ("dialogue", "summary"):
        values = [row[column] for split_rows in rows.values() for row in split_rows]
        repeated = len(values) - len(set(values))
        if repeated:
            raise ValueError(f"column {column!r}: {repeated} values repeat, but each may occur only once")


def make_rows(texts: Texts, seed: int) -> dict[str, list[dict[str, str]]]:
    """Draw the rows of every split, with columns ``id``, ``dialogue`` and ``summary``."""
    rows: dict[str, list[dict[str, str]]] = {}
    for split, size in SPLIT_SIZES.items():
        samples = draw_split(texts, split, seed)
        rows[split] = []
        for number in range(size):
            sample = next(samples)
            row = {"id": f"{split}-{number:04d}", "dialogue": sample.dialogue, "summary": sample.summary}
            rows[split].append(row)
    check_disjoint(rows)
    return rows


def main() -> None:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``."""
    parser = argparse.ArgumentParser(description="Write the quickstart dialogues and summaries.")
    parser.add_argument("--output", type=Path, default=HERE / "data", help="folder for the JSON lines files")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, rows in make_rows(load_texts(), arguments.seed).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.output / f"{split}.jsonl").write_bytes(lines.encode("utf-8"))
        print(f"{split}: {len(rows)} rows, {len(lines)} bytes")


if __name__ == "__main__":
    main()
