"""Outside interfaces that few modules may use.

Some outside interfaces are unstable, or so wide that they would leak into everything. Each has one module
that may use it; the rest of the package goes through that module. import-linter can forbid a whole external
package, but not "this submodule of jax" nor "these names of brainstate", so this reads the source itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layering.sources import Breach, Source

__all__ = ["RULES", "Rule", "foreign_interfaces"]


@dataclass(frozen=True)
class Rule:
    """One interface, and the modules that may use it."""

    what: str
    #: Dotted names. A name stands for itself and for everything below it.
    names: tuple[str, ...]
    #: Files from the project's root. A folder stands for everything below it.
    allowed: tuple[str, ...]
    #: Files that the rule is for; the others may do as they like.
    within: tuple[str, ...] = ("etcompile", "passes")
    #: Names that are free although they stand below one of `names`.
    free: tuple[str, ...] = ()


# Change these when a module moves.
RULES = (
    Rule(
        what="jax internals",
        names=("jax.extend", "jax._src", "jax.interpreters", "jax.core", "jaxlib"),
        allowed=("etcompile/frontend/jaxpr.py", "etcompile/frontend/implementations.py"),
    ),
    Rule(
        what="brainstate's tracing",
        names=(
            "brainstate.transform.StatefulFunction",
            "brainstate.transform.make_jaxpr",
            "brainstate.StateTraceStack",
            "brainstate.catch_new_states",
            "brainstate._state",
        ),
        allowed=("etcompile/frontend/module.py", "etcompile/frontend/loss.py"),
    ),
    Rule(
        what="brainstate",
        names=("brainstate",),
        allowed=(
            "etcompile/frontend/module.py",
            "etcompile/frontend/state_values.py",
            "etcompile/frontend/function.py",
            "etcompile/frontend/loss.py",
            "etcompile/frontend/captured.py",
            "etcompile/brainstate_import.py",
            "etcompile/frontend/environment.py",
            "etcompile/nn",
            "etcompile/runtime",
        ),
    ),
    # Users meet the graph as a networkx graph, and so does the code that draws it for them.
    Rule(
        what="networkx",
        names=("networkx",),
        allowed=(
            "etcompile/analysis/components.py",
            "etcompile/adapters/nir_wiring.py",
            "etcompile/graph.py",
            "etcompile/viz/graph.py",
        ),
    ),
    Rule(what="graphviz", names=("graphviz", "pygraphviz"), allowed=("etcompile/viz",)),
    Rule(
        what="etcompile beyond the pass API",
        names=("etcompile",),
        within=("passes",),
        allowed=(),
        free=("etcompile.pass_api", "etcompile.passes"),
    ),
)


def foreign_interfaces(sources: Sequence[Source]) -> Iterator[Breach]:
    """Uses of an interface outside of the files that may."""
    for source in sources:
        used_names = list(uses(source.tree))
        for rule in RULES:
            if not source.within(rule.within) or source.within(rule.allowed):
                continue
            lines: dict[int, str] = {}
            for line, used in used_names:
                if below(used, rule.names) and not below(used, rule.free):
                    lines.setdefault(line, used)
            who = ", ".join(rule.allowed) or f"nothing in {', '.join(rule.within)}"
            for line, used in lines.items():
                yield source.name, line, f"uses {used}; only {who} may use {rule.what}"


def below(used: str, names: tuple[str, ...]) -> bool:
    return any(used == name or used.startswith(name + ".") for name in names)


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported thing, and every attribute chain that starts at one, as absolute dotted names.

    Imports for type checkers only count for nothing: at run time they are not there.
    """
    bound: dict[str, str] = {}
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                # `import a.b` binds `a`; `import a.b as c` binds `c` to `a.b`.
                top = alias.name.split(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full
                bound[alias.asname or alias.name] = full
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Attribute):
            chain = dotted(node)
            if chain is not None and chain[0] in bound:
                yield node.lineno, ".".join((bound[chain[0]], *chain[1:]))


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from run_time_nodes(node)


def dotted(node: ast.expr) -> tuple[str, ...] | None:
    """``a.b.c`` as ``("a", "b", "c")``; None if it does not start at a plain name."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return None if base is None else (*base, node.attr)
    return None
