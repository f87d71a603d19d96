"""What libraries compile a program for at every shape, or at every call, and could do without: much of all that tests compile."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import brainstate.transform._error_if as checks
import jax
import numpy as np
from jax._src import pjit
from jax._src.core import stage_p
from jax._src.interpreters import mlir
from jax._src.sharding_impls import UnspecifiedValue
from jax.extend.core import Literal
from numpy_evaluation import as_array, by_table, called

__all__ = ["without_programs"]

_jit_error_if: Callable = checks.jit_error_if
_compiled: Callable = pjit._pjit_call_impl_python
_new_context: Callable = mlir.make_ir_context


def without_programs() -> None:
    """Put numpy's arrays onto the device as they are, check at once what brainstate draws where nothing is traced, and move
    numbers by numpy where JAX would compile a program that does no more.
    """
    stage_p.def_impl(_put)
    checks.jit_error_if = _check_at_once
    pjit._pjit_call_impl_python = _moved
    if not hasattr(mlir, "_create_ir_context"):  # later versions keep contexts themselves
        mlir.make_ir_context = _context
    # Without a folder for its programs there is no cache, and JAX would hash every program for it.
    jax.config.update("jax_enable_compilation_cache", False)


def _put(value: Any) -> jax.Array:
    return (
        value
        if isinstance(value, jax.Array)
        else jax.device_put(np.array(value) if np.ndim(value) else value)
    )


def _check_at_once(wrong: Any, *error: Any, **named: Any) -> None:
    if isinstance(wrong, jax.core.Tracer) or np.any(wrong):
        _jit_error_if(wrong, *error, **named)


# -- contexts of MLIR -------------------------------------------------------------------------------------------------------

_OWN = threading.local()
#: Programs for which one context serves: making one takes as long as compiling a small program.
_PROGRAMS = 30


def _context() -> Any:
    if mlir.ir.Context.current is not None:  # something is being written in the one that is kept
        return _new_context()
    context, uses = getattr(_OWN, "context", (None, _PROGRAMS))
    if uses >= _PROGRAMS:
        context, uses = _new_context(), 0
    _OWN.context = context, uses + 1
    return context


# -- programs that only move numbers ----------------------------------------------------------------------------------------

#: Operations whose results leave no choice: numpy's are XLA's to the last bit.
_EXACT = frozenset([
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "concatenate", "slice",
    "dynamic_slice", "dynamic_update_slice", "gather", "scatter", "pad", "select_n", "iota", "stack", "unstack", "split",
    "copy", "copy_p", "convert_element_type", "add", "sub", "mul", "div", "neg", "abs", "add_any", "eq", "ne",
    "lt", "le", "gt", "ge", "and", "or", "xor", "not", "is_finite", "max", "min", "floor", "ceil", "sqrt",
    "reduce_max", "reduce_min", "reduce_or", "reduce_and", "real", "imag",
])  # fmt: skip
#: Of these the operations that round.
_ROUNDED = frozenset(["add", "sub", "mul", "div", "add_any", "sqrt"])
#: After so many calls a program is worth its compilation.
_OFTEN = 30
#: How often each program of JAX's own was run by numpy.
_CALLS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _moved(*values: Any, jaxpr: Any, **params: Any) -> tuple[Any, ...]:
    """What JAX has of a jitted function that is called: results, its executable, and what belongs to that."""
    if jaxpr not in _CALLS:
        _CALLS[jaxpr] = 0 if _only_moves(jaxpr, **params) else _OFTEN
    if _CALLS[jaxpr] < _OFTEN and all(map(_is_plain, values)):
        _CALLS[jaxpr] += 1
        if (found := _by_numpy(jaxpr, list(values))) is not None:
            # Copied, since numpy's views lie in arrays that may be given away.
            return [jax.device_put(np.array(v)) for v in found], None, None, ()
    return _compiled(*values, jaxpr=jaxpr, **params)


def _by_numpy(jaxpr: Any, values: list[Any]) -> list[np.ndarray] | None:
    """None where numpy has no word for an operation."""
    plain = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip(plain.constvars, map(as_array, getattr(jaxpr, "consts", ())), strict=True))
    known.update(
        (v, np.asarray(as_array(a), v.aval.dtype)) for v, a in zip(plain.invars, values, strict=True)
    )

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else known[atom]

    for eqn in plain.eqns:
        given, inner = [read(v) for v in eqn.invars], called(eqn)
        with np.errstate(all="ignore"):
            found = by_table(eqn, given) if inner is None else _by_numpy(inner, given)
        if found is None:
            return None
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in plain.outvars]


def _only_moves(jaxpr: Any, **params: Any) -> bool:
    """Whether it is a function of JAX's own, of exact operations, that runs where its arguments are."""
    plain = getattr(jaxpr, "jaxpr", jaxpr)
    return (
        "ETCOMPILE_BY_XLA" not in os.environ
        and "/jax/_src/" in plain.debug_info.func_src_info.replace(os.sep, "/")
        and params["ctx_mesh"].empty
        and not params["compiler_options_kvs"]
        and not any(params["donated_invars"])
        and all(isinstance(s, UnspecifiedValue) for s in (*params["in_shardings"], *params["out_shardings"]))
        and not any(v.aval.weak_type for v in plain.outvars)
        and _is_exact(plain)
    )


def _is_exact(jaxpr: Any) -> bool:
    """Whether each operation is exact, and the compiler cannot make several of them one: it rounds a product and a sum once, and
    divides by a number that it spreads by multiplying with the inverse.
    """
    made = list(_operations(jaxpr))
    rounded = [
        e.primitive.name
        for e in made
        if e.primitive.name in _ROUNDED and e.outvars[0].aval.dtype.kind in "fc"
    ]
    return (
        all(
            e.primitive.name in _EXACT and all(_is_number(v.aval) for v in (*e.invars, *e.outvars))
            for e in made
        )
        and not any(e.primitive.name in ("mul", "div") and e.outvars[0].aval.dtype.kind == "c" for e in made)
        and len(rounded) < 2
        and not (
            "div" in rounded and any(v.aval.shape != e.outvars[0].aval.shape for e in made for v in e.invars)
        )
    )


def _operations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program and of those that it calls."""
    for eqn in jaxpr.eqns:
        inner = called(eqn)
        yield from (eqn,) if inner is None else _operations(getattr(inner, "jaxpr", inner))


def _is_number(aval: Any) -> bool:
    """Not of 16 bits: XLA may keep more of them from operation to operation."""
    dtype = getattr(aval, "dtype", None)
    return getattr(dtype, "kind", "none") in "biufc" and (dtype.kind in "biu" or dtype.itemsize > 2)


def _is_plain(value: Any) -> bool:
    """Bound to no device."""
    return not isinstance(value, jax.Array) or (not value.committed and len(value.devices()) == 1)
