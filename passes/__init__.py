"""Learning rules and optimisations, one per file, written against the public pass API.

Every module of :mod:`etcompile.passes.rules` is imported, which registers its rule: a new rule is a new file there.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from etcompile.passes import rules
from etcompile.passes.optimise.collapse_constant_decay import CollapseConstantDecay
from etcompile.passes.optimise.dead_traces import DeadTraces
from etcompile.passes.optimise.exact_within import ExactWithin
from etcompile.passes.optimise.hoist_parameters import HoistParameters
from etcompile.passes.optimise.share_traces import ShareTraces

__all__ = [
    "OPTIMISATIONS",
    "CollapseConstantDecay",
    "DeadTraces",
    "ExactWithin",
    "HoistParameters",
    "ShareTraces",
]

for _module in iter_modules(rules.__path__, f"{rules.__name__}."):
    import_module(_module.name)

#: Run after every learning rule, in this order.
OPTIMISATIONS = (HoistParameters, CollapseConstantDecay, ShareTraces, DeadTraces)
