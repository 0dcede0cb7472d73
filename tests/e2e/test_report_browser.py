"""The report in headless Chromium: it renders, prints, and asks nobody for anything."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.pipeline.build import BuildResult

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def browse(page: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}",
        "--enable-logging=stderr", "--v=0", *arguments, page.resolve().as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.fixture(scope="session")
def page(demo_build: BuildResult) -> Path:
    return demo_build.bundle / "reports" / "report.html"


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_it_fills_the_window_and_no_more(page: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "report.png"
    done = browse(page, tmp_path / "home", f"--window-size={width},2400", f"--screenshot={picture}")
    assert "CONSOLE" not in done.stderr, "the page's policy refused something, or a script failed"
    with Image.open(picture) as image:
        assert image.size == (width, 2400)
        gray = np.asarray(image.convert("L"), np.int16)
    # Something is drawn in each fifth of the window: neither empty nor one endless line.
    for part in np.array_split(gray, 5):
        assert part.std() > 5


def test_its_sections_come_in_order(page: Path, tmp_path: Path) -> None:
    dom = browse(page, tmp_path / "home", "--dump-dom").stdout
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", dom)
    assert titles[:3] == ["Verdict", "Summary", "What changed clinically"]
    assert "For the person who signs" in titles[-1]
    assert not re.search(r'(?:src|href)="(?!data:|#)', dom), "nothing may be loaded or left"
    # Everything that scrolls sideways can be reached by keyboard.
    assert dom.count('class="scroll"') == dom.count('class="scroll" tabindex="0"') > 0
    pictures = re.findall(r"<img [^>]*>|<svg [^>]*>", dom)
    assert pictures and all("alt=" in p or "aria-label=" in p for p in pictures)


def test_it_prints(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(page, tmp_path / "home", f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    data = paper.read_bytes()
    assert data.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 1 <= pages < 40
