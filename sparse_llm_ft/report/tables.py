"""The report's tables as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sparse_llm_ft.config.registry import find_settings, method_names
from sparse_llm_ft.report.data import PhaseTotals, RunReport

NONE = "–"
_SAME_RUN = ("output_dir", "resume")
"""Settings that say where a run is, not what it is."""

_PHASE_ROWS = {
    "optimizer steps": "steps",
    "samples": "samples",
    "adapters": "adapters",
    "trainable parameters": "trainable_parameters",
    "optimizer bytes per rank": "optimizer_bytes",
    "micro-batch": "micro_batch_size",
    "global batch": "global_batch_size",
    "tokens/s": "tokens_per_second",
    "seconds": "seconds",
}


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], first_column: Sequence[str] = ()) -> str:
    """One HTML table in a box that scrolls by itself. Texts are escaped here, but for `first_column`.

    Args:
        header: of the columns; none where the rows' headings say all.
        rows: each begins with its heading.
        first_column: HTML for the rows' headings instead.
    """
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    head = f"<thead><tr>{cells}</tr></thead>\n" if header else ""
    body = ""
    for i, (heading, *values) in enumerate(rows):
        heading = first_column[i] if first_column else escape(heading)
        body += (
            f'<tr><th scope="row">{heading}</th>' + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>\n"
        )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n{head}<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def summary_table(report: RunReport) -> str:
    """What was run, what came of it and what it took."""
    totals = report.totals
    seconds = total_seconds(report)
    rows = [
        ("method", report.method),
        ("model", report.model),
        ("task", report.task),
        ("state", "finished" if report.finished else "not finished"),
        ("processes", number(report.world_size)),
        ("trainable parameters", number(totals[-1].trainable_parameters if totals else None)),
        ("trainable parameters, peak", number(_most(totals, "trainable_parameters"))),
        ("optimizer bytes per rank, peak", number(_most(totals, "optimizer_bytes"))),
        ("tokens/s, peak", number(_most(totals, "tokens_per_second"))),
        ("seconds in optimizer steps", number(seconds)),
    ]
    return table("Summary", (), rows)


def metrics_table(report: RunReport) -> str:
    """Metrics before and after training; nothing where none were measured."""
    names = list(dict.fromkeys([*report.before, *report.after]))
    rows = [(name, number(report.before.get(name)), number(report.after.get(name))) for name in names]
    return table("Metrics", ("metric", "before", "after"), rows) if rows else ""


def phases_table(report: RunReport) -> str:
    """A column for each phase; nothing before the first step."""
    if not report.totals:
        return ""
    header = ("phase", *(total.name for total in report.totals))
    rows = [(label, *(number(getattr(t, key)) for t in report.totals)) for label, key in _PHASE_ROWS.items()]
    return table("Phases", header, rows)


def comparison_table(reports: Sequence[tuple[str, RunReport]], anchors: Sequence[str]) -> str:
    """A row for each run: the settings in which the runs differ, metrics and costs.

    Args:
        anchors: ids of the runs' sections.
    """
    settings = differing_settings([report for _, report in reports])
    metrics = list(dict.fromkeys(name for _, report in reports for name in report.after))
    costs = ("trainable parameters", "optimizer bytes per rank", "tokens/s", "seconds")
    labels = [key.removeprefix("method.").replace(".", " ") for key in settings]  # spaces let a long heading wrap
    header = ("run", "method", *labels, *(f"{name} after" for name in metrics), *costs)
    rows = []
    for name, report in reports:
        last = report.totals[-1] if report.totals else None
        rows.append(
            (
                name,
                report.method,
                *(setting(report.settings.get(key)) for key in settings),
                *(number(report.after.get(metric)) for metric in metrics),
                number(last.trainable_parameters if last else None),
                number(last.optimizer_bytes if last else None),
                number(last.tokens_per_second if last else None),
                number(total_seconds(report)),
            )
        )
    links = [f'<a href="#{anchor}">{escape(name)}</a>' for (name, _), anchor in zip(reports, anchors, strict=True)]
    return table("Runs (parameters, optimizer and throughput are those of the last phase)", header, rows, links)


def differing_settings(reports: Sequence[RunReport]) -> list[str]:
    """Names of settings that do not have one value in all runs.

    A method's settings count only where a run sets them to something else than their default: a run of another
    method does not have them at all.
    """
    names = dict.fromkeys(name for report in reports for name in report.settings)
    found = []
    for name in names:
        values = [report.settings.get(name) for report in reports]
        plain = name in _SAME_RUN or all(value in (None, _method_default(name)) for value in values)
        if not plain and any(value != values[0] for value in values):
            found.append(name)
    return found


def _method_default(setting: str) -> Any:
    """Of ``method.<method>.<setting>``; None for every other setting."""
    section, _, rest = setting.partition(".")
    method, _, name = rest.partition(".")
    known = find_settings(method) if section == "method" and method in method_names() else None
    return known.model_fields[name].get_default() if known and name in known.model_fields else None


def total_seconds(report: RunReport) -> float | None:
    """Over all phases, where they are known."""
    known = [total.seconds for total in report.totals if total.seconds is not None]
    return sum(known) if known else None


def number(value: float | None) -> str:
    """For a cell: whole numbers with separators, others with four digits."""
    if value is None:
        return NONE
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def setting(value: Any) -> str:
    """A setting's value as one cell."""
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _most(totals: Sequence[PhaseTotals], key: str) -> float | None:
    known = [getattr(total, key) for total in totals if getattr(total, key) is not None]
    return max(known) if known else None
