"""What surrounds each tutorial while the site is built: a fresh start, and pictures of networks beside those of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import brainstate
import jax

import etcompile
from etcompile.viz import Drawing


def fresh(gallery_conf: dict[str, Any], script: str, when: str = "before") -> None:
    """Settings and random numbers are those of a new process, and rules of an earlier tutorial are forgotten."""
    global _RULES
    if _RULES is None:
        etcompile.algorithm_names()  # the shipped ones are there now
        _RULES = dict(etcompile.registry._RULES)
    etcompile.registry._RULES.clear()
    etcompile.registry._RULES.update(_RULES)
    jax.config.update("jax_enable_x64", False)
    brainstate.environ.set(precision=32)
    brainstate.random.seed(0)


_RULES: dict[str, Any] | None = None


def drawings(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Every :class:`etcompile.viz.Drawing` that a block of a tutorial assigns becomes its picture."""
    from sphinx_gallery.scrapers import figure_rst

    seen = gallery_conf.setdefault("drawings_seen", [])
    found = []
    for value in block_vars["example_globals"].values():
        if isinstance(value, Drawing) and not any(value is other for other in seen):
            seen.append(value)
            path = Path(next(block_vars["image_path_iterator"])).with_suffix(".png")
            value.save(path)
            found.append(str(path))
    return figure_rst(found, gallery_conf["src_dir"])
