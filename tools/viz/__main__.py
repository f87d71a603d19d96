"""``python tools/viz FILE.py:NAME -o graph.svg``: draw the hidden-group graph of a compiled model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from etcompile.viz.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
