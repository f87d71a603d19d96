"""Draw docs/architecture.svg from docs/architecture.dot.

    python tools/draw_architecture.py [OUTPUT]

Needs Graphviz: the extra ``viz`` of etcompile, or a program ``dot``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from etcompile.viz.render import render

SOURCE = Path(__file__).parents[1] / "docs" / "architecture.dot"


def main(output: Path) -> int:
    output.write_bytes(render(SOURCE.read_text(), output.suffix.removeprefix(".")))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.with_suffix(".svg")))
