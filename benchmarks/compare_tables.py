"""The tables of `compare.py` in Markdown, from its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from compare_cases import CASES, Floors
from compare_job import BARE, KINDS, STOCK, SYSTEMS, TOOLKIT

Row = Mapping[str, Any]
MIB = 2**20


def seconds(row: Row, system: str, part: str | None = None) -> list[float]:
    """Each round's median of the system's steps, or of one part of them; empty where nothing was timed."""
    rounds = row["systems"][system]["rounds"]
    if part is None:
        return [median(answer["step"]) for answer in rounds]
    return [median(parts.get(part, 0.0) for parts in answer["parts"]) for answer in rounds]


def ratio(row: Row, system: str, other: str, part: str | None = None) -> float | None:
    """The median over the rounds of `system`'s seconds to `other`'s; None where nothing was timed."""
    pairs = list(zip(seconds(row, system, part), seconds(row, other, part), strict=True))
    return median(a / b for a, b in pairs) if pairs else None


def bytes_ratio(row: Row, system: str, other: str, what: str) -> float:
    """`system`'s bytes to `other`'s."""
    return row["systems"][system]["bytes"][what] / row["systems"][other]["bytes"][what]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def against_floors(rows: Sequence[Row]) -> str:
    """Each case's three ratios beside their floors; a ratio above its floor is in bold."""

    def cell(found: float | None, floor: float | None) -> str:
        if found is None:
            return "–"
        text = f"{found:.2f}"
        if floor is None:
            return text
        return f"{text if found <= floor else f'**{text}**'} (≤ {floor:.2f})"

    lines = []
    for row in rows:
        floors = CASES[row["case"]].floors or Floors(None, None, None)
        lines.append(
            [
                row["case"],
                cell(ratio(row, TOOLKIT, STOCK), floors.step_to_stock),
                cell(ratio(row, TOOLKIT, BARE), floors.step_to_bare),
                cell(bytes_ratio(row, TOOLKIT, STOCK, "kept"), floors.kept_to_stock),
                cell(bytes_ratio(row, TOOLKIT, STOCK, "peak"), None),
            ]
        )
    return table(
        ["case", "step to stock PEFT", "step to bare base", "kept bytes to stock PEFT", "peak to stock PEFT"], lines
    )


def of_time(rows: Sequence[Row]) -> str:
    """Every system's medians, in milliseconds, and its ratio to stock PEFT."""
    lines = []
    for row in rows:
        for system in SYSTEMS:
            if not (found := seconds(row, system)):
                continue
            tokens = row["data"]["batch"] * row["data"]["length"]
            lines.append(
                [
                    row["case"] if system == SYSTEMS[0] else "",
                    system,
                    f"{1000 * median(found):,.0f}",
                    f"{1000 * median(seconds(row, system, 'forward')):,.0f}",
                    f"{tokens / median(found):,.0f}",
                    f"{ratio(row, system, STOCK):.2f}",
                    f"{ratio(row, system, STOCK, 'forward'):.2f}",
                    f"{ratio(row, system, BARE):.2f}",
                ]
            )
    header = ["case", "system", "step, ms", "forward, ms", "tokens/s", "step to stock", "forward to stock"]
    return table([*header, "step to bare base"], lines)


def of_bytes(rows: Sequence[Row]) -> str:
    """Every system's bytes, in MiB."""

    def mib(size: int) -> str:
        return f"{size / MIB:,.1f}"

    lines = []
    for row in rows:
        for system in SYSTEMS:
            found = row["systems"][system]["bytes"]
            sizes = [mib(found[what]) for what in ("kept", "after_forward", "peak", "gradients", "optimizer")]
            lines.append([row["case"] if system == SYSTEMS[0] else "", system, *sizes])
    header = ["case", "system", "kept for backward", "alive after forward", "peak of a step", "gradients", "optimizer"]
    return table(header, lines)


def of_communication(rows: Sequence[Row]) -> str:
    """Bytes that a rank hands to collectives in a step of two ranks."""
    lines = []
    for row in rows:
        for system, found in row["systems"].items():
            if "communicated" in found:
                sent = found["communicated"]
                kinds = ", ".join(f"{name} {sent['calls'][name]}×" for name in sorted(sent["calls"]))
                total = f"{sum(sent['bytes'].values()):,}"
                lines.append([row["case"] if system == SYSTEMS[0] else "", system, total, kinds])
    return table(["case", "system", "bytes a step and rank", "collectives"], lines) if lines else ""


def of_profiles(rows: Sequence[Row]) -> str:
    """Where the toolkit's steps spend their time, beside the bare base's and stock PEFT's."""
    parts = []
    for row in rows:
        profiles = {name: found["profile"] for name, found in row["systems"].items() if "profile" in found}
        if not profiles:
            continue
        lines = []
        for part in ("data", "forward", "backward", "update", "loop"):
            for kind in KINDS:
                ours, bare, stock = (profiles[name].get(part, {}).get(kind, 0.0) for name in (TOOLKIT, BARE, STOCK))
                if max(ours, bare, stock) >= 0.5:
                    lines.append([part, kind, f"{bare:,.0f}", f"{ours:,.0f}", f"{ours - bare:+,.0f}", f"{stock:,.0f}"])
        sums = [sum(sum(kinds.values()) for kinds in profiles[name].values()) for name in (BARE, TOOLKIT, STOCK)]
        lines.append(["all", "", f"{sums[0]:,.0f}", f"{sums[1]:,.0f}", f"{sums[1] - sums[0]:+,.0f}", f"{sums[2]:,.0f}"])
        header = ["part", "work", "bare base", "toolkit", "toolkit - bare base", "stock PEFT"]
        parts.append(f"{row['case']}, milliseconds under the profiler:\n\n{table(header, lines)}")
    return "\n".join(parts)


def page(results: Mapping[str, Any]) -> str:
    """All tables, by base and data."""
    parts = [
        f"By `{results['command']}`, on {results['machine']}; {results['versions']}. The base: {results['base']}. "
        f"Seconds, where there are some: {results['rounds']} rounds of {results['steps']} steps.\n"
    ]
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault(row["title"], []).append(row)
    makers: list[Callable[[Sequence[Row]], str]] = [against_floors, of_time, of_bytes, of_communication, of_profiles]
    for name, rows in groups.items():
        timed = any(seconds(row, TOOLKIT) for row in rows)
        parts.append(f"### {name}\n")
        parts += [text for make in makers if (timed or make is not of_time) and (text := make(rows))]
    return "\n".join(parts)


BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the file's two markers.

    Raises:
        ValueError: it has not both.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} lacks the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
