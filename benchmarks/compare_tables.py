"""The tables of `compare.py` in Markdown, from its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from compare_cases import CASES, Floors
from compare_worker import BARE, STOCK, SYSTEMS, TOOLKIT

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
        ["case", "step to stock PEFT", "step to bare base", "kept bytes to stock PEFT", "peak to stock"], lines
    )


def of_time(rows: Sequence[Row]) -> str:
    """Every system's medians, in milliseconds, and its ratio to stock PEFT."""
    lines = []
    for row in rows:
        for system in SYSTEMS:
            if not (found := seconds(row, system)):
                continue
            tokens = row["job"]["batch"] * row["job"]["length"]
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


def page(results: Mapping[str, Any]) -> str:
    """All tables, by base and data."""
    parts = [f"{results['machine']}; {results['versions']}.\n"]
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault(row["data"], []).append(row)
    makers: list[Callable[[Sequence[Row]], str]] = [against_floors, of_time, of_bytes]
    for name, rows in groups.items():
        timed = any(seconds(row, TOOLKIT) for row in rows)
        parts.append(f"### {name}\n")
        parts += [make(rows) for make in makers if timed or make is not of_time]
    return "\n".join(parts)
