"""Where numbers are kept: a JSON file for each make of processor and version of JAX, in the folder beside the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cases import CASES
from results import label_of

__all__ = ["Store", "read_all"]

#: What is measured of a machine; all else says what it is.
RATES = ("memory", "flops", "rows")


class Store:
    """The results of one machine and one version of JAX, and their file; of a store that is not there yet, none."""

    def __init__(self, folder: Path, machine: dict[str, Any], settings: dict[str, Any], anew: bool) -> None:
        self.results: dict[str, Any] = _plain({"settings": settings, "machine": machine, "cases": {}})
        name = re.sub(r"[^a-z0-9.]+", "-", label_of(self.results).lower())
        self.path = folder / f"{name}.json"
        if self.path.exists() and not anew:
            self._take_over(json.loads(self.path.read_text(encoding="utf-8")))

    def _take_over(self, old: dict[str, Any]) -> None:
        """The cases that were measured before; an error if they cannot stand beside new ones."""
        new = self.results
        for what, a, b in (
            ("settings", old["settings"], new["settings"]),
            ("machine", _kind(old["machine"]), _kind(new["machine"])),
        ):
            if a != b:
                differ = ", ".join(sorted(k for k in {*a, *b} if a.get(k) != b.get(k)))
                raise SystemExit(
                    f"{self.path} was measured with another {what} ({differ}): --anew forgets it, --page keeps the new elsewhere."
                )
        new["machine"] |= {k: _higher(old["machine"][k], new["machine"][k]) for k in RATES}
        new["cases"] = old["cases"]

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Keep a case, in the order of all, and save."""
        measured = {**self.results["cases"], name: found}
        self.results["cases"] = {c.name: measured[c.name] for c in CASES if c.name in measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The results of all machines: newest JAX first, and of one version those with most cases."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise SystemExit(f"nothing has been measured yet: {folder} holds no JSON files.")
    return sorted(found, key=lambda results: (_version(results), len(results["cases"])), reverse=True)


def _version(results: dict[str, Any]) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", results["machine"]["versions"]["jax"])]


def _kind(machine: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in machine.items() if name not in RATES}


def _higher(old: Any, new: Any) -> Any:
    return {k: max(old.get(k, 0), v) for k, v in new.items()} if isinstance(new, dict) else max(old, new)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
