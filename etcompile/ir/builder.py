"""Building programs: the interface in which learning rules are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcompile.errors import AlgorithmError, ProgramError
from etcompile.ir.header import Group, Header, Relation, Site
from etcompile.ir.ops import infer_type
from etcompile.ir.program import Argument, Equation, Gradient, Ref, Symbol, TraceProgram
from etcompile.ir.types import Type

__all__ = ["ProgramBuilder", "Value"]


class Value:
    """A value of the program at one step; ``+ - * @`` and :attr:`prev` build new ones."""

    def __init__(self, builder: ProgramBuilder, ref: Ref, kind: Type) -> None:
        self._builder, self.ref, self.type = builder, ref, kind

    @property
    def prev(self) -> Value:
        """The value one step before; zero at the start."""
        if self.ref.delay:
            raise ProgramError(
                f"{self.ref} already lies one step back.", hint="carry it one step more with p.recur."
            )
        return Value(self._builder, Ref(self.ref.name, -1), self.type)

    def __add__(self, other: Value) -> Value:
        return self._builder.op("add", self, other)

    def __sub__(self, other: Value) -> Value:
        return self._builder.op("sub", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self._builder.op("mul", self, other)

    def __rmul__(self, other: float) -> Value:
        return self._builder.op("mul", float(other), self)

    def __matmul__(self, other: Value) -> Value:
        return self._builder.op("matmul", self, other)

    def __repr__(self) -> str:
        return f"{self.ref} : {self.type}"


_PREFIX = {
    "transition": "D", "immediate": "f", "presynaptic": "x", "signal": "L", "bypass": "K", "one_step": "q", "outer": "o",
    "contract": "G", "pullback": "P",
}  # fmt: skip


class ProgramBuilder:
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
        self._within: dict[str, str] = {}
        self._counters: dict[str, int] = {}

    @property
    def relations(self) -> tuple[Relation, ...]:
        return self.header.relations

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.header.groups

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.header.sites

    # -- values of the model ------------------------------------------------------------------------------------

    def transition(self, group: Group | str) -> Value:
        """D_t = dh_t/dh_{t-1} of a group, ``[states, states, positions]``."""
        return self._named("transition", group)

    def immediate(self, relation: Relation | str) -> Value:
        """f_t = dh_t/dy_t of a relation, ``[states, window of y]``."""
        return self._named("immediate", relation)

    def presynaptic(self, site: Relation | Site | str) -> Value:
        """x_t: what the operation at the site reads beside the weight."""
        return self._named("presynaptic", site.site if isinstance(site, Relation) else site)

    def signal(self, group: Group | str) -> Value:
        """L_t = dloss_t/dh_t with the group's new states taken as independent, ``[states, positions]``."""
        return self._named("signal", group)

    def bypass(self, group: Group | str) -> Value:
        """dloss_t/dh_{t-1} along paths that avoid the group's new states, ``[states, positions]``."""
        return self._named("bypass", group)

    def one_step(self, site: Relation | Site | str) -> Value:
        """dloss_t/dy_t by ordinary autodiff with h_{t-1} held constant."""
        return self._named("one_step", site.site if isinstance(site, Relation) else site)

    # -- equations ----------------------------------------------------------------------------------------------

    def outer(self, relation: Relation | Value, x: Value | None = None) -> Value:
        """F (x) x, what this step adds to a trace; of a relation, or of a Jacobian and a presynaptic value."""
        if isinstance(relation, Value):
            if x is None:
                raise ProgramError("outer of a Jacobian needs the presynaptic value as its second argument.")
            return self.op("outer", relation, x)
        return self.op("outer", self.immediate(relation), x or self.presynaptic(relation))

    def recur(self, decay: Value | float, inject: Value, name: str | None = None) -> Value:
        """V with v_t = decay v_{t-1} + inject, zero at the start.

        ``decay`` is a transition (a matrix per position), a number, or a value of the same type as ``inject``.
        """
        name = name or self._fresh("e" if inject.type.kind == "trace" else "v")
        old = Value(self, Ref(name, -1), inject.type)
        self._types[name] = inject.type
        matrix = isinstance(decay, Value) and decay.type.kind == "transition"
        faded = self.op("matmul", decay, old) if matrix else self.op("mul", decay, old)
        self._append(name, "add", (faded.ref, inject.ref), inject.type)
        return Value(self, Ref(name), inject.type)

    def contract(self, signal: Value, trace: Value) -> Value:
        """Weight gradient of a learning signal and a trace.

        Where the group's old states also reach a result without passing its new ones, and the signal is the true one,
        the credit of that bypass through the trace one step before belongs to it and is added.
        """
        direct = self.op("contract", signal, trace)
        made_by = self._maker(signal)
        true_signal = made_by is not None and made_by.op == "signal"
        if true_signal and trace.ref.delay == 0 and any(self.header.group(signal.type.of).bypass):
            return direct + self.op("contract", self.bypass(signal.type.of), trace.prev)
        return direct

    def back(self, signal: Value, jacobian: Value) -> Value:
        """L f: the credit of y that flows through the group."""
        return self.op("back", signal, jacobian)

    def pullback(self, site: Relation | Site | Value, credit: Value) -> Value:
        """Weight gradient of a credit of y: x (x) credit for a matrix."""
        x = site if isinstance(site, Value) else self.presynaptic(site)
        return self.op("pullback", x, credit)

    def map(self, fn: Callable, *values: Value) -> Value:
        """A jax function applied to the arrays of values of one type, entry by entry."""
        name = f"{fn.__module__}.{fn.__qualname__}" if "<" not in fn.__qualname__ else self._fresh("fn")
        self.functions[name] = fn
        return self.op("map", Symbol(name), *values)

    def gradient(self, relation: Relation, value: Value, within: str = "auto") -> None:
        """Declare the gradient of a relation's weight: the part that its trace carries.

        Parameters
        ----------
        relation : Relation
        value : Value
            A weight gradient, from :meth:`contract` or :meth:`pullback`.
        within : {"auto", "one_step", "rest", "outside", "none"}
            Which credit from within the step is added. ``one_step``: all of it (for a value that holds earlier steps
            only). ``rest``: what does not pass through L f (for a value that holds this step's L f as well).
            ``outside``: only that of elements that no trace covers (for a rule with a learning signal of its own).
            ``auto`` is ``rest`` for values made of the true signal, else ``outside``.
        """
        if (value.type.kind, value.type.of) != ("gradient", relation.site):
            raise ProgramError(
                f"the gradient of relation {relation.name} must be a gradient of its site {relation.site}.",
                got=str(value.type),
            )
        if within not in ("auto", "one_step", "rest", "outside", "none"):
            raise ProgramError("within must be auto, one_step, rest, outside or none.", got=repr(within))
        if within == "auto":
            within = "rest" if self._uses_op(value.ref.name, "signal") else "outside"
        earlier = self._within.setdefault(relation.site, within)
        if earlier != within:
            raise ProgramError(
                f"two relations of site {relation.site} ask for different credit within the step: {earlier} and {within}."
            )
        self._gradients.append(Gradient(relation.site, value.ref))

    def finish(self, exact: bool) -> TraceProgram:
        """The program, with the credit within the step added at every site."""
        for site in self.sites:
            within = self._within.get(site.name, "one_step")
            if within == "none":
                continue
            credit = self.one_step(site)
            if within == "rest":
                for relation in self.header.relations_of(site.name):
                    credit = credit - self.back(self.signal(relation.group), self.immediate(relation))
            elif within == "outside":
                credit = self.op("outside", credit)
            self._gradients.append(Gradient(site.name, self.pullback(site, credit).ref))
        return TraceProgram(self.name, self.header, tuple(self._equations), tuple(self._gradients), exact)

    # -- plumbing -----------------------------------------------------------------------------------------------

    def op(self, op: str, *args: Any) -> Value:
        """Append an equation (or find the same one) and return its value."""
        plain: tuple[Argument, ...] = tuple(a.ref if isinstance(a, Value) else a for a in args)
        key = (op, plain)
        if key in self._memo:
            name = self._memo[key]
            return Value(self, Ref(name), self._types[name])
        kind = infer_type(self.header, op, plain, self._types)
        name = self._fresh(_PREFIX.get(op, "v"))
        self._append(name, op, plain, kind)
        self._memo[key] = name
        return Value(self, Ref(name), kind)

    def _append(self, name: str, op: str, args: tuple[Argument, ...], kind: Type) -> None:
        self._types[name] = kind
        self._equations.append(Equation(name, op, args, kind))

    def _named(self, op: str, item: Any) -> Value:
        return self.op(op, Symbol(item if isinstance(item, str) else item.name))

    def _fresh(self, prefix: str) -> str:
        number = self._counters.get(prefix, 0)
        self._counters[prefix] = number + 1
        return f"{prefix}{number}"

    def _maker(self, value: Value) -> Equation | None:
        return next((e for e in self._equations if e.name == value.ref.name), None)

    def _uses_op(self, name: str, op: str) -> bool:
        seen, waiting = set(), [name]
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            for e in self._equations:
                if e.name == current:
                    if e.op == op:
                        return True
                    waiting += [ref.name for ref in e.refs]
        return False


def require(condition: bool, message: str, hint: str) -> None:
    """Refuse an option of a rule."""
    if not condition:
        raise AlgorithmError(message, hint=hint)
