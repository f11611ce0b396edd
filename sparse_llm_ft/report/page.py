"""The report: one self-contained HTML file, and its figures as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.atomic import MANIFEST, write_folder
from sparse_llm_ft.report.data import RunReport
from sparse_llm_ft.report.tables import comparison_table, metrics_table, phases_table, summary_table
from sparse_llm_ft.report.theme import page_css

if TYPE_CHECKING:
    from sparse_llm_ft.report.figures import Picture

INDEX = "index.html"
_RELOAD = '<meta http-equiv="refresh" content="'


def write_report(folders: Sequence[str | Path], output: Path, reload: int | None = None) -> list[Path]:
    """Write the report of one run, or of several side by side, into `output`. An older report is replaced whole.

    Args:
        folders: the runs' output_dirs; a run need not be finished.
        output: the report's folder.
        reload: seconds after which the page reloads itself; None: it does not.

    Returns:
        The files written, the page (``index.html``) first.

    Raises:
        UserError: a folder that holds no run, the same run twice, or an `output` that cannot be written or holds
            files of something other than a report.
    """
    _check_output(output)
    reports = _named([RunReport.read(folder) for folder in folders])
    from sparse_llm_ft.report.figures import comparison_picture, run_pictures  # loads matplotlib

    files: dict[str, bytes] = {INDEX: b""}
    if len(reports) == 1:
        [(name, report)] = reports
        title = f"{report.method} on {report.task}"
        pictures = run_pictures(report)
        files |= _picture_files(pictures)
        page = _page(f"{title} – {name}", title, _run(name, report, pictures, "h2"), reload)
    else:
        overlaid = comparison_picture(reports)
        body = comparison_table(reports)
        if overlaid:
            files |= _picture_files([overlaid])
            body += _figure(overlaid, "h2")
        for i, (name, report) in enumerate(reports, 1):
            pictures = run_pictures(report)
            files |= _picture_files(pictures, f"run-{i}-")
            section = _run(name, report, pictures, "h3")
            body += f'<section id="run-{i}">\n<h2>{escape(name)}</h2>\n{section}</section>\n'
        title = f"{len(reports)} runs compared"
        page = _page(title, title, body, reload)
    files[INDEX] = page.encode()
    _write(output, files)
    return [output / name for name in files]


def is_live(output: Path) -> bool:
    """Whether the report in the folder `output` has a page that reloads itself: its run was training."""
    index = output / INDEX
    return index.is_file() and _RELOAD in index.read_text(encoding="utf-8", errors="replace")[:1000]


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
    """Each run with a name: the shortest ending of its path that no other run has."""
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


def _picture_files(pictures: Sequence[Picture], prefix: str = "") -> dict[str, bytes]:
    files = {}
    for picture in pictures:
        files[f"{prefix}{picture.key}.png"] = picture.light
        files[f"{prefix}{picture.key}-dark.png"] = picture.dark
    return files


def _run(name: str, report: RunReport, pictures: Sequence[Picture], heading: str) -> str:
    """A line about the run, its tables, and its pictures under headings of level `heading`."""
    state = ""
    if not report.finished:
        last = report.steps[-1]["step"] if report.steps else "none yet"
        state = f" The run is not finished; last logged step: {last}."
    return (
        f"<p>{escape(report.method)}, {escape(report.model)}, run {escape(name)}.{state}</p>\n"
        f'<div class="tables">\n{summary_table(report)}{metrics_table(report)}{phases_table(report)}</div>\n'
        + "".join(_figure(picture, heading) for picture in pictures)
    )


def _figure(picture: Picture, heading: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.light, picture.dark))
    size = picture.light[16:24]  # in pixels, in a PNG file's first chunk
    width, height = int.from_bytes(size[:4]), int.from_bytes(size[4:])
    return (
        f"<figure>\n<{heading}>{escape(picture.title)}</{heading}>\n<figcaption>{escape(picture.caption)}</figcaption>\n"
        f'<div class="picture" tabindex="0" role="group" aria-label="{escape(picture.title)}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.alt)}" width="{width}" height="{height}">'
        "</picture></div>\n</figure>\n"
    )


def _page(title: str, heading: str, body: str, reload: int | None) -> str:
    reloading = "" if reload is None else f'{_RELOAD}{reload}">\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{reloading}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{page_css()}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(heading)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )
