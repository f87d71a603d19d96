"""Learning rules by name: ``@etcompile.algorithm`` and the entry points of other packages."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

from etcompile.errors import AlgorithmError, OptionError
from etcompile.ir.builder import ProgramBuilder
from etcompile.ir.program import TraceProgram
from etcompile.pass_manager import Pass

__all__ = ["Algorithm", "Rule", "algorithm", "algorithm_names", "pipeline"]

#: Entry point group in which other packages publish rules.
ENTRY_POINTS = "etcompile.algorithms"

_RULES: dict[str, Rule] = {}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A learning rule with its options: the first pass of every pipeline.

    Called on a program, it throws away its equations and writes its own.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...] = ()
    functions: dict[str, Callable] = dataclasses.field(default_factory=dict, compare=False, hash=False)

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def preserves(self) -> str:
        return self.rule.preserves

    def __call__(self, program: TraceProgram) -> TraceProgram:
        builder = ProgramBuilder(self.name, program.header)
        self.rule.write(builder, **dict(self.options))
        exact = self.rule.exact == "always" or (self.rule.exact == "uncut" and not program.header.cuts)
        self.functions.update(builder.functions)
        return builder.finish(exact)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered learning rule; calling it with options gives an :class:`Algorithm`."""

    name: str
    write: Callable[..., None]
    exact: str
    preserves: str

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.write.__doc__

    def __call__(self, **options: Any) -> Algorithm:
        known = list(inspect.signature(self.write).parameters)[1:]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise OptionError(
                    f"{self.name} has no option {key!r}.",
                    got=f"{key}={options[key]!r}",
                    expected=f"one of {', '.join(known)}" if known else "no options",
                    hint=f"did you mean {near[0]!r}?" if near else None,
                )
        return Algorithm(self, tuple(sorted(options.items())))


def algorithm(
    name: str, *, exact: str = "never", preserves: str = "approximates"
) -> Callable[[Callable[..., None]], Rule]:
    """Register a learning rule.

    Parameters
    ----------
    name : str
        Name under which ``compile(algo=...)`` finds it. Registering a name again replaces the rule.
    exact : {"never", "uncut", "always"}
        When the rule's gradients, summed over a sequence, equal backpropagation through time.
    preserves : {"approximates", "changes"}
        Whether it approximates the gradient or computes something else.

    Examples
    --------
    >>> import etcompile
    >>> @etcompile.algorithm("my_e_prop")
    ... def my_e_prop(p, kappa=0.9):
    ...     for r in p.relations:
    ...         e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
    ...         ebar = p.recur(decay=kappa, inject=(1 - kappa) * e)
    ...         p.gradient(r, p.contract(p.signal(r.group), ebar))
    """
    if exact not in ("never", "uncut", "always"):
        raise OptionError("exact must be 'never', 'uncut' or 'always'.", got=repr(exact))

    def register(write: Callable[..., None]) -> Rule:
        rule = Rule(name, write, exact, preserves)
        _RULES[name] = rule
        return rule

    return register


def algorithm_names() -> list[str]:
    """Names of all rules: those shipped, those registered here, and those of installed packages."""
    _load()
    return sorted(set(_RULES) | {e.name for e in metadata.entry_points(group=ENTRY_POINTS)})


def find_rule(name: str) -> Rule:
    _load()
    if name not in _RULES:
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            if entry.name == name:
                loaded = entry.load()
                if isinstance(loaded, Rule):
                    _RULES[name] = loaded
    if name not in _RULES:
        names = algorithm_names()
        near = difflib.get_close_matches(name, names, 1, 0.4)
        raise AlgorithmError(
            f"there is no learning rule {name!r}.",
            expected=f"one of {', '.join(names)}",
            hint=f"did you mean {near[0]!r}?"
            if near
            else "register a rule of your own with @etcompile.algorithm.",
        )
    return _RULES[name]


def _load() -> None:
    """Import the rules that come with the package."""
    import_module("etcompile.passes")


def pipeline(algo: Any, options: Mapping[str, Any], optimise: bool = True) -> tuple[Algorithm, list[Pass]]:
    """The algorithm and all passes for what the user gave as ``algo``."""
    given: list[Any] = list(algo) if isinstance(algo, Sequence) and not isinstance(algo, str) else [algo]
    if not given:
        raise AlgorithmError(
            "algo is an empty list of passes.", expected="a learning rule, then optional passes"
        )
    first, rest = given[0], given[1:]
    if isinstance(first, str):
        first = find_rule(first)
    if isinstance(first, Rule):
        first = first(**options)
    elif options:
        raise OptionError(
            "options go into the algorithm itself when it is given as an object.", got=", ".join(options)
        )
    if not isinstance(first, Algorithm):
        raise AlgorithmError(
            "the first pass must be a learning rule.",
            got=repr(first),
            expected="a name, a rule, or rule(**options)",
        )
    from etcompile.passes import OPTIMISATIONS

    # every use starts from a fresh record of functions
    first = dataclasses.replace(first, functions={})
    return first, [first, *rest, *(make() for make in (OPTIMISATIONS if optimise else ()))]
