"""The printable header of a program from an analysis."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.relations import Relation
from etcompile.analysis.within_step import WithinStep
from etcompile.frontend.jaxpr import short_dtype
from etcompile.ir import header as ir

__all__ = ["group_dtype", "program_header"]


def program_header(analysis: Analysis, windows: bool = False) -> ir.Header:
    """Groups, sites, relations and cuts as plain records.

    With ``windows`` every old state counts as one that results read directly: those of a window do, at its later steps. No
    relation is whole then: later steps of the window read what the local Jacobians leave out.
    """
    within = WithinStep(analysis)
    groups = tuple(_group(analysis, g, within) for g in analysis.groups)
    if windows:
        groups = tuple(dataclasses.replace(g, bypass=(True,) * len(g.states)) for g in groups)
    return ir.Header(
        analysis.model.name,
        groups,
        tuple(s.record for s in analysis.sites),
        tuple(
            _relation(analysis, r, not windows and within.carries_whole_credit(r)) for r in analysis.relations
        ),
        analysis.cuts,
        tuple(layer.record for layer in analysis.layers),
        analysis.effects,
    )


def _relation(analysis: Analysis, relation: Relation, whole: bool) -> ir.Relation:
    found = analysis.constants.get(relation.name)
    constant = () if found is None else found.classes
    return ir.Relation(
        relation.name, relation.site, relation.group, relation.span, relation.rows, constant,
        whole=whole, fan=relation.fan,
    )  # fmt: skip


def group_dtype(analysis: Analysis, group: HiddenGroup) -> Any:
    return jnp.result_type(*[analysis.model.states[s].aval.dtype for s in group.states])


def _group(analysis: Analysis, group: HiddenGroup, within: WithinStep) -> ir.Group:
    states = tuple(
        (analysis.state_name(s), short_dtype(analysis.model.states[s].aval.dtype)) for s in group.states
    )
    dtype = short_dtype(group_dtype(analysis, group))
    return ir.Group(group.name, states, group.shape, dtype, group.pattern, within.bypass(group))
