"""No circle of imports between files of different folders, imports for type checkers and in functions included."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from layering.sources import Breach, Source

__all__ = ["ALLOWED", "circles", "stale_imports"]

#: Imports that close a circle on purpose, with the reason: ``(importer, imported)``.
ALLOWED: dict[tuple[str, str], str] = {
    ("etcompile.registry", "etcompile.passes"): "rules are found by name when they are asked for",
}

#: Module to imported module to line.
Imports = dict[str, dict[str, int]]


def circles(sources: Sequence[Source], allowed: Mapping[tuple[str, str], str] = ALLOWED) -> Iterator[Breach]:
    """For every folder-crossing import that can be followed back to its file, the shortest way back, once per circle."""
    by_module = {s.module: s for s in sources}
    graph = {
        module: {t: line for t, line in found.items() if (module, t) not in allowed}
        for module, found in _imports(sources).items()
    }
    told: set[str] = set()
    for module, targets in graph.items():
        for target, line in targets.items():
            if by_module[module].name.parent == by_module[target].name.parent:
                continue
            back = _path(graph, target, module)
            if back and not told.issuperset(back):
                told.update(back)
                way = " -> ".join((module, *back))
                yield by_module[module].name, line, f"imports {target} in a circle across folders: {way}"


def stale_imports(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Allowed imports that nobody makes any more."""
    graph = _imports(sources)
    return [(a, b) for a, b in ALLOWED if b not in graph.get(a, {})]


def _imports(sources: Sequence[Source]) -> Imports:
    modules = {s.module for s in sources}
    graph: Imports = {s.module: {} for s in sources}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module for name in full]
            else:
                continue
            for name in names:
                if name in modules and name != source.module:
                    graph[source.module].setdefault(name, node.lineno)
    return graph


def _path(graph: Imports, start: str, end: str) -> list[str]:
    """The shortest way from one module to another; empty if there is none."""
    before: dict[str, str] = {start: ""}
    waiting = deque([start])
    while waiting:
        module = waiting.popleft()
        if module == end:
            way = [module]
            while before[way[-1]]:
                way.append(before[way[-1]])
            return way[::-1]
        for target in graph[module]:
            if target not in before:
                before[target] = module
                waiting.append(target)
    return []
