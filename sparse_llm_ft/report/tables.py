"""The report's tables as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sparse_llm_ft.config.registry import find_settings, method_names
from sparse_llm_ft.errors import shortened
from sparse_llm_ft.report.data import MFU, PHASE_NUMBERS, RunReport

NONE = "–"
_LONGEST = 200
"""Characters of a setting; some hold a template or a table."""
_SAME_RUN = ("output_dir", "resume")
"""Settings that do not tell runs apart."""


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], links: Sequence[str] = ()) -> str:
    """One HTML table in a box that scrolls; all texts are escaped here.

    Args:
        header: the columns' headings; may be empty.
        rows: each begins with its heading.
        links: the target of each row's heading.
    """
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    head = f"<thead><tr>{cells}</tr></thead>\n" if header else ""
    body = ""
    for i, (heading, *values) in enumerate(rows):
        text = f'<a href="{escape(links[i])}">{escape(heading)}</a>' if links else escape(heading)
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        body += f'<tr><th scope="row">{text}</th>{cells}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n{head}<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def summary_table(report: RunReport) -> str:
    """What was run, and what it cost."""
    rows = [
        ("method", report.method),
        ("model", report.model),
        ("task", report.task),
        ("state", "finished" if report.finished else "not finished"),
        ("processes", _number(report.world_size)),
        ("trainable parameters", _last(report, "trainable_parameters")),
        ("trainable parameters, peak", _number(max(_known(report, "trainable_parameters"), default=None))),
        ("optimizer bytes per rank, peak", _number(max(_known(report, "optimizer_bytes_per_rank"), default=None))),
        ("tokens/s, peak", _number(max(_known(report, "tokens_per_second"), default=None))),
        ("seconds in optimizer steps", _seconds(report)),
    ]
    return table("Summary", (), rows)


def metrics_table(report: RunReport) -> str:
    """Metrics before and after training; empty if none were measured."""
    names = list(dict.fromkeys([*report.before, *report.after]))
    rows = [(name, _number(report.before.get(name)), _number(report.after.get(name))) for name in names]
    return table("Metrics", ("metric", "before", "after"), rows) if rows else ""


def phases_table(report: RunReport) -> str:
    """A column for each phase; empty before the first step."""
    if not report.totals:
        return ""
    header = ("phase", *(total["name"] for total in report.totals))
    rows = [(label, *(_number(total.get(key)) for total in report.totals)) for key, label in PHASE_NUMBERS.items()]
    if any(total.get("mfu") is not None for total in report.totals):
        rows.append((MFU, *(_number(total.get("mfu")) for total in report.totals)))
    return table("Phases", header, rows)


def comparison_table(reports: Sequence[tuple[str, RunReport]]) -> str:
    """A row for each run, given with its name: the settings in which the runs differ, metrics and costs.

    The row of run number i, from 1, links to the element ``run-<i>``.
    """
    settings = differing_settings([report for _, report in reports])
    metrics = list(dict.fromkeys(name for _, report in reports for name in report.after))
    costs = ("trainable_parameters", "optimizer_bytes_per_rank", "tokens_per_second")
    labels = [key.removeprefix("method.").replace(".", " ") for key in settings]  # spaces let a long heading wrap
    after, last = [f"{name} after" for name in metrics], [PHASE_NUMBERS[cost] for cost in costs]
    header = ("run", "method", *labels, *after, *last, "seconds")
    rows = [
        (
            name,
            report.method,
            *(_setting(report.settings.get(key)) for key in settings),
            *(_number(report.after.get(metric)) for metric in metrics),
            *(_last(report, cost) for cost in costs),
            _seconds(report),
        )
        for name, report in reports
    ]
    links = [f"#run-{i}" for i in range(1, len(reports) + 1)]
    return table("Runs (parameters, optimizer and throughput are those of the last phase)", header, rows, links)


def differing_settings(reports: Sequence[RunReport]) -> list[str]:
    """Names of settings that differ between runs.

    A method's setting counts only if a run changes its default, because runs of other methods do not have it.
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
    """The default of ``method.<method>.<setting>``; None for every other setting."""
    section, _, rest = setting.partition(".")
    method, _, name = rest.partition(".")
    known = find_settings(method) if section == "method" and method in method_names() else None
    return known.model_fields[name].get_default() if known and name in known.model_fields else None


def _known(report: RunReport, key: str) -> list[float]:
    """The value of each phase that has one."""
    return [total[key] for total in report.totals if key in total]


def _last(report: RunReport, key: str) -> str:
    """The last phase's value."""
    return _number(report.totals[-1].get(key) if report.totals else None)


def _seconds(report: RunReport) -> str:
    """Seconds of all phases whose number is known."""
    return _number(sum(_known(report, "seconds")) if _known(report, "seconds") else None)


def _number(value: float | None) -> str:
    """A cell: whole numbers with separators, others with four digits."""
    if value is None:
        return NONE
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _setting(value: Any) -> str:
    if value is None:
        return NONE
    return shortened(", ".join(map(str, value)) if isinstance(value, list) else str(value), _LONGEST)
