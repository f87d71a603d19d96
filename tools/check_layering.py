"""Check the layering rules that import-linter has no contract for; each stands in a file of ``tools/layering``.

    python tools/check_layering.py [ROOT]

Prints one line per breach, ``file:line: what``, and exits with 1 if there is any. The lists of what is excepted stand at the
top of each file; what they hold without need is a breach as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

from layering.circles import circles, stale_imports
from layering.interfaces import foreign_interfaces
from layering.names import name_tests, stale_files
from layering.private import private_reads, stale_reads
from layering.sources import CHECKED, read_sources

CHECKS = (foreign_interfaces, name_tests, private_reads, circles)


def main(root: Path) -> int:
    sources = read_sources(root)
    if not sources:
        print(f"{root}: no Python files below {', '.join(CHECKED)}")
        return 1
    breaches = sorted(breach for check in CHECKS for breach in check(sources))
    for name, line, what in breaches:
        print(f"{name}:{line}: {what}")
    needless = [*stale_files(sources), *stale_reads(sources), *stale_imports(sources)]
    for exception in needless:
        print(f"needlessly excepted: {exception}")
    if breaches or needless:
        return 1
    print(f"{len(sources)} files keep the layering rules")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))
