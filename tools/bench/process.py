"""A function in a process of its own: ``fresh("measure:sequence", case=..., quick=True)`` gives what it returns.

As a program, it is that process: the function and a JSON of its arguments, and the file that the result goes to.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["fresh"]

#: Seconds after which a process counts as stuck.
_LIMIT = 1800.0


def fresh(function: str, **arguments: Any) -> dict[str, Any]:
    """The result of ``module:function(**arguments)``; of one that fails, ``{"error": why}``."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, function, json.dumps(arguments), str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {_LIMIT:.0f} seconds"}
        if done.returncode or not result.exists():
            return {"error": (done.stderr.strip().splitlines() or ["no result"])[-1]}
        return json.loads(result.read_text(encoding="utf-8"))


def main(function: str, arguments: str, result: str) -> None:
    import environment  # noqa: F401

    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
