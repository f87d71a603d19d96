"""Cascading eligibility traces: a chain of stages remembers what happened a delay ago, and little of what happened since.

    dz_1/ds = -α z_1 + u,   dz_k/ds = -α z_k + z_{k-1},   α = (n - 1) / T,   u = f_t (x) x_t for the length of step t
    grad_t  = L_t z_n,t / c                           c: the sum of all that one step leaves in z_n, so that weights sum to 1

Over one step that is z_k,t = Σ_j e^{-α} z_{k-j,t-1} / j! + u_t ∫ e^{-α s} s^{k-1} / (k-1)! ds, exactly. Stage n peaks T steps
after the event, the sharper the more stages: for signals that arrive T steps late, which are given with the step at which they
arrive.

Memory O(n B I O) per weight of I x O at batch B, time O(n² B I O) per step.

Reference: T. Raharison Ralambomihanta, I. Anokhin, R. Pogodin, S. Ebrahimi Kahou, J. Cornford and B. Richards, "Learning from the
past with cascading eligibility traces", 2025, arXiv 2506.14598. Departure: f is the model's own, of any unit; its own
memory (D) is left out, as in the paper.
"""

from __future__ import annotations

import math

import numpy as np

from etcompile.pass_api import OptionError, ProgramBuilder, algorithm, positive_integer
from etcompile.passes.signals import learning_signal

__all__ = ["cascade"]


@algorithm(
    "cascade",
    preserves="changes",
    leaves_out="a chain of stages stands for the unit's own memory, and answers after a delay",
)
def cascade(
    p: ProgramBuilder, delay: float = 10.0, stages: int = 5, signal: str = "symmetric", seed: int = 0
) -> None:
    """Cascading traces: z_1 = filter of f (x) x, z_k = filter of z_{k-1}, peaking after a delay; grad = L z_n."""
    decays, gains = of_stages(delay, stages)
    for r in p.relations:
        now, before = p.outer(r), [p.carry("trace", r) for _ in gains]
        for k, z in enumerate(before):
            value = gains[k] * now
            for j in range(k + 1):
                value = decays[j] * before[k - j].prev + value
            p.define(z, value)
        p.gradient(r, p.contract(learning_signal(p, r.group, signal, seed), before[-1]))


def of_stages(delay: float, stages: int) -> tuple[list[float], list[float]]:
    """What a stage keeps of the one j before it, and what a step adds to each; the last one's answers sum to 1."""
    n = positive_integer("stages", stages)
    if n < 2 or not delay > 0:
        raise OptionError(
            "a cascade has two stages or more, and answers after a delay.",
            got=f"delay={delay!r}, stages={stages!r}",
            expected="delay > 0, stages >= 2",
        )
    alpha = (n - 1) / float(delay)
    decays = [math.exp(-alpha) / math.factorial(j) for j in range(n)]
    # ∫ from 0 to 1 of e^{-α s} s^k / k!, by parts
    gains = [(1.0 - math.exp(-alpha)) / alpha]
    for k in range(1, n):
        gains.append((gains[-1] - math.exp(-alpha) / math.factorial(k)) / alpha)
    keeps = sum(np.diag([decays[j]] * (n - j), -j) for j in range(n))
    total = np.linalg.solve(np.eye(n) - keeps, gains)[-1]
    return decays, [float(g / total) for g in gains]
