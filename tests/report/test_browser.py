"""The page in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from helpers.run_folders import lora_drop_run, weight_lora_plus_run
from sparse_llm_ft.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")

# Chromium's smallest window is 500 wide, so the page is put into a frame as wide as the device.
PROBE = """<!DOCTYPE html><meta charset="utf-8">
<iframe src="report/index.html" style="width:{width}px;height:2000px;border:0">
</iframe><pre id="found"></pre><script>
onload = () => {{
  const page = document.querySelector('iframe').contentDocument;
  const images = [...page.images];
  document.getElementById('found').textContent = JSON.stringify({{
    loaded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    images: images.length,
    dark: images.filter(image => image.currentSrc !== image.src).length,
    overflow: page.documentElement.scrollWidth - {width},
    headings: page.querySelectorAll('h2').length,
    narrow: images.filter(image => image.clientWidth < 700).length,
  }});
}};
</script>"""
SCHEMES = {"light": 1, "dark": 0}
"""Chromium's numbers of preferred colour schemes."""


def browse(profile: Path, page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--user-data-dir={profile}", "--allow-file-access-from-files", "--virtual-time-budget=5000"]
    return subprocess.run([*command, page.as_uri()], check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of two runs in ``report/``."""
    folder = tmp_path_factory.mktemp("site")
    runs = [weight_lora_plus_run(folder / "weight-lora", layers=32), lora_drop_run(folder / "lora-drop", layers=4)]
    write_report(runs, folder / "report")
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 1280])
def test_pictures_load_and_nothing_overflows(site: Path, tmp_path: Path, width: int, scheme: str) -> None:
    probe = site / f"probe-{width}-{scheme}.html"
    probe.write_text(PROBE.format(width=width), encoding="utf-8")
    option = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    dom = browse(tmp_path / "profile", probe, "--dump-dom", f"--window-size={max(width, 500)},2000", option)
    found = re.search(r'<pre id="found">(\{.*\})</pre>', dom)
    assert found is not None, dom[-500:]
    count = len(list((site / "report").glob("*-dark.png")))
    expected = {
        "loaded": count,
        "images": count,
        "dark": count if scheme == "dark" else 0,
        "overflow": 0,
        "headings": 3,
    }
    expected["narrow"] = 0  # on a phone a picture scrolls in its box and stays readable
    assert found[1] == str(expected).replace("'", '"').replace(" ", "")


def test_the_page_follows_the_scheme(site: Path, tmp_path: Path) -> None:
    corners = {}
    for scheme, number in SCHEMES.items():
        shot = tmp_path / f"{scheme}.png"
        option = f"--blink-settings=preferredColorScheme={number}"
        page = site / "report" / "index.html"
        browse(tmp_path / "profile", page, f"--screenshot={shot}", "--window-size=1280,1600", option)
        image = imread(shot)
        assert image.shape[:2] == (1600, 1280) and image[..., :3].std() > 0.02  # something is drawn
        corners[scheme] = image[0, 0, :3].mean()
    assert corners["light"] > 0.9 and corners["dark"] < 0.1
