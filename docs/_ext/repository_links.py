"""``docs/site/``: the README, the changelog and the guide for contributors, as pages of the site.

The pages are read in the repository as well, where those three lie beside ``docs/``. On the site, links that go there and
back lead to pages, and links to programs are no links.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def as_page(text: str) -> str:
    """One of the three, as it reads in ``docs/site/``."""
    for file, page in PAGES.items():
        text = text.replace(f"]({file}", f"]({page}")
    text = re.sub(r"\[([^\]]*)\]\((?:tools|tests|passes|etcompile)/[^)]*\)", r"\1", text)
    text = text.replace("](docs/tutorials)", "](../learn/index.rst)")
    return re.sub(r"(\]\(|src=\")docs/", r"\1../", text)


def write(app: Sphinx) -> None:
    here = Path(app.srcdir)
    (here / "site").mkdir(exist_ok=True)
    for file, page in PAGES.items():
        path, text = here / "site" / page, as_page((here.parent / file).read_text(encoding="utf-8"))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Links of the other pages to the three."""
    for file, page in PAGES.items():
        content[0] = content[0].replace(f"](../{file}", f"](site/{page}")
    content[0] = content[0].replace("](tutorials/README.rst", "](learn/index.rst")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write, priority=100)
    app.connect("source-read", on_read)
    return {"parallel_read_safe": True}
