"""pp_prop (ES-D-RTRL): D-RTRL's trace as the product of a presynaptic and a postsynaptic trace.

    x̄_t    = a x̄_{t-1} + x_t
    f̄_t    = a D_t f̄_{t-1} + (1 - a) f_t
    grad_t = x̄_t (x) (L_t f̄_t) / (1 - a^t)          (and what of this step's credit does not pass through L_t f_t)

The sum over the past of products is replaced by the product of two sums, each fading with ``a``. The divisor corrects
the bias of f̄ in the first steps; t counts steps since the last reset, whether a gradient was taken or not. At t = 1
the gradient is that of D-RTRL.

Memory O(B (I + O)) per weight; a trace of the weight's shape is never built. Time O(B I O) where a gradient is taken.

Reference: C. Wang et al., "Model-agnostic linear-memory online learning in spiking neural networks", 2024
(ES-D-RTRL). Departures: the bias correction counts steps, not calls; the two sides may have decays of their own.
"""

from __future__ import annotations

from etcompile.pass_api import OptionError, ProgramBuilder, algorithm, positive_integer

__all__ = ["pp_prop"]


@algorithm(
    "pp_prop",
    aliases=("es_d_rtrl",),
    leaves_out="the sum over the past of products of pre- and postsynaptic values is replaced by the product of their sums",
)
def pp_prop(
    p: ProgramBuilder, decay: float | tuple[float, float] | None = None, rank: int | None = None
) -> None:
    """pp_prop: x̄ = a x̄ + x; f̄ = a D f̄ + (1 - a) f; grad = x̄ (x) (L f̄).

    ``decay`` is a, or (a of x̄, a of f̄); 0.9 by default. An integer ``rank`` r instead means a = (r - 1) / (r + 1).
    """
    a_x, a_f = decays(decay, rank)
    for r in p.relations:
        x = p.recur(decay=a_x, inject=p.presynaptic(r))
        f = p.recur(decay=a_f * p.transition(r.group), inject=(1.0 - a_f) * p.immediate(r))
        weight = p.recur(decay=a_f, inject=p.number(1.0 - a_f))  # 1 - a^t
        p.gradient(r, p.contract(p.signal(r.group), f / weight, x))


def decays(decay: float | tuple[float, float] | None, rank: int | None) -> tuple[float, float]:
    """The decays of x̄ and f̄ from the options."""
    if rank is not None:
        if decay is not None:
            raise OptionError("give decay or rank, not both.", got=f"decay={decay!r}, rank={rank!r}")
        rank = positive_integer("rank", rank)
        decay = (rank - 1) / (rank + 1)
    if decay is None:
        decay = 0.9
    pair = tuple(decay) if isinstance(decay, (tuple, list)) else (decay, decay)
    if len(pair) != 2 or not all(isinstance(a, (int, float)) and 0.0 <= a < 1.0 for a in pair):
        raise OptionError(
            "decay must lie in [0, 1).", got=f"decay={decay!r}", expected="a number, or two: of x̄ and of f̄"
        )
    return float(pair[0]), float(pair[1])
