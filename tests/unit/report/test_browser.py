"""The report in a real headless browser: nothing is refused or broken, and it fits a phone, in light and dark."""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from bigtrain.report import write_report
from tests.helpers.run_folders import make_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)"),
]
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# A page around the report, which measures it: the report itself may run no script.
MEASURE = """<!doctype html><iframe id=f style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe>
<script>f.onload = () => {{
  const d = f.contentDocument, e = d.documentElement, texts = [...d.querySelectorAll('.plot i')];
  const lines = [...d.querySelectorAll('path.line')].map(p => p.getTotalLength());
  document.title = JSON.stringify({{scroll: e.scrollWidth, client: e.clientWidth, lines: lines.length,
    empty: lines.filter(n => n < 10).length, charts: d.querySelectorAll('.chart').length,
    columns: getComputedStyle(d.querySelector('.charts')).gridTemplateColumns.split(' ').length,
    small: texts.filter(t => parseFloat(getComputedStyle(t).fontSize) < 11).length, texts: texts.length}});
}}</script>"""


def browse(folder: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    refused = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not refused
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "a-run-with-a-name-that-is-rather-long-for-a-phone"))


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1200, 2)])
def test_it_fits_the_width_and_every_curve_is_drawn(tmp_path: Path, page: Path, width: int, columns: int) -> None:
    around = tmp_path / "around.html"
    around.write_text(MEASURE.format(width=width, page=html.escape(page.read_text(), quote=True)))
    dom = browse(tmp_path, "--enable-logging=stderr", "--dump-dom", around.as_uri())
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found, dom[:2000]
    measured = {key: int(value) for key, value in re.findall(r'"(\w+)":(\d+)', html.unescape(found[1]))}
    assert measured["client"] == width
    assert measured["scroll"] == width  # nothing sticks out
    assert measured["columns"] == columns
    assert (measured["charts"], measured["empty"], measured["small"]) == (7, 0, 0)
    assert measured["lines"] >= 10
    assert measured["texts"] >= 7 * 6


def first_pixel(path: Path) -> tuple[int, ...]:
    """The pixel in the upper left corner of a PNG (https://www.w3.org/TR/png): there the filter adds nothing."""
    data, position, packed, samples = path.read_bytes(), 8, b"", 3
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            samples = {2: 3, 6: 4}[body[9]]
        packed += body if kind == b"IDAT" else b""
        position += 12 + length
    return tuple(zlib.decompress(packed)[1 : 1 + samples][:3])


def test_light_and_dark(tmp_path: Path, page: Path) -> None:
    for flags, color in (((), (0xF5, 0xF6, 0xF8)), (("--force-dark-mode",), (0x0F, 0x12, 0x17))):
        shot = tmp_path / "shot.png"
        browse(tmp_path, f"--screenshot={shot}", "--window-size=800,600", *flags, page.as_uri())
        assert first_pixel(shot) == color
