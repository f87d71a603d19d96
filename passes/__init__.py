"""Learning rules and optimisations, one per file, written against the public pass API."""

from __future__ import annotations

from etcompile.passes import (  # noqa: F401  (importing a rule registers it)
    bptt,
    compose,
    d_rtrl,
    dni,
    e_prop,
    kf_rtrl,
    ostl,
    osttp,
    otpe,
    ottt,
    pp_prop,
    rflo,
    rtrl,
    snap,
    three_factor,
    uoro,
)
from etcompile.passes.collapse_constant_decay import CollapseConstantDecay
from etcompile.passes.dead_traces import DeadTraces
from etcompile.passes.exact_within import ExactWithin
from etcompile.passes.hoist_parameters import HoistParameters
from etcompile.passes.share_traces import ShareTraces

__all__ = [
    "OPTIMISATIONS",
    "CollapseConstantDecay",
    "DeadTraces",
    "ExactWithin",
    "HoistParameters",
    "ShareTraces",
]

#: Run after every learning rule, in this order.
OPTIMISATIONS = (HoistParameters, CollapseConstantDecay, ShareTraces, DeadTraces)
