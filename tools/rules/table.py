"""The rules that are compared, with what their papers and files say about memory, work and exactness.

B examples at once, I inputs and O units of a weight, N hidden states of one example, P weights with a trace, T steps of
a sequence.
Equations are not written here: they come from the rules themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CLAIM", "ENTRIES", "EXPECTED", "LEFT_OUT", "REWARDED", "RULES", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One row: a rule with its options."""

    label: str
    algo: str
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: str = ""
    work: str = ""
    exact: str = "never"
    #: Only where the rule's own docstring does not have it.
    equation: str = ""
    #: Costly rules take the learning rate that this rule found, instead of a search of their own ...
    rate_of: str = ""
    #: ... and those whose gradient is another rule's are trained from fewer seeds, or from none.
    seeds: int | None = None
    #: What makes a change of the weights of a gradient, and by how much its learning rates are larger than Adam's.
    optimiser: str = "adam"
    faster: float = 1.0


RULES = (
    Entry(
        "bptt",
        "bptt",
        {},
        "T x activations",
        "1 backward pass",
        "whole sequences",
        "grad = d(sum of losses) / dw",
    ),
    Entry(
        "bptt, window 5",
        "bptt",
        {"window": 5},
        "5 x activations",
        "1 backward pass",
        "T up to 5",
        "grad = sum over windows of d(losses of the window) / dw",
    ),
    Entry("rtrl", "rtrl", {}, "B N P", "B N² P", "always", rate_of="bptt", seeds=1),
    Entry("ostl", "ostl", {}, "B N P in a layer", "B N² P", "one layer", rate_of="bptt", seeds=0),
    Entry(
        "snap-1",
        "snap",
        {"n": 1},
        "B K I, K at most O N",
        "B K I, and H",
        "diagonal recurrence",
        rate_of="d_rtrl",
    ),
    Entry("d_rtrl", "d_rtrl", {}, "B I O", "B I O", "models without a cut"),
    Entry("e_prop", "e_prop", {}, "2 B I O", "B I O", "never"),
    Entry(
        "e_prop, random",
        "e_prop",
        {"feedback": "random"},
        "2 B I O",
        "B I O",
        equation="as e_prop; L = err B, B fixed and random",
    ),
    Entry("pp_prop", "pp_prop", {}, "B (I + O)", "B I O"),
    Entry("otpe", "otpe", {}, "B I O", "B I O", "one constant leak"),
    Entry("otpe, approximate", "otpe", {"approximate": True}, "B (I + O)", "B I O"),
    Entry("ottt", "ottt", {}, "B I", "B I O", "one constant leak"),
    Entry("osttp", "osttp", {}, "B I O", "B I O"),
    Entry("rflo", "rflo", {}, "B I O", "B I O"),
    Entry("superspike", "superspike", {}, "B I O + 2 B I", "B I O"),
    Entry("s_tllr", "s_tllr", {}, "B (I + O)", "B I O", "T = 1"),
    Entry("etlp", "etlp", {}, "B I", "B I O"),
    Entry("decolle", "decolle", {}, "B I O", "B I O"),
    Entry("cascade", "cascade", {}, "n B I O", "n² B I O"),
    Entry("sltt", "sltt", {}, "0", "B I O", "T = 1"),
    Entry("uoro", "uoro", {}, "B N + P", "a few steps", "on average over seeds"),
    Entry("kf_rtrl", "kf_rtrl", {}, "B N O + B I", "B N² O", "on average over seeds", rate_of="bptt"),
    Entry(
        "kf_rtrl, rank 4",
        "kf_rtrl",
        {"rank": 4},
        "r B (N O + I)",
        "r B N² O",
        "on average over seeds",
        "J ≈ Σ A (x) u, r pairs of the least variance; grad as kf_rtrl",
        rate_of="bptt",
    ),
    Entry(
        "rank_rtrl, rank 2",
        "rank_rtrl",
        {"rank": 2},
        "r B O (N + I)",
        "r B N² O",
        "a high rank",
        rate_of="bptt",
    ),
    Entry("kernl", "kernl", {}, "B I O + N² + 4 B N", "B I O + B N²"),
    Entry("dodge", "dodge", {}, "B N + P", "two steps for each weight", "on average over seeds"),
    Entry("subset_rtrl", "subset_rtrl", {}, "B N P", "B N² P", "k = N", rate_of="bptt"),
    Entry("one step", "compose", {"trace": "none"}, "0", "B I O", "T = 1", "grad = L (f (x) x)"),
)

#: The immediate derivative beside rules that follow the past, each with optimisers that normalise and with one that does not.
CLAIM = (
    *(e for e in RULES if e.label in ("bptt", "d_rtrl", "sltt")),
    Entry("sltt, RMSprop", "sltt", optimiser="rmsprop"),
    Entry("sltt, SGD", "sltt", optimiser="sgd", faster=30.0),
    Entry("d_rtrl, SGD", "d_rtrl", optimiser="sgd", faster=30.0),
    Entry("bptt, SGD", "bptt", optimiser="sgd", faster=30.0),
)
#: All that is measured.
ENTRIES = (*RULES, *(e for e in CLAIM if e not in RULES))

#: In the table of rules alone: tasks with labels have no reward for them.
REWARDED = (
    Entry("three_factor", "three_factor", {}, "B I O", "B I O"),
    Entry("reward_e_prop", "reward_e_prop", {}, "3 B I O + B P", "B I O; B times the readout's gradient"),
)

#: Rules that are not compared, and why.
LEFT_OUT = {
    "three_factor": "its third factor is a reward given from outside; with labels there is none, and a modulator made of "
    "the error by a random matrix is `rflo`",
    "reward_e_prop": "as `three_factor`",
    "dni": "it is backpropagation in windows whose ends a second network predicts (`etcompile.SyntheticGradient`); sequences "
    "given whole leave it nothing to predict",
}

#: From best to worst, as the field has it; rules in one step of the ladder are not told apart.
EXPECTED = (("rtrl", "ostl", "bptt"), ("snap-1", "d_rtrl"), ("pp_prop",), ("ottt",), ("chance",))
