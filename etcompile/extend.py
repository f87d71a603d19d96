"""Rows from outside for the compiler's own tables.

Learning rules, optimisations and schedules are values that one hands to :func:`etcompile.compile`. An op, a kind of value, or
what a primitive does to positions, is a row of a table, for all programs of the process: add it once, where your module is
imported. A name that is taken is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcompile.analysis.index_rules import register_index_rule
from etcompile.ir.kinds import KINDS, register_kind, type_of
from etcompile.ir.ops import OPS, Op
from etcompile.ir.ops import register_op as _add_row
from etcompile.ir.types import Type
from etcompile.lowering.evaluate import EVALUATE, register_evaluator

__all__ = [
    "EVALUATE",
    "KINDS",
    "OPS",
    "Op",
    "Type",
    "register_index_rule",
    "register_kind",
    "register_op",
    "type_of",
]


def register_op(name: str, rule: str | Callable, text: str, doc: str, evaluate: Callable, **row: Any) -> None:
    """Add an op that rules write as ``p.op(name, *args)``.

    Parameters
    ----------
    name : str
    rule : str or callable
        What it takes and gives, as the table of ops in ``docs/architecture.md`` says it: ``"state r.group, trace r -> gradient
        r.site"`` (:mod:`etcompile.ir.signatures`). Where a line does not say it, ``rule(header, args) -> Type`` of the result,
        from the types of values, the symbols and the numbers among its arguments; raises :class:`etcompile.ProgramError` for
        arguments that it does not take. See :func:`type_of`.
    text, doc : str
        How it is written, with arguments for an example; what it means.
    evaluate : callable
        ``evaluate(context, equation, args) -> value`` in jax. Values of a group or relation are tuples with an array for each
        hidden state, None for zeros; others one array.
    **row
        The other fields of :class:`Op`: in what it is linear, where its result is zero, whether it needs the loss.

    Examples
    --------
    >>> import jax
    >>> from etcompile import extend
    >>> extend.register_op(
    ...     "halve",
    ...     "T -> T",
    ...     "halve(a)",
    ...     "half of a value",
    ...     evaluate=lambda context, equation, args: jax.tree.map(lambda v: v / 2, args[0]),
    ...     linear=(0,),
    ...     terms=(0.5,),
    ...     by_row=True,
    ... )  # doctest: +SKIP
    """
    signature, own = (rule, None) if isinstance(rule, str) else ("", rule)
    _add_row(name, signature, text, doc, own, **row)
    register_evaluator(name, evaluate)
