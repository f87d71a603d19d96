"""A rule put together from parts: a trace, its transition, a learning signal and a filter.

============  ==============================================================================================
part          choices
============  ==============================================================================================
trace         full        e_t = T e_{t-1} + f_t (x) x_t, of the weight's shape
              factored    x̄_t = a x̄_{t-1} + x_t and f̄_t = T f̄_{t-1} + f_t, e_t standing for f̄_t (x) x̄_t
              presynaptic x̄_t = T x̄_{t-1} + x_t, e_t standing for f_t (x) x̄_t; T is a number
              none        e_t = f_t (x) x_t
transition    local       D_t, the model's own
              a number    a constant leak in [0, 1)
signal        symmetric, random, adaptive, target, modulator (see :mod:`etcompile.passes.signals`)
filter        κ in [0, 1): ē_t = κ ē_{t-1} + e_t, or with ``normalize`` κ ē_{t-1} + (1 - κ) e_t
============  ==============================================================================================

    grad_t = L_t ē_t

Named rules are points in this space: ``d_rtrl`` is full, local, symmetric; ``ottt`` is presynaptic with a leak; ``rflo`` is full,
local, random. ``compose`` reaches the points without a name.
"""

from __future__ import annotations

from etcompile.pass_api import Header, OptionError, ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import SIGNALS, learning_signal

__all__ = ["compose"]

TRACES = ("full", "factored", "presynaptic", "none")


def what_is_left_out(
    header: Header,
    trace: str = "full",
    transition: str | float = "local",
    signal: str = "symmetric",
    filter: float = 0.0,
) -> str:
    """What a combination leaves out, part by part, in words."""
    said = []
    if trace != "full":
        said.append(f"trace={trace!r} in place of the full one")
    if transition != "local":
        said.append(f"a leak of {transition} in place of the unit's own transition")
    if signal != "symmetric":
        said.append(f"the learning signal is not the loss's ({signal})")
    if filter:
        said.append("the trace is low-pass filtered")
    return "; ".join(said)


def nothing_left_out(
    header: Header,
    trace: str = "full",
    transition: str | float = "local",
    signal: str = "symmetric",
    filter: float = 0.0,
) -> bool:
    """Whether the combination is D-RTRL."""
    return not what_is_left_out(header, trace, transition, signal, filter)


@algorithm("compose", exact=nothing_left_out, leaves_out=what_is_left_out)
def compose(
    p: ProgramBuilder,
    trace: str = "full",
    transition: str | float = "local",
    signal: str = "symmetric",
    filter: float = 0.0,
    normalize: bool = False,
    decay: float = 0.9,
    seed: int = 0,
    feedback_decay: float = 0.01,
) -> None:
    """A rule from parts: trace, transition, signal, filter.

    ``decay`` is that of x̄ in a factored trace; ``seed`` and ``feedback_decay`` belong to the signal.
    """
    _refuse_what_does_not_fit(trace, transition, signal, filter)
    for r in p.relations:
        T = p.transition(r.group) if transition == "local" else float(transition)
        L = learning_signal(p, r.group, signal, seed, feedback_decay)
        if trace in ("full", "none"):
            e = p.recur(decay=T, inject=p.outer(r)) if trace == "full" else p.outer(r)
            if filter:
                e = p.recur(decay=filter, inject=(1.0 - filter) * e if normalize else e)
            p.gradient(r, p.contract(L, e))
        else:
            factored = trace == "factored"
            x = p.recur(decay=decay if factored else float(transition), inject=p.presynaptic(r))
            f = p.recur(decay=T, inject=p.immediate(r)) if factored else p.immediate(r)
            p.gradient(r, p.contract(L, f, x))


def _refuse_what_does_not_fit(trace: str, transition: str | float, signal: str, filter: float) -> None:
    if trace not in TRACES:
        raise OptionError("there is no such trace.", got=repr(trace), expected=f"one of {', '.join(TRACES)}")
    if signal not in SIGNALS:
        raise OptionError(
            "there is no such learning signal.", got=repr(signal), expected=f"one of {', '.join(SIGNALS)}"
        )
    if transition != "local":
        if isinstance(transition, str):
            raise OptionError(
                "there is no such transition.",
                got=repr(transition),
                expected="'local' or a number",
                hint="a full transition is that of ostl, snap and rtrl, rules of their own.",
            )
        require_leak(transition)
    if trace == "presynaptic" and transition == "local":
        raise OptionError(
            "a presynaptic trace has no unit to take a local transition from: one presynaptic value serves all units.",
            got="trace='presynaptic', transition='local'",
            expected="transition=0.9, or another number",
        )
    if trace == "none" and transition != "local":
        raise OptionError(
            "without a trace there is nothing for a transition to act on.", got=f"transition={transition!r}"
        )
    if not 0.0 <= filter < 1.0:
        raise OptionError("filter must lie in [0, 1).", got=f"filter={filter!r}")
    if filter and trace in ("factored", "presynaptic"):
        raise OptionError(
            "the filtered sum of products is not the product of filtered factors.",
            got=f"trace={trace!r}, filter={filter!r}",
            expected="filter=0, or trace='full'",
        )
