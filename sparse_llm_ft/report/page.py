"""The report: one HTML file that needs nothing beside it, and its figures as PNG files."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.atomic import MANIFEST, write_folder
from sparse_llm_ft.report.data import RunReport
from sparse_llm_ft.report.tables import comparison_table, metrics_table, phases_table, summary_table

if TYPE_CHECKING:
    from sparse_llm_ft.report.figures import Picture

INDEX = "index.html"

_CSS = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #ffffff; --ink: #1f2328; --muted: #57606a;
  --line: #d8dde3; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ground: #0c0f13; --card: #14181d; --ink: #e6e9ed;
  --muted: #a3adb8; --line: #2c333b; --link: #7cc0f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; }
figure h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
p { margin: 0 0 1rem; color: var(--muted); overflow-wrap: anywhere; }
a { color: var(--link); }
figure, .scroll { margin: 0 0 1.25rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figcaption { color: var(--muted); margin: 0 0 .75rem; max-width: 60rem; }
.scroll, .picture { overflow-x: auto; }
.picture img { display: block; width: 100%; min-width: 44rem; height: auto; }
.tables { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: flex-start; }
.tables .scroll { max-width: 100%; flex: 1 1 auto; }
.tables table { width: 100%; max-width: 42rem; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; white-space: nowrap; }
th, td { padding: .3rem .75rem .3rem 0; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; }
th:first-child { text-align: left; font-weight: 500; }
td { max-width: 24rem; overflow-wrap: break-word; }
"""


def write_report(folders: Sequence[str | Path], output: Path) -> list[Path]:
    """Make `output` hold the report of one run, or of several side by side; an older report is replaced whole.

    Args:
        folders: the runs' output_dirs; a run need not be finished.
        output: the report's folder.

    Returns:
        The files written, the page (``index.html``) first.

    Raises:
        UserError: a folder that holds no run, the same run twice, or an `output` that cannot be written or holds
            anything but a report.
    """
    _check_output(output)
    reports = _named([RunReport.read(folder) for folder in folders])
    from sparse_llm_ft.report.figures import comparison_picture, run_pictures  # loads matplotlib

    several = len(reports) > 1
    files: dict[str, bytes] = {}
    sections = []
    for i, (name, report) in enumerate(reports, 1):
        pictures = run_pictures(report)
        files.update(_picture_files(pictures, f"run-{i}-" if several else ""))
        sections.append(
            _run_section(name, report, pictures, f"run-{i}") if several else _run_body(report, pictures, "h2")
        )
    if several:
        overlaid = comparison_picture(reports)
        files.update(_picture_files([overlaid] if overlaid else [], ""))
        page = _comparison_page(reports, overlaid, sections)
    else:
        page = _run_page(*reports[0], sections[0])
    files = {INDEX: page.encode(), **files}
    _write(output, files)
    return [output / name for name in files]


def _check_output(output: Path) -> None:
    """Refuse to replace a folder that is no report."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; expected a folder for the report")
    if output.is_dir() and any(output.iterdir()) and not all((output / name).is_file() for name in (INDEX, MANIFEST)):
        raise UserError(f"{output}: holds files but no report; choose an empty folder")


def _write(output: Path, files: dict[str, bytes]) -> None:
    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    try:
        write_folder(output, fill)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error


def _named(reports: Sequence[RunReport]) -> list[tuple[str, RunReport]]:
    """Every run with as many trailing parts of its path as tell it from the others."""
    if not reports:
        raise UserError("no run given; expected one or more output_dirs")
    paths = [report.folder.resolve() for report in reports]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: given more than once")
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return list(zip(names, reports, strict=True))


def _picture_files(pictures: Sequence[Picture], prefix: str) -> Iterator[tuple[str, bytes]]:
    for picture in pictures:
        yield f"{prefix}{picture.key}.png", picture.light
        yield f"{prefix}{picture.key}-dark.png", picture.dark


def _run_page(name: str, report: RunReport, body: str) -> str:
    title = f"{report.method} on {report.task}"
    return _page(f"{title} – {name}", f"<h1>{escape(title)}</h1>\n{_subtitle(name, report)}{body}")


def _comparison_page(reports: Sequence[tuple[str, RunReport]], overlaid: Picture | None, sections: list[str]) -> str:
    anchors = [f"run-{i}" for i in range(1, len(reports) + 1)]
    title = f"{len(reports)} runs compared"
    table = comparison_table(reports, anchors)
    return _page(title, f"<h1>{title}</h1>\n{table}{_figure(overlaid, 'h2') if overlaid else ''}{''.join(sections)}")


def _run_section(name: str, report: RunReport, pictures: Sequence[Picture], anchor: str) -> str:
    body = _run_body(report, pictures, "h3")
    return f'<section id="{anchor}">\n<h2>{escape(name)}</h2>\n{_subtitle(name, report)}{body}</section>\n'


def _subtitle(name: str, report: RunReport) -> str:
    state = "" if report.finished else f" The run is not finished; last logged step: {_last_step(report)}."
    return f"<p>{escape(report.method)}, {escape(report.model)}, run {escape(name)}.{state}</p>\n"


def _last_step(report: RunReport) -> str:
    return str(report.steps[-1].step) if report.steps else "none yet"


def _run_body(report: RunReport, pictures: Sequence[Picture], heading: str) -> str:
    tables = f'<div class="tables">\n{summary_table(report)}{metrics_table(report)}{phases_table(report)}</div>\n'
    return tables + "".join(_figure(picture, heading) for picture in pictures)


def _figure(picture: Picture, heading: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.light, picture.dark))
    width, height = _png_size(picture.light)
    return (
        f"<figure>\n<{heading}>{escape(picture.title)}</{heading}>\n<figcaption>{escape(picture.caption)}</figcaption>\n"
        f'<div class="picture" tabindex="0" role="group" aria-label="{escape(picture.title)}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.alt)}" width="{width}" height="{height}">'
        "</picture></div>\n</figure>\n"
    )


def _png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the file's first chunk."""
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


def _page(title: str, body: str) -> str:
    css = re.sub(r"\s+", " ", _CSS).strip()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
