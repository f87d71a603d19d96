"""A real browser without a window, where one is installed: what a page looks like once it is laid out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["looked_at"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def looked_at(page: Path, question: str, profile: Path) -> Any:
    """What the JavaScript expression ``question`` is on a page; the test is skipped where no browser is installed."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(_BROWSERS)})")
    asked = page.with_name(f"looked-{page.name}")  # beside it, so that it finds what it shows
    script = (
        f"<script>addEventListener('load', () => {{document.title = JSON.stringify({question})}})</script>"
    )
    asked.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8"
    )
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1000",
        "--virtual-time-budget=5000",
        f"--user-data-dir={profile}",
    )
    done = subprocess.run(
        [browser, *options, "--dump-dom", asked.as_uri()], capture_output=True, timeout=120, check=True
    )
    told = re.search(r"<title>(\{.*?\})</title>", done.stdout.decode(), re.DOTALL)
    assert told is not None, "the page was not laid out"
    return json.loads(told[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
