"""The documentation site as `make docs` built it: every link within it leads somewhere, and a browser shows its pages."""

from __future__ import annotations

import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browsers import looked_at

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(os.environ.get("ETCOMPILE_SITE", ROOT / "out" / "site"))

pytestmark = pytest.mark.skipif(
    not (SITE / "index.html").exists(),
    reason="the site is not built: make docs (CI does it before the tests)",
)

#: Made by Sphinx for its search and index, without a text of ours.
_MADE = ("genindex.html", "search.html", "py-modindex.html")


class _Links(HTMLParser):
    """The names on a page, and where it leads."""

    def __init__(self, page):
        super().__init__()
        self.names, self.leads, self.title = set(), [], ""
        self._in_title = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        key = {"a": "href", "img": "src", "script": "src", "link": "href"}.get(tag)
        if key and found.get(key):
            self.leads.append(found[key])
        self._in_title = tag == "title"

    def handle_data(self, data):
        if self._in_title:
            self.title += data
            self._in_title = False


@pytest.fixture(scope="module")
def pages():
    found = [p for p in SITE.rglob("*.html") if "_static" not in p.parts and not p.name.startswith("looked-")]
    return {page.resolve(): _Links(page) for page in found}


def test_every_link_within_the_site_leads_somewhere(pages):
    lost = []
    for page, links in pages.items():
        for lead in links.leads:
            parts = urlsplit(lead)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir():
                target /= "index.html"
            there = target.exists() or target.name in _MADE
            named = target not in pages or unquote(parts.fragment) in pages[target].names | {""}
            if not (there and named):
                lost.append(f"{page.relative_to(SITE.resolve())}: {lead}")
    assert not lost, "\n".join(lost)


def test_the_site_has_all_pages_tutorials_and_public_names(pages):
    there = {page.relative_to(SITE.resolve()).as_posix() for page in pages}
    written = {f"{p.stem}.html" for p in (ROOT / "docs").glob("*.md")}
    assert written <= there
    tutorials = {p.stem for p in (ROOT / "docs" / "tutorials").glob("plot_*.py")}
    assert tutorials <= {Path(name).stem for name in there}
    assert all(links.title.strip() for links in pages.values())


#: What is asked of a page: width, pictures that did not load, and how much text there is.
_LOOK = """({
  wide: document.documentElement.scrollWidth, window: innerWidth,
  broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
  images: document.images.length, heads: document.querySelectorAll("h1").length,
  text: document.querySelector("article, main, body").innerText.length,
})"""


@pytest.mark.parametrize(
    "name",
    ["index.html", "rules.html", "benchmarks.html", "reinforcement.html", "api.html", "tutorial"],
)
def test_a_browser_shows_the_site(name, pages, tmp_path):
    copied = shutil.copytree(SITE, tmp_path / "site")
    if name == "tutorial":
        page = next(copied.rglob("plot_01*.html"))
    else:
        page = copied / name
    found = looked_at(page, _LOOK, tmp_path / "profile")
    assert found["wide"] <= found["window"] + 1, "no page is wider than the window"
    assert not found["broken"]
    assert found["heads"] == 1 and found["text"] > 500
    assert found["images"] or name == "api.html"
