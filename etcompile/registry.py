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
from etcompile.ir.header import Header
from etcompile.ir.program import TraceProgram
from etcompile.keywords import unknown_option
from etcompile.pass_manager import Pass
from etcompile.paths import path_matches
from etcompile.rule_errors import rule_failure

__all__ = ["Algorithm", "Mixed", "Rule", "algorithm", "algorithm_names", "pipeline", "shipped_names"]

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

    def losses(self, header: Header) -> str:
        """What the rule loses on this model beside the cuts, in words."""
        return self.rule.losses(header, dict(self.options))

    def __call__(self, program: TraceProgram) -> TraceProgram:
        builder = ProgramBuilder(self.name, program.header)
        run_rule(self.rule, builder, self.options)
        self.functions.update(builder.functions)
        return builder.finish(self.rule.exact_for(program.header, dict(self.options)))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered learning rule; calling it with options gives an :class:`Algorithm`."""

    name: str
    write: Callable[..., None]
    exact: str | Callable[..., bool]
    preserves: str
    leaves_out: str | Callable[..., str] = ""

    def exact_for(self, header: Header, options: Mapping[str, Any]) -> bool:
        """Whether its gradients equal backpropagation through time on this model, where no credit ends at a cut."""
        if callable(self.exact):
            return self.exact(header, **_taken(self.exact, options))
        return self.exact != "never"

    def losses(self, header: Header, options: Mapping[str, Any]) -> str:
        """What it loses on this model beside the cuts, in words; empty where it is exact but for those."""
        if self.exact_for(header, options):
            return ""
        said = self.leaves_out
        return said(header, **_taken(said, options)) if callable(said) else said

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.write.__doc__

    def __call__(self, **options: Any) -> Algorithm:
        known = list(inspect.signature(self.write).parameters)[1:]
        for key in options:
            if key not in known:
                raise unknown_option(self.name, key, options[key], known)
        return Algorithm(self, tuple(sorted(options.items())))


def _taken(claim: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a rule's options that one of its claims names."""
    names = list(inspect.signature(claim).parameters)[1:]
    return {key: value for key, value in options.items() if key in names}


def algorithm(
    name: str,
    *,
    exact: str | Callable[..., bool] = "never",
    preserves: str = "approximates",
    leaves_out: str | Callable[..., str] = "",
    aliases: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Rule]:
    """Register a learning rule.

    Parameters
    ----------
    name : str
        Name under which ``compile(algo=...)`` finds it. Registering a name again replaces the rule; the names of the rules that
        come with etcompile are taken.
    exact : {"never", "uncut", "always"} or callable
        When the rule's gradients, summed over a sequence, equal backpropagation through time where no credit ends at a
        cut that counts for it: never, for every such model (``"uncut"`` and ``"always"``; a rule that follows all paths has
        no cuts but those of states left out and of while loops), or a function of the header and of those of the
        rule's options that it names. ``PassManager(check=True)`` compares with backpropagation.
    preserves : {"approximates", "changes"}
        Whether it approximates the gradient or computes something else.
    leaves_out : str or callable
        What it approximates beside the cuts, in words, for the report; or a function like ``exact`` that says it.
    aliases : sequence of str
        Other names under which it is found.

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
    if not isinstance(name, str):
        written = getattr(name, "__name__", "my_rule")
        raise OptionError(
            "algorithm takes the name of the rule, in parentheses.",
            got=f"@etcompile.algorithm on {written}" if callable(name) else f"algorithm({name!r})",
            expected=f'@etcompile.algorithm("{written}")',
        )
    if not callable(exact) and exact not in ("never", "uncut", "always"):
        raise OptionError("exact must be 'never', 'uncut' or 'always'.", got=repr(exact))

    def register(write: Callable[..., None]) -> Rule:
        rule = Rule(name, write, exact, preserves, leaves_out)
        if not _ships(rule):
            _load()
            for taken in (name, *aliases):
                if taken in _RULES and _ships(_RULES[taken]):
                    raise AlgorithmError(
                        f"{taken!r} is the name of a rule that comes with etcompile.",
                        got=f"@etcompile.algorithm({name!r}) on {getattr(write, '__name__', write)}",
                        expected="a name that is not taken",
                        hint=f"call it 'my_{taken}', and compile with algo='my_{taken}'.",
                    )
        _RULES.update(dict.fromkeys((name, *aliases), rule))
        return rule

    return register


def algorithm_names() -> list[str]:
    """Names of all rules: those shipped, those registered here, and those of installed packages."""
    _load()
    return sorted(set(_RULES) | {e.name for e in metadata.entry_points(group=ENTRY_POINTS)})


def shipped_names() -> list[str]:
    """Names of the rules that come with the package, each rule once, without its aliases."""
    _load()
    return sorted({rule.name for rule in _RULES.values() if _ships(rule)})


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


def _ships(rule: Rule) -> bool:
    """Whether a rule comes with the package."""
    return getattr(rule.write, "__module__", "").startswith("etcompile.passes.")


def run_rule(rule: Rule, builder: ProgramBuilder, options: Sequence[tuple[str, Any]]) -> None:
    """Have a rule write its equations; what goes wrong inside of it names the rule, its line and the relation."""
    try:
        returned: Any = rule.write(builder, **dict(options))
    except Exception as error:
        failure = rule_failure(rule.name, rule.write, error, builder.header)
        if failure is None:
            raise
        raise failure from error
    if returned is not None:
        raise AlgorithmError(
            f"the rule {rule.name} returns something, which nobody reads.",
            got=f"a {type(returned).__name__}",
            expected="a function that declares its gradients with p.gradient(relation, value) and returns nothing",
        )


def _load() -> None:
    """Import the rules that come with the package."""
    import_module("etcompile.passes")


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Several rules in one program, each for the weights whose parameter paths match its pattern.

    A pattern is a path, a prefix of one, or a glob; ``"*"`` takes what no other pattern does. A weight without a
    relation (a readout) has one gradient whatever the rule, and needs no pattern.
    """

    parts: tuple[tuple[str, Algorithm], ...]
    functions: dict[str, Callable] = dataclasses.field(default_factory=dict, compare=False, hash=False)

    @property
    def name(self) -> str:
        return "+".join(dict.fromkeys(part.name for _, part in self.parts))

    def losses(self, header: Header) -> str:
        """What the rules that have weights lose on this model beside the cuts, in words."""
        shared = zip(self.parts, self._shared_out(header), strict=True)
        said = [
            f"{pattern}: {part.losses(header)}"
            for (pattern, part), names in shared
            if names and part.losses(header)
        ]
        return "; ".join(dict.fromkeys(said))

    @property
    def preserves(self) -> str:
        return "changes" if any(part.preserves == "changes" for _, part in self.parts) else "approximates"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        header = program.header
        sites = self._shared_out(header)
        builder = ProgramBuilder(self.name, header)
        used, all_paths = [], True
        for (pattern, part), names in zip(self.parts, sites, strict=True):
            if not names:
                continue
            view = builder.restricted(names)
            run_rule(part.rule, view, part.options)
            if view.window_steps is not None:
                raise AlgorithmError(
                    f"{part.name} works on windows of all weights, so it cannot be mixed with other rules.",
                    got=f"algo={{{pattern!r}: {part.name!r}, ...}}",
                    expected="one rule for all weights, with within='exact' for windows",
                )
            used.append(part)
            all_paths &= view.follows_all_paths
        builder.follows_all_paths = bool(used) and all_paths
        self.functions.update(builder.functions)
        return builder.finish(all(part.rule.exact_for(header, dict(part.options)) for part in used))

    def _shared_out(self, header: Header) -> list[list[str]]:
        """The sites of each part."""
        sites: list[list[str]] = [[] for _ in self.parts]
        related = {r.site for r in header.relations}
        matched = [False] * len(self.parts)
        for site in header.sites:
            hits = [
                k
                for k, (pattern, _) in enumerate(self.parts)
                if pattern != "*" and any(path_matches(path, pattern) for path in site.params)
            ]
            for k in hits:
                matched[k] = True
            rules = {self.parts[k][1] for k in hits}
            if len(rules) > 1:
                raise AlgorithmError(
                    f"{' and '.join(site.params)} is matched by patterns with different rules.",
                    where=site.source,
                    got=", ".join(f"{self.parts[k][0]!r}: {self.parts[k][1].name}" for k in hits),
                    expected="one rule for a weight",
                )
            star = next((k for k, (pattern, _) in enumerate(self.parts) if pattern == "*"), None)
            if not hits and star is None and site.name in related:
                raise AlgorithmError(
                    f"{' and '.join(site.params)} has a trace, and no pattern says by which rule.",
                    where=site.source,
                    got=f"patterns {', '.join(repr(pattern) for pattern, _ in self.parts)}",
                    hint="add its path, or '*' for everything else.",
                )
            chosen = hits[0] if hits else star
            if chosen is not None:
                sites[chosen].append(site.name)
        for (pattern, _), hit in zip(self.parts, matched, strict=True):
            if not hit and pattern != "*":
                paths = dict.fromkeys(path for site in header.sites for path in site.params)
                raise AlgorithmError(
                    f"the pattern {pattern!r} matches no parameter.",
                    expected=f"a path or pattern among {', '.join(paths)}",
                )
        return sites


def pipeline(
    algo: Any, options: Mapping[str, Any], optimise: bool = True, windows: bool = False
) -> tuple[Algorithm | Mixed, list[Pass]]:
    """The algorithm and all passes for what the user gave as ``algo``; ``windows`` for exact credit inside of windows."""
    if isinstance(algo, Mapping):
        if options:
            raise OptionError("options go into each rule of a dict.", got=", ".join(options))
        if not algo:
            raise AlgorithmError("algo is an empty dict.", expected="parameter patterns and their rules")
        parts = tuple((str(pattern), _as_algorithm(rule, {})) for pattern, rule in algo.items())
        algo = Mixed(parts)
    given: list[Any] = list(algo) if isinstance(algo, Sequence) and not isinstance(algo, str) else [algo]
    if not given:
        raise AlgorithmError(
            "algo is an empty list of passes.", expected="a learning rule, then optional passes"
        )
    first, rest = _as_algorithm(given[0], {} if isinstance(algo, Mixed) else options), given[1:]
    from etcompile.passes import OPTIMISATIONS, ExactWithin

    # every use starts from a fresh record of functions
    first = dataclasses.replace(first, functions={})
    after = [ExactWithin()] if windows else []
    return first, [first, *after, *rest, *(make() for make in (OPTIMISATIONS if optimise else ()))]


def _as_algorithm(given: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(given, str):
        given = find_rule(given)
    if isinstance(given, Rule):
        return given(**options)
    if options:
        raise OptionError(
            "options go into the algorithm itself when it is given as an object.", got=", ".join(options)
        )
    if not isinstance(given, (Algorithm, Mixed)):
        raise AlgorithmError(
            "the first pass must be a learning rule.",
            got=repr(given),
            expected="a name, a rule, rule(**options), or a dict of these by parameter pattern",
        )
    return given
