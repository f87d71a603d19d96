"""Building programs: the interface in which learning rules are written.

The method for each op is in :mod:`etcompile.ir.vocabulary`; here is how equations and gradients become a program.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from etcompile.errors import EtcompileWarning, OptionError, ProgramError
from etcompile.integers import positive_integer
from etcompile.ir.header import Effect, Group, Header, Layer, Relation, Site, name_of
from etcompile.ir.kinds import KINDS, type_of
from etcompile.ir.ops import OPS, infer_type
from etcompile.ir.program import Argument, Equation, Gradient, Ref, Symbol, TraceProgram, made_from
from etcompile.ir.types import Type
from etcompile.ir.value import Value
from etcompile.ir.vocabulary import Vocabulary
from etcompile.paths import short_list

__all__ = ["ProgramBuilder", "Value"]


class ProgramBuilder(Vocabulary):
    """A program being written; a learning rule receives one and reads like its equations.

    Attributes
    ----------
    relations : tuple of Relation
        Hidden-to-weight relations; each has ``.name``, ``.site`` and ``.group``.
    groups : tuple of Group
    sites : tuple of Site
        All places where a weight meets data, also those without a relation.

    Examples
    --------
    >>> import etcompile
    >>> @etcompile.algorithm("plain_d_rtrl")
    ... def plain_d_rtrl(p):
    ...     for r in p.relations:
    ...         e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
    ...         p.gradient(r, p.contract(p.signal(r.group), e))
    """

    def __init__(self, name: str, header: Header) -> None:
        self.name = name
        self.header = header
        self.functions: dict[str, Callable] = {}
        self._equations: list[Equation] = []
        self._types: dict[str, Type] = {}
        self._memo: dict[tuple, str] = {}
        self._gradients: list[Gradient] = []
        self._defined_by: dict[str, str] = {}
        self._within: dict[str, str] = {}
        self._counters: dict[str, int] = {}
        self._only: frozenset[str] | None = None
        self._window: int | None = None
        self._end: str | None = None
        #: Whether the rule asked for layers or windows; what it writes then follows every path.
        self.follows_all_paths = False

    @property
    def relations(self) -> tuple[Relation, ...]:
        return tuple(r for r in self.header.relations if self._only is None or r.site in self._only)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.header.groups

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(s for s in self.header.sites if self._only is None or s.name in self._only)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Groups that feed each other from step to step; each has ``.name`` and ``.groups``."""
        return self.header.layers[:-1]

    @property
    def network(self) -> Layer:
        """All hidden states as one layer."""
        return self.header.layers[-1]

    def effects(self, layer: Layer | str) -> tuple[Effect, ...]:
        """Which sites reach a layer within the step; each has ``.name``, ``.site`` and ``.layer``."""
        name = name_of(layer)
        self.follows_all_paths = True
        return tuple(
            e for e in self.header.effects if e.layer == name and (self._only is None or e.site in self._only)
        )

    # -- random numbers -----------------------------------------------------------------------------------------

    def clock(self) -> Value:
        """The number of steps, 1 at the first, what random numbers are drawn by; a reset leaves it alone."""
        name = "clock"
        if name not in self._types:
            kind = type_of(self.header, "count", "")
            self._types[name] = kind
            self._append(name, "tick", (Ref(name, -1),), kind)
        return Value(self, Ref(name), self._types[name])

    def rademacher(self, layer: Layer | str, seed: int) -> Value:
        """A random sign for every element of a layer's states, new at every step."""
        return self.op("rademacher", layer, int(seed), self.clock())

    def row_signs(self, effect: Effect | str, seed: int) -> Value:
        """A random sign for every row of an effect, new at every step."""
        return self.op("row_signs", effect, int(seed), self.clock())

    def direction(self, site: Site | str, seed: int) -> Value:
        """A random sign for every entry of a site's weight, new at every step."""
        return self.op("direction", site, int(seed), self.clock())

    def subset(self, layer: Layer | str, size: int, seed: int, redraw: bool = False) -> Value:
        """1 for ``size`` units of each group at random, the same in all examples, else 0.

        With ``redraw`` others at every step, and n / size in place of 1 for a group of n units, so that the mean is 1.
        """
        return self.op("subset", layer, size, int(seed), *((self.clock(),) if redraw else ()))

    def fewer_terms(
        self, left: Sequence[Value], right: Sequence[Value], seed: int
    ) -> list[tuple[Value, Value]]:
        """A sum of Kronecker products, row factors (x) responses of one effect, with one term less: right on average.

        Of all such estimates it is the one of least variance.
        """
        args = (int(seed), self.clock(), *left, *right)
        return [
            (self.op("kronecker_left", k, *args), self.op("kronecker_right", k, *args))
            for k in range(len(left) - 1)
        ]

    def nearest(self, left: Sequence[Value], right: Sequence[Value]) -> list[tuple[Value, Value]]:
        """A sum of products, unit factors (x) responses of one effect, with one term less: for each element of y the nearest."""
        args = (*left, *right)
        return [
            (self.op("nearest_left", k, *args), self.op("nearest_right", k, *args))
            for k in range(len(left) - 1)
        ]

    # -- equations ----------------------------------------------------------------------------------------------

    def recur(self, decay: Value | float, inject: Value, name: str | None = None) -> Value:
        """V with v_t = decay v_{t-1} + inject, zero at the start.

        ``decay`` is a transition (a matrix per position), a number, or a value of the same type as ``inject``.
        """
        inject = self._arithmetic(inject)
        name = name or self._fresh(KINDS[inject.type.kind].carried)
        old = Value(self, Ref(name, -1), inject.type)
        self._types[name] = inject.type
        matrix = isinstance(decay, Value) and KINDS[decay.type.kind].matrix
        faded = self.op("matmul", decay, old) if matrix else self.op("mul", decay, old)
        self._append(name, "add", (faded.ref, inject.ref), inject.type)
        return Value(self, Ref(name), inject.type)

    def carry(
        self,
        kind: str,
        of: Group | Relation | Layer | Effect | Site | str = "",
        name: str | None = None,
        lasting: bool = False,
    ) -> Value:
        """A value that is carried and defined later by :meth:`define`; its ``.prev`` can be used at once.

        For recurrences that are not of the form of :meth:`recur`. ``kind`` and ``of`` are as in a printed type, such as
        ``"hidden"`` of a layer or ``"gradient"`` of a site. With ``lasting`` a reset leaves it alone, as a mean over episodes
        wants it.
        """
        return self._carried(kind, of, name, "lasting" if lasting else "copy")

    def learning_carry(
        self, kind: str, of: Group | Relation | Layer | Effect | Site | str = "", name: str | None = None
    ) -> Value:
        """A carried value that may depend on the loss: it goes on at steps with a loss alone.

        Without a loss, or where the mask of the step is zero, it stays as it was, and the report names it. Otherwise as
        :meth:`carry`. Such a program runs step by step, and ``step.apply`` has no derivative, which could not advance it.

        Examples
        --------
        >>> import etcompile
        >>> @etcompile.algorithm(
        ...     "momentum_of_d_rtrl", leaves_out="each step's gradient goes on for ten steps or so"
        ... )
        ... def momentum_of_d_rtrl(p, beta=0.9):
        ...     for r in p.relations:
        ...         e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        ...         m = p.learning_carry("gradient", r.site)
        ...         p.define(m, beta * m.prev + p.contract(p.signal(r.group), e))
        ...         p.gradient(r, m)
        """
        return self._carried(kind, of, name, "learn")

    def _carried(
        self, kind: str, of: Group | Relation | Layer | Effect | Site | str, name: str | None, op: str
    ) -> Value:
        name = name or self._fresh("c")
        self._types[name] = type_of(self.header, kind, name_of(of))
        self._defined_by[name] = op
        return Value(self, Ref(name), self._types[name])

    def define(self, carried: Value, value: Value) -> None:
        """Say what a value from :meth:`carry` or :meth:`learning_carry` is at this step."""
        if carried.type != value.type:
            raise ProgramError(
                f"{carried.ref} is defined by a value of another type.",
                got=str(value.type),
                expected=str(carried.type),
            )
        op = self._defined_by.get(carried.ref.name, "copy")
        self._append(carried.ref.name, op, (value.ref,), value.type)

    def contract(self, signal: Value, trace: Value, x: Value | None = None) -> Value:
        """Weight gradient of a learning signal and a trace.

        With ``x`` the trace is given by its two factors, an immediate Jacobian F and a presynaptic value, and the gradient
        ``x (x) (L F)`` is formed without building their product.

        Where the group's old states also reach a result without passing its new ones, the credit of that bypass
        through the trace one step before belongs to a learning signal and is added.
        """
        total = self._contract(signal, trace, x)
        past = self._past(signal) if trace.ref.delay == 0 else None
        if past is not None:
            total = total + self._contract(past, trace.prev, None if x is None else x.prev)
        return total

    def weighted(self, signal: Value, trace: Value) -> Value:
        """A trace, each entry times the learning signal of its unit and state: what :meth:`contract` sums, not summed.

        The credit of the bypass is added as there.
        """
        total, past = self.scale(signal, trace), self._past(signal)
        return total if past is None else total + self.scale(past, trace.prev)

    def _contract(self, signal: Value, trace: Value, x: Value | None) -> Value:
        if x is None:
            return self.op("contract", signal, trace)
        return self.op("pullback", x, self.op("back", signal, trace))

    def _past(self, signal: Value) -> Value | None:
        """The signal of the old states, along paths that avoid the new ones, where the model has such paths."""
        made_by = self._maker(signal)
        if signal.ref.delay or made_by is None or not OPS[made_by.op].of_old:
            return None
        has_bypass = any(self.header.group(signal.type.of).bypass)
        return self.op(OPS[made_by.op].of_old, *made_by.args) if has_bypass else None

    def map(self, fn: Callable, *values: Value) -> Value:
        """A jax function applied to the arrays of values of one type, entry by entry."""
        name = f"{fn.__module__}.{fn.__qualname__}" if "<" not in fn.__qualname__ else self._fresh("fn")
        self.functions[name] = fn
        return self.op("map", name, *values)

    def gradient(self, relation: Relation | Effect | Site, value: Value, within: str = "auto") -> None:
        """Declare the gradient of a relation's weight: the part that its trace carries.

        Parameters
        ----------
        relation : Relation, Effect or Site
        value : Value
            A weight gradient, from :meth:`contract` or :meth:`pullback`.
        within : {"auto", "one_step", "rest", "outside", "none"}
            Which credit from within the step is added. ``one_step``: all of it (for a value that holds earlier steps
            only). ``rest``: what does not pass through L f (for a value that holds this step's L f as well); nothing for
            a relation that is ``whole``.
            ``outside``: only that of elements that no trace covers (for a rule with a learning signal of its own).
            ``auto`` is ``rest`` for values made of the true signal, else ``outside``.
        """
        site = relation.name if isinstance(relation, Site) else relation.site
        if not KINDS[value.type.kind].gradient or value.type.of != site:
            raise ProgramError(
                f"the gradient of relation {relation.name} must be a gradient of its site {site}.",
                got=str(value.type),
            )
        if within not in ("auto", "one_step", "rest", "outside", "none"):
            raise ProgramError("within must be auto, one_step, rest, outside or none.", got=repr(within))
        if within == "auto":
            made = made_from(self._equations, [value.ref.name])
            signals = [e for e in self._equations if e.name in made and OPS[e.op].signal == "new"]
            true = any(KINDS[e.type.kind].owner == "group" for e in signals)
            within = "rest" if true else "outside"
        earlier = self._within.setdefault(site, within)
        if earlier != within:
            raise ProgramError(
                f"two relations of site {site} ask for different credit within the step: {earlier} and {within}."
            )
        self._gradients.append(Gradient(site, value.ref))

    def finish(self, exact: bool) -> TraceProgram:
        """The program, with the credit within the step added at every site.

        ``exact`` is what the rule claims where no credit ends at a cut; the program is exact if none does.
        """
        self._warn_of_forgotten()
        for site in self.header.sites:
            within = self._within.get(site.name, "one_step")
            relations = self.header.relations_of(site.name)
            if within == "none" or (within == "rest" and any(r.whole for r in relations)):
                continue
            credit = self.one_step(site)
            if within == "rest":
                for relation in relations:
                    credit = credit - self.back(self.signal(relation.group), self.immediate(relation))
            elif within == "outside":
                credit = self.op("outside", credit)
            self._gradients.append(Gradient(site.name, self.pullback(site, credit).ref))
        header = self._used_header()
        return TraceProgram(
            self.name,
            header,
            tuple(self._equations),
            tuple(self._gradients),
            exact and not header.cuts,
            self._window,
            self._end,
        )

    def _warn_of_forgotten(self) -> None:
        """Warn of relations for which the rule declared nothing, where it declared a gradient for others or wrote equations."""
        left = [r for r in self.header.relations if r.site not in self._within]
        if not left or self._window is not None or not self._equations:
            return
        told = "; ".join(
            f"{r.name}: {short_list(self.header.site(r.site).params)} in {r.group}" for r in left[:3]
        )
        more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            f"the rule {self.name} declares no gradient for {told}{more}: what these weights did at earlier steps is lost."
            " Declare it with p.gradient(relation, value).",
            EtcompileWarning,
            stacklevel=2,
        )

    def window(self, steps: int | None, end: str | None = None) -> None:
        """Backpropagate inside of windows of so many steps; None: the whole call is one window.

        Credit ends with a window; with ``end="synthetic"`` a prediction stands for what comes from beyond it.
        """
        if end not in (None, "synthetic"):
            raise OptionError("a window ends in nothing, or in a synthetic gradient.", got=f"end={end!r}")
        self._window = 0 if steps is None else positive_integer("window", steps, otherwise=", or None")
        self._end = end
        self.follows_all_paths = True

    @property
    def window_steps(self) -> int | None:
        """What :meth:`window` was given; 0 for whole calls, None where it was not called."""
        return self._window

    def restricted(self, sites: Collection[str]) -> ProgramBuilder:
        """The same program under construction, seen by a rule that is for some sites only."""
        view = copy.copy(self)
        view._only = frozenset(sites)
        return view

    def _used_header(self) -> Header:
        """The header with the layers, effects and cuts that count for the equations."""
        names = {a.name for e in self._equations for a in e.args if isinstance(a, Symbol)}
        names |= {e.type.of for e in self._equations}
        effects = tuple(e for e in self.header.effects if e.name in names)
        layers = tuple(x for x in self.header.layers if x.name in names | {e.layer for e in effects})
        cuts = self.header.cuts
        # A rule that wrote nothing since everything is cut loses it all the same: what counts is what it follows.
        if self.follows_all_paths and not any(OPS[e.op].derivative for e in self._equations):
            cuts = tuple(c for c in cuts if c.for_every_rule)
        return dataclasses.replace(self.header, cuts=cuts, layers=layers, effects=effects)

    # -- plumbing -----------------------------------------------------------------------------------------------

    def op(self, op: str, *args: Any) -> Value:
        """Append an equation (or find the same one) and return its value.

        Arguments are values, numbers, and groups, relations, sites, layers and effects or the names of such.
        """
        if op in OPS and OPS[op].vectors:
            args = tuple(self._arithmetic(a) if isinstance(a, Value) else a for a in args)
        plain = tuple(map(_plain, args))
        key = (op, plain)
        if key in self._memo:
            name = self._memo[key]
            return Value(self, Ref(name), self._types[name])
        kind = infer_type(self.header, op, plain, self._types)
        name = self._fresh(OPS[op].prefix)
        self._append(name, op, plain, kind)
        self._memo[key] = name
        return Value(self, Ref(name), kind)

    def _arithmetic(self, value: Value) -> Value:
        """A presynaptic value as one that can be added and scaled."""
        as_array = KINDS[value.type.kind].as_array
        if not as_array:
            return value
        found = self.op(as_array, Symbol(value.type.of))
        return found.prev if value.ref.delay else found

    def _append(self, name: str, op: str, args: tuple[Argument, ...], kind: Type) -> None:
        self._types[name] = kind
        self._equations.append(Equation(name, op, args, kind))

    def _fresh(self, prefix: str) -> str:
        number = self._counters.get(prefix, 0)
        self._counters[prefix] = number + 1
        return f"{prefix}{number}"

    def _maker(self, value: Value) -> Equation | None:
        return next((e for e in self._equations if e.name == value.ref.name), None)


def _plain(arg: Any) -> Argument:
    """An argument as programs hold it."""
    if isinstance(arg, Value):
        return arg.ref
    return Symbol(name_of(arg)) if isinstance(arg, (str, Group, Relation, Site, Layer, Effect)) else arg
