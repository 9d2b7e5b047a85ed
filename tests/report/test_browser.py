"""A report looks right in a browser, light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from mixed_sweep import mixed

from cdpo.report.write import report

PROBE = """<script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("figure svg, figure img")].map(e => {
    const box = e.getBoundingClientRect(), text = e.querySelector("text");
    return [box.width, box.height, e.naturalWidth ?? 1, text ? getComputedStyle(text).fill : null] });
  const style = getComputedStyle(document.body), wide = document.documentElement.scrollWidth - innerWidth;
  const probe = JSON.stringify({seen, page: [style.backgroundColor, style.color], wide});
  document.body.replaceChildren(document.querySelector("table"), probe) })</script>"""
THEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}


def chromium(folder: Path, *flags: str) -> str:
    """Standard output of headless Chromium. The test is skipped without it, unless CDPO_REQUIRE_CHROMIUM=1."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        wanted = os.environ.get("CDPO_REQUIRE_CHROMIUM") == "1"
        (pytest.fail if wanted else pytest.skip)("no chromium on PATH: apt-get install chromium")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [found, *quiet, f"--user-data-dir={folder / 'profile'}", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def contrast(one: str, other: str) -> float:
    """Of two colours as rgb(r, g, b), by WCAG 2."""
    light = []
    for color in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("theme", THEMES)
def test_a_browser_shows_it(made, theme, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text((made / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
    dom = chromium(tmp_path, THEMES[theme], "--window-size=500,900", "--dump-dom", probe.as_uri())
    assert ">0.270 ± 0.000 (2)</td>" in dom
    seen = json.loads(re.search(r'\{"seen".*"wide":-?\d+\}', html.unescape(dom))[0])
    assert len(seen["seen"]) == 11
    assert all(width > 50 and height > 50 and natural > 0 for width, height, natural, _ in seen["seen"])
    background, ink = seen["page"]
    assert (contrast(background, "rgb(0, 0, 0)") < 2) == (theme == "dark")
    for color in (ink, *(color for *_, color in seen["seen"] if color)):
        assert contrast(background, color) > 7
    assert seen["wide"] <= 0  # wide tables and figures scroll, the page does not


MARKS = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("td.not_reached, td.none, td.over, td small, td.certified")]
    .map(e => [e.className || "small", getComputedStyle(e).color]);
  document.body.replaceChildren(JSON.stringify({found, page: getComputedStyle(document.body).backgroundColor}))
})</script>"""


@pytest.mark.parametrize("theme", THEMES)
def test_marks_can_be_read_and_told_apart(theme, tmp_path):
    folder = mixed(tmp_path / "mixed")
    probe = tmp_path / "probe.html"
    probe.write_text(report(folder).read_text().replace("</body>", f"{MARKS}</body>"))
    dom = html.unescape(chromium(tmp_path, THEMES[theme], "--dump-dom", probe.as_uri()))
    seen = json.loads(re.search(r'\{"found".*\}', dom)[0])
    colors = dict(seen["found"])
    assert set(colors) == {"not_reached", "none", "over", "small", "certified"}
    assert min(contrast(seen["page"], color) for color in colors.values()) > 4.5  # WCAG 2, level AA
    assert len({colors[kind] for kind in ("not_reached", "none", "certified")}) == 3


@pytest.mark.parametrize("theme", THEMES)
def test_a_screenshot_is_not_blank(made, theme, tmp_path):
    from PIL import Image

    shot = tmp_path / "shot.png"
    page = (made / "report.html").as_uri()
    chromium(tmp_path, THEMES[theme], "--window-size=1200,2400", f"--screenshot={shot}", page)
    colors = Image.open(shot).convert("RGB").getcolors(1 << 24)
    total, common = sum(n for n, _ in colors), max(colors)
    assert (sum(common[1]) < 200) == (theme == "dark")  # the paper
    assert 0.02 < 1 - common[0] / total < 0.7
    assert len(colors) > 100
