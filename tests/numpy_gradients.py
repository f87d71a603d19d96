"""Reverse-mode derivatives by numpy, one operation at a time: for oracles, whose functions run once.

What JAX spends on the gradient of a function that runs once is nearly all tracing: forwards, its tangents, and what is
transposed. Here the function is traced forwards alone. On the way back each operation asks JAX for its own pullback, which is
traced once for all operations of its kind and shapes. Calls and loops are gone through operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from numpy_evaluation import as_array, called, chosen_branch, evaluate, run_equation

from etcompile.frontend.jaxpr import scan_signature

__all__ = ["grad", "vjp"]

#: An equation, the values that it read, by which of them it is differentiated, and the runs of the program inside of it.
_Kept = tuple[Any, list[Any], tuple[bool, ...], list["_Run"]]
_Params = dict[str, Any]


def vjp(fn: Callable, *arguments: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """As `jax.vjp`: the results, the function from cotangents of them to those of the arguments, and what is beside."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    with np.errstate(all="ignore"):
        run = _Run(closed, [as_array(v) for v in leaves], [_moves(jax.numpy.asarray(v)) for v in leaves])
    results = jax.tree.unflatten(jax.tree.structure(shapes), list(map(jax.numpy.asarray, run.results)))
    out, *aux = results if has_aux else (results,)
    rest = len(jax.tree.leaves(aux))

    def pull(cotangents: Any) -> Any:
        given: list[Any] = [as_array(c) for c in jax.tree.leaves(cotangents)]
        with np.errstate(all="ignore"):
            found = run.pulled([*given, *[None] * rest])
        return jax.tree.unflatten(
            tree,
            [jax.numpy.asarray(_zeros(v) if c is None else c) for c, v in zip(found, leaves, strict=True)],
        )

    return out, pull, *aux


def grad(fn: Callable, *arguments: Any, has_aux: bool = False) -> Any:
    """The gradient of a real number by the first argument; with ``has_aux`` a pair of it and what is beside."""
    value, pull, *aux = vjp(lambda first: fn(first, *arguments[1:]), arguments[0], has_aux=has_aux)
    (found,) = pull(np.ones((), value.dtype))
    return (found, *aux) if has_aux else found


class _Run:
    """A program that ran, with all that is needed on the way back: `live` is what depends on what gradients are asked of."""

    def __init__(self, closed: Any, arguments: Sequence[Any], live: Sequence[bool]) -> None:
        self.jaxpr = closed.jaxpr
        self.kept: list[_Kept] = []
        known = dict(zip(self.jaxpr.constvars, map(as_array, closed.consts), strict=True))
        known.update(zip(self.jaxpr.invars, arguments, strict=True))
        alive = {v for v, depends in zip(self.jaxpr.invars, live, strict=True) if depends}

        def read(atom: Any) -> Any:
            return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else known[atom]

        for eqn in self.jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            moving = tuple(not isinstance(v, Literal) and v in alive for v in eqn.invars)
            results, moved, inside = _ran(eqn, values, moving)
            known.update(zip(eqn.outvars, results, strict=True))
            alive.update(
                v for v, depends in zip(eqn.outvars, moved, strict=True) if depends and _moves(v.aval)
            )
            if any(moving):
                self.kept.append((eqn, values, moving, inside))
        self.results = [read(v) for v in self.jaxpr.outvars]
        self.live = [not isinstance(v, Literal) and v in alive for v in self.jaxpr.outvars]

    def pulled(self, cotangents: Sequence[Any]) -> list[Any]:
        """Cotangents of the arguments; None stands for zeros."""
        sums: dict[Any, Any] = {}

        def add(atom: Any, value: Any) -> None:
            if value is not None and not isinstance(atom, Literal):
                sums[atom] = sums[atom] + value if atom in sums else value

        for atom, value in zip(self.jaxpr.outvars, cotangents, strict=True):
            add(atom, value)
        for eqn, values, moving, inside in reversed(self.kept):
            arriving = [sums.pop(v, None) for v in eqn.outvars]
            if any(c is not None for c in arriving):
                found = _pulled(eqn, values, moving, inside, arriving)
                for atom, value, moves in zip(eqn.invars, found, moving, strict=True):
                    if moves:
                        add(atom, value)
        return [sums.get(v) for v in self.jaxpr.invars]


def _ran(
    eqn: Any, values: list[Any], moving: tuple[bool, ...]
) -> tuple[Sequence[Any], Sequence[bool], list[_Run]]:
    """Results of an equation, which of them are alive, and the runs inside of it that are gone through on the way back."""
    name = eqn.primitive.name
    if not any(moving) or name == "stop_gradient":
        return run_equation(eqn, values), [False] * len(eqn.outvars), []
    if name == "scan":
        return _scanned(eqn.params, values, moving)
    if name == "cond":
        run = _Run(chosen_branch(eqn.params, values), values[1:], moving[1:])
    elif name in _PLAIN_CALLS:
        inner = called(eqn)
        closed = inner if hasattr(inner, "consts") else jax.extend.core.ClosedJaxpr(inner, ())
        run = _Run(closed, values, moving)
    else:
        return run_equation(eqn, values), [True] * len(eqn.outvars), []
    return run.results, run.live, [run]


#: The other calls have a derivative of their own.
_PLAIN_CALLS = frozenset(["pjit", "jit", "closed_call", "core_call", "remat", "checkpoint", "remat2"])


def _pulled(
    eqn: Any, values: list[Any], moving: tuple[bool, ...], inside: list[_Run], cotangents: list[Any]
) -> Sequence[Any]:
    if eqn.primitive.name == "scan":
        return _scan_pulled(eqn.params, values, inside, cotangents)
    if inside:
        (run,) = inside
        found = run.pulled(cotangents)
        return [*[None] * (len(values) - len(found)), *found]
    pullback = _pullback(eqn, moving)
    given = [
        _zeros(v.aval) if c is None else c
        for v, c in zip(eqn.outvars, cotangents, strict=True)
        if _moves(v.aval)
    ]
    found = iter(evaluate(pullback.jaxpr, pullback.consts, [*values, *given]))
    return [next(found) if moves else None for moves in moving]


# -- pullbacks of operations --------------------------------------------------------------------------------------------

#: Of equations by what they are, and, where that cannot be compared, of each equation itself.
_BY_KIND: dict[Any, Any] = {}
_BY_EQUATION: dict[Any, tuple[Any, Any]] = {}
_MOST = 4096


def _pullback(eqn: Any, moving: tuple[bool, ...]) -> Any:
    """The program from what an equation read, and cotangents of its results, to those of the operands that move."""
    if (id(eqn), moving) in _BY_EQUATION:
        return _BY_EQUATION[id(eqn), moving][1]
    for table in (_BY_KIND, _BY_EQUATION):
        if len(table) > _MOST:
            table.clear()
    avals = tuple((v.aval.shape, v.aval.dtype) for v in eqn.invars)
    try:
        key = eqn.primitive, tuple(sorted(eqn.params.items(), key=lambda item: item[0])), avals, moving
        if key not in _BY_KIND:
            _BY_KIND[key] = _traced_pullback(eqn, moving)
        found = _BY_KIND[key]
    except TypeError:  # a parameter without a hash
        found = _traced_pullback(eqn, moving)
    _BY_EQUATION[id(eqn), moving] = eqn, found
    return found


def _traced_pullback(eqn: Any, moving: tuple[bool, ...]) -> Any:
    places = [k for k, moves in enumerate(moving) if moves]
    bound = eqn.primitive.get_bind_params(eqn.params)

    def pulled(*arguments: Any) -> Sequence[Any]:
        values, cotangents = arguments[: len(eqn.invars)], arguments[len(eqn.invars) :]

        def run(*moved: Any) -> list[Any]:
            full = list(values)
            for k, v in zip(places, moved, strict=True):
                full[k] = v
            found = eqn.primitive.bind(*full, **bound)
            found = found if eqn.primitive.multiple_results else [found]
            return [f for f, v in zip(found, eqn.outvars, strict=True) if _moves(v.aval)]

        return jax.vjp(run, *[values[k] for k in places])[1](list(cotangents))

    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a in (*(v.aval for v in eqn.invars), *(v.aval for v in eqn.outvars if _moves(v.aval)))
    ]
    return jax.make_jaxpr(pulled)(*shapes)


def _moves(aval: Any) -> bool:
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)


def _zeros(like: Any) -> np.ndarray:
    return np.zeros(np.shape(like), getattr(like, "dtype", None) or np.result_type(like))


# -- loops --------------------------------------------------------------------------------------------------------------


def _scanned(
    params: _Params, values: list[Any], moving: tuple[bool, ...]
) -> tuple[list[Any], list[bool], list[_Run]]:
    """Runs stand in the order of time, backwards or not."""
    fixed, count = scan_signature(params)
    order = range(params["length"])
    order = order[::-1] if params["reverse"] else order
    carry, live, runs = values[fixed : fixed + count], moving[fixed : fixed + count], {}
    for t in order:
        read = [*values[:fixed], *carry, *(as_array(v[t]) for v in values[fixed + count :])]
        runs[t] = _Run(params["jaxpr"], read, [*moving[:fixed], *live, *moving[fixed + count :]])
        carry, live = runs[t].results[:count], runs[t].live[:count]
    inside = [runs[t] for t in range(params["length"])]
    if not inside:
        empty = [np.zeros((0, *a.shape), a.dtype) for a in params["jaxpr"].out_avals[count:]]
        return [*carry, *empty], [*live, *[False] * len(empty)], []
    rows = zip(*(run.results[count:] for run in inside), strict=True)
    alive = zip(*(run.live[count:] for run in inside), strict=True)
    return [*carry, *map(_stacked, rows)], [*live, *map(any, alive)], inside


def _stacked(rows: Sequence[Any]) -> Any:
    return np.stack(rows) if isinstance(rows[0], np.ndarray) else jax.numpy.stack(rows)


def _scan_pulled(params: _Params, values: list[Any], runs: list[_Run], cotangents: list[Any]) -> list[Any]:
    fixed, count = scan_signature(params)
    carry, rows = list(cotangents[:count]), cotangents[count:]
    constants: list[Any] = [None] * fixed
    each: dict[int, list[Any]] = {}
    steps = range(len(runs))
    for t in steps if params["reverse"] else steps[::-1]:
        found = runs[t].pulled([*carry, *(None if c is None else c[t] for c in rows)])
        constants = [_sum(a, b) for a, b in zip(constants, found[:fixed], strict=True)]
        carry, each[t] = found[fixed : fixed + count], found[fixed + count :]
    per_step = [
        None
        if all(each[t][k] is None for t in steps)
        else np.stack([_zeros(v[t]) if each[t][k] is None else each[t][k] for t in steps])
        for k, v in enumerate(values[fixed + count :])
    ]
    return [*constants, *carry, *per_step]


def _sum(first: Any, second: Any) -> Any:
    return second if first is None else first if second is None else first + second
