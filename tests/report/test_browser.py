# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The report's page in a real browser: it fits wide and narrow screens, and runs no script."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlpp_hf.report.page import render_page

from .pages import HOSTILE, make_audit, make_content
from .records import make_record


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=2000",
]  # fmt: skip
# The page itself may run no script: another page has it in a frame, and measures it from outside.
FRAME = """<!DOCTYPE html><body style="margin: 0"><iframe style="border: 0; width: {width}px; height: 2500px" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.querySelector("iframe").onload = event => {{
  const inner = event.target.contentDocument, root = inner.documentElement;
  const boxes = [...inner.querySelectorAll(".scroll")];
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, ran: inner.title !== "Federation report",
    outside: [...inner.querySelectorAll("p, h1, h2, figure, svg, dl, .scroll")].filter(
      element => element.getBoundingClientRect().right > root.clientWidth + 1).map(element => element.outerHTML.slice(0, 80)),
    boxes: boxes.filter(box => box.scrollWidth > box.clientWidth).length,
    smallest: Math.min(...[...inner.querySelectorAll("p, th, td, dt")].filter(element => element.offsetWidth).map(
      element => parseFloat(inner.defaultView.getComputedStyle(element).fontSize))),
    picture: Math.min(...[...inner.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width)),
  }});
}};
</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed"),
]


def run_browser(directory: Path, page: Path, *flags: str) -> str:
    profile = directory / "profile"
    shutil.rmtree(profile, ignore_errors=True)  # a new one each time
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def measure(directory: Path, page: str, width: int) -> dict:
    frame = directory / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    shown = run_browser(directory, frame, "--dump-dom", "--window-size=1400,2600")
    found = re.search(r'<pre id="found">(.+?)</pre>', shown)
    assert found, shown[-500:]
    return json.loads(html.unescape(found.group(1)))


def take_picture(directory: Path, page: Path, width: int) -> np.ndarray:
    """A screenshot `(height, width, 3)`, uint8."""
    from PIL import Image

    picture = directory / f"{width}.png"
    run_browser(directory, page, f"--window-size={width},1600", f"--screenshot={picture}")
    return np.asarray(Image.open(picture).convert("RGB"))


@pytest.fixture
def page(args) -> str:
    """A page with long names and large numbers, which are what makes pages too wide."""
    pytest.importorskip("matplotlib")
    names = [f"a-client-with-a-long-name-that-has-no-space-{number}" for number in range(3)]
    entry = {"num_examples": 123_456, "loss": 1.0, "steps": 3}
    cost = {"bytes_down": 123_456_789, "bytes_up": 987_654_321, "seconds": 1234.5}
    metrics = {"eval_loss": 1.0, "eval_a_metric_with_a_long_name": 0.123, "eval_accuracy": 0.5}
    records = [
        make_record(n, metrics, metrics, clients=dict.fromkeys(names, entry), asked=names,
                    traffic=dict.fromkeys(names, cost), rejected={"late": "it did not answer within 60 s " + "x" * 60})
        for n in range(4)
    ]  # fmt: skip
    stolen = [*make_audit().stolen, ["a", "loss", "undetermined", "last proxy + 1234 steps at 0.0009"]]
    return render_page(
        make_content(args, records=records, audit=make_audit(stolen=stolen), base_fingerprint="ab" * 32)
    )


@pytest.mark.parametrize("width", [1200, 768, 360])
def test_page_fits_the_screen(page, tmp_path, width):
    found = measure(tmp_path, page, width)
    assert found["width"] == width and found["needed"] == width and found["outside"] == []
    assert found["boxes"] > 0 or width > 360  # wide tables scroll in their own boxes
    assert found["smallest"] >= 12 and found["picture"] >= 300


def test_page_runs_no_script(args, tmp_path):
    """Even if some text were to become markup: the page's policy forbids it."""
    content = make_content(args, federation_id=HOSTILE)
    title = '<script>document.title = "ran"</script><img src="x" onerror="document.title = \'ran\'">'
    assert measure(tmp_path, render_page(content), 800)["ran"] is False
    broken = render_page(content).replace("<main>", f"<main>{title}")
    assert measure(tmp_path, broken, 800)["ran"] is False
    without = re.sub(r"<meta http-equiv=[^>]*>", "", broken)
    assert measure(tmp_path, without, 800)["ran"] is True  # or this test could not fail


def test_page_opens_from_disk(args, tmp_path, page):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    shown = take_picture(tmp_path, file, 1200)
    assert shown.shape == (1600, 1200, 3)
    colors = {tuple(color) for color in shown.reshape(-1, 3)[::7].tolist()}
    assert (
        (255, 255, 255) in colors and (11, 110, 79) in colors and (184, 71, 47) in colors
    )  # the owner's, the clients'
    dark = tmp_path / "dark.html"
    dark.write_text(page.replace("prefers-color-scheme: dark", "min-width: 0"), encoding="utf-8")
    pixels = take_picture(tmp_path, dark, 1200).reshape(-1, 3)
    assert np.median(pixels.mean(1)) < 60 and (pixels.mean(1) > 180).any()
    nothing = make_content(args, records=[make_record(0, None, None)], audit=None, sent=[])
    file.write_text(render_page(replace(nothing, references={})), encoding="utf-8")
    assert take_picture(tmp_path, file, 600).std() > 0
