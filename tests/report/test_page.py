from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest
from matplotlib import rc_context

from helpers.page_parser import Page
from helpers.run_folders import llama_shapes, lora_drop_run, lora_run, partial_run, weight_lora_plus_run, write_run
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan
from sparse_llm_ft.report import RunReport, write_report
from sparse_llm_ft.report.step_figures import compare_losses
from sparse_llm_ft.report.style import figure_settings

COMMON = ["loss", "phases", "plan", "residual-norms"]


def check(written: list[Path]) -> Page:
    """What every report must be: whole, self-contained, accessible, with its pictures as files."""
    index = written[0]
    assert index.name == "index.html" and all(path.is_file() for path in written)
    text = index.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "http://" not in text and "https://" not in text
    page = Page(text)
    assert not page.all("script") and not page.all("link")
    images, sources = page.all("img"), page.all("source")
    assert images and len(images) == len(sources)
    for image, source in zip(images, sources, strict=True):
        assert image["alt"] and source["media"] == "(prefers-color-scheme: dark)"
        assert image["src"] != source["srcset"]
        for data in (image["src"], source["srcset"]):
            head, _, body = data.partition(",")
            png = base64.b64decode(body, validate=True)
            assert head == "data:image/png;base64" and png.startswith(b"\x89PNG\r\n\x1a\n")
            width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
            assert width == int(image["width"]) == 1056 and 150 < height < 3000
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert sorted(p.read_bytes()[:4] for p in written[1:]) == [b"\x89PNG"] * (2 * len(images))
    return page


def keys(written: list[Path]) -> list[str]:
    return [path.stem for path in written[1:] if not path.stem.endswith("-dark")]


def test_weight_lora_plus(tmp_path: Path) -> None:
    written = write_report([weight_lora_plus_run(tmp_path / "run", layers=3)], tmp_path / "run" / "report")
    page = check(written)
    assert sorted(keys(written)) == sorted([*COMMON, "omega", "importance"])
    assert page.headings[0] == "weight_lora_plus on dialogsum" and "Loss" in page.headings
    assert {"rougeL", "31.92", "finished", "select", "train"} <= set(page.cells)


def test_lora_drop(tmp_path: Path) -> None:
    written = write_report([lora_drop_run(tmp_path / "run", layers=3)], tmp_path / "report")
    page = check(written)
    assert sorted(keys(written)) == sorted([*COMMON, "importance"])
    assert any("sharing 7" in image["alt"] for image in page.all("img"))


def test_partial_lora(tmp_path: Path) -> None:
    written = write_report([partial_run(tmp_path / "run", layers=2)], tmp_path / "report")
    check(written)
    assert sorted(keys(written)) == sorted([*COMMON, "kept-fraction", "overlap"])


def test_derived_ratios_of_zero_are_said(tmp_path: Path) -> None:
    page, said = tmp_path / "report" / "index.html", "derived ratios are 0: the model stays within the floor"
    folder = partial_run(tmp_path / "run", layers=2)
    write_report([folder], tmp_path / "report")
    assert said not in page.read_text()
    file = folder / "phases" / "00-head.json"
    phase = json.loads(file.read_text())
    ratios = phase["scores"]["ratios"]
    first, second, *_ = ratios
    phase["scores"]["ratios"] = ratios | {first: [0.0, 0.0], second: [0.0, 0.5]}
    file.write_text(json.dumps(phase))
    write_report([folder], tmp_path / "report")
    assert f"3 of {2 * len(ratios)} {said}" in page.read_text()


def test_an_unfinished_run(tmp_path: Path) -> None:
    folder = weight_lora_plus_run(tmp_path / "run", layers=2, finished=False)
    (folder / "phases" / "01-train.json").unlink()
    written = write_report([folder], tmp_path / "report")
    page = check(written)
    assert "not finished" in page.cells and "last logged step: 180" in written[0].read_text()
    assert sorted(keys(written)) == ["importance", "loss", "omega", "phases", "plan"]


def test_a_run_without_a_step(tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)}, finished=False)
    (folder / "metrics.jsonl").unlink()
    (folder / "phases" / "00-train.json").unlink()
    written = write_report([folder], tmp_path / "report")
    assert [path.name for path in written] == ["index.html"] and "none yet" in written[0].read_text()


def test_layers_without_numbers_and_one_step(tmp_path: Path) -> None:
    shapes = {"embed": (4, 4), "body.query": (4, 4), "body.value": (4, 4), "head": (2, 4)}
    folder = lora_run(tmp_path / "run", shapes)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    written = write_report([folder], tmp_path / "report")
    check(written)
    assert sorted(keys(written)) == ["loss", "plan", "residual-norms"]


def test_full_fine_tuning_has_no_map(tmp_path: Path) -> None:
    plan = AdapterPlan({"a.0.q": None}, trained=(FULL_MODEL,))
    phase = {"name": "train", "plan": plan, "shapes": {}}
    written = write_report([write_run(tmp_path / "run", [{"name": "full"}], [phase], [5])], tmp_path / "report")
    check(written)
    assert keys(written) == ["loss"]


def test_texts_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"&'"
    shapes = {"a.0.<b>": (4, 4)}
    folder = lora_run(tmp_path / "<i>run", shapes, model=evil, task="<b>task")
    written = write_report([folder], tmp_path / "report")
    page = check(written)
    assert evil in page.cells and page.headings[0] == "lora on <b>task"
    assert "<script" not in written[0].read_text()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [
        weight_lora_plus_run(tmp_path / "a" / "run", layers=2),
        weight_lora_plus_run(tmp_path / "b" / "run", layers=3, learning_rate=0.0003),
        lora_drop_run(tmp_path / "c" / "run", layers=2),
    ]
    written = write_report(folders, tmp_path / "report")
    page = check(written)
    text = written[0].read_text()
    assert page.headings[0] == "3 runs compared"
    assert [heading for heading in page.headings if "/" in heading] == ["a/run", "b/run", "c/run"]
    assert {"weight_lora_plus keep", "training learning_rate", "0.0003", "rougeL after"} <= set(page.cells)
    differing = {"method name", "output_dir", "adapter r", "weight_lora_plus cut_every", "lora_drop threshold"}
    assert not differing & set(page.cells)  # the same in all, or a method's default
    targets = [link["href"].removeprefix("#") for link in page.all("a")]
    assert targets == [section["id"] for section in page.all("section")]
    assert "compare-loss" in keys(written) and "run-3-importance" in keys(written)
    assert text.count("<h2") == 4


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """matplotlib would take $...$ for mathematics, and leave a label that begins with _ out of a legend."""
    names = ["$^$", "a$x$b", "_first"]
    reports = [(name, RunReport.read(lora_run(tmp_path / name, {"a.0.$^$": (4, 4)}))) for name in names]
    with rc_context(figure_settings("light")):
        drawing = compare_losses(reports)
        assert drawing is not None
        (legend,) = drawing.figure.legends
        assert [text.get_text().strip() for text in legend.get_texts()] == names
        drawing.figure.savefig(tmp_path / "losses.png")
    check(write_report([tmp_path / name for name in names], tmp_path / "report"))


def test_a_report_is_the_same_each_time_and_replaced_whole(tmp_path: Path) -> None:
    folder, output = partial_run(tmp_path / "run", layers=2), tmp_path / "run" / "report"
    first = {path.name: path.read_bytes() for path in write_report([folder], output)}
    (output / "stale.png").write_bytes(b"")
    second = {path.name: path.read_bytes() for path in write_report([folder], output)}
    assert first == second and not (output / "stale.png").exists()
    assert not list((tmp_path / "run").glob(".*report"))


def test_what_is_no_report_is_not_replaced(tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)})
    with pytest.raises(UserError, match="holds files but no report"):
        write_report([folder], folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_report([folder], tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([folder], tmp_path / "file" / "report")


def test_runs_that_make_no_report(tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)})
    for folders, message in (
        ([], "no run given"),
        ([folder, folder], "given more than once"),
        ([tmp_path], "config.yaml"),
    ):
        with pytest.raises(UserError, match=message):
            write_report(folders, tmp_path / "report")


def test_a_deep_model_is_drawn_within_seconds(tmp_path: Path) -> None:
    folder = weight_lora_plus_run(tmp_path / "run", layers=80, select=50, train=400)
    assert len(llama_shapes(80)) == 560
    started = time.process_time()
    check(write_report([folder], tmp_path / "report"))
    assert time.process_time() - started < 30  # about 3; slow machines are not the point
