"""Draw the picture at the top of the README: the network of its first example, as the compiler sees it.

    python tools/draw_readme.py [OUTPUT]

Writes docs/network.svg if it is not told otherwise. Needs Graphviz: the extra ``viz`` of etcompile, or a program ``dot``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import etcompile

ROOT = Path(__file__).resolve().parents[1]


def first_example() -> str:
    """The code of the README's first block."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if found is None:
        raise SystemExit("README.md has no block of Python code")
    return found[1]


def main() -> None:
    code = first_example()
    place = ROOT / "README.md"  # what the picture's tooltips name as the source
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(code, str(place), "exec"), names)
    etcompile.viz.draw(names["step"], sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "network.svg")


if __name__ == "__main__":
    main()
