"""Jaxprs run by numpy, one operation at a time.

Compiling what runs once takes nearly all of the time of a test. What the compiler of this project makes are jaxprs, and numpy
says what numbers they stand for without XLA. Operations that are not in the table are run by JAX.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.core import Tracer
from jax.extend.core import Literal
from scipy import special

from etcompile.frontend.jaxpr import in_transformation, scan_signature

__all__ = [
    "as_array",
    "by_numpy",
    "by_table",
    "called",
    "chosen_branch",
    "evaluate",
    "interpreted",
    "op_by_op",
    "run_equation",
]

Params = dict[str, Any]


def op_by_op(fn: Callable, *arguments: Any) -> Any:
    """``fn(*arguments)``, traced, and not compiled."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    return _results(jaxpr, shapes, jax.tree.leaves(arguments))


class interpreted:
    """``jax.jit`` for tests: traces once for every set of shapes, and runs by numpy. Where it meets tracers it is `jax.jit`."""

    def __init__(self, fn: Callable, **options: Any) -> None:
        self._jitted = _JIT(fn, **options)
        self._plain = set(options) <= {"donate_argnums"}
        self._fn = fn
        self._traced: dict[Any, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named or self._left_to_jax(arguments):
            return self._jitted(*arguments, **named)
        traced = self.trace(*arguments)
        return _results(traced.jaxpr, traced.out_info, jax.tree.leaves(arguments))

    def trace(self, *arguments: Any) -> Any:
        """As of a jitted function; traced once, whether it is asked for or run."""
        if self._left_to_jax(arguments):
            return self._jitted.trace(*arguments)
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, tuple(map(_kind, leaves))
        if key not in self._traced:
            jaxpr, shapes = jax.make_jaxpr(self._fn, return_shape=True)(*arguments)
            self._traced[key] = types.SimpleNamespace(jaxpr=jaxpr, out_info=shapes)
        return self._traced[key]

    def _left_to_jax(self, arguments: Sequence[Any]) -> bool:
        return (
            not self._plain
            or in_transformation()
            or any(isinstance(v, Tracer) for v in jax.tree.leaves(arguments))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


_JIT = jax.jit


@contextlib.contextmanager
def by_numpy(on: bool = True) -> Iterator[None]:
    """What is jitted meanwhile is traced, and run by numpy; not where everything is to be compiled (``--by-xla``)."""
    with pytest.MonkeyPatch.context() as patch:
        if on and "ETCOMPILE_BY_XLA" not in os.environ:
            patch.setattr(jax, "jit", interpreted)
        yield


def _kind(leaf: Any) -> Any:
    return np.shape(leaf), getattr(leaf, "dtype", type(leaf)), getattr(leaf, "weak_type", None)


def _results(jaxpr: Any, shapes: Any, leaves: Sequence[Any]) -> Any:
    with np.errstate(all="ignore"):
        found = evaluate(jaxpr.jaxpr, jaxpr.consts, [as_array(leaf) for leaf in leaves])
    wanted, tree = jax.tree.flatten(shapes)
    for v, w in zip(found, wanted, strict=True):
        assert np.shape(v) == w.shape and v.dtype == w.dtype, (np.shape(v), v.dtype, w)
    return jax.tree.unflatten(tree, [v if isinstance(v, jax.Array) else jax.device_put(v) for v in found])


def as_array(value: Any) -> Any:
    """As numpy, where numpy has it: keys, and what lies on several devices, stay."""
    if isinstance(value, jax.Array):
        plain = not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended) and len(value.devices()) == 1
        return np.asarray(value) if plain else value
    return np.asarray(value, jax.dtypes.canonicalize_dtype(np.result_type(value)))


def evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """What an open jaxpr gives."""
    known = dict(zip(jaxpr.constvars, map(as_array, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return _literal(atom) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        found = run_equation(eqn, [read(v) for v in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _literal(atom: Any) -> np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype)


def run_equation(eqn: Any, values: list[Any]) -> Sequence[Any]:
    """What one equation gives."""
    name, params = eqn.primitive.name, eqn.params
    if name in _LOOPS:
        return _LOOPS[name](params, values)
    if (inner := called(eqn)) is not None:
        return evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
    if name == "optimization_barrier":
        return values
    found = by_table(eqn, values)
    return _by_jax(eqn, values) if found is None else found


def by_table(eqn: Any, values: list[Any]) -> list[np.ndarray] | None:
    """What one equation gives, where numpy has it."""
    avals = [v.aval for v in eqn.outvars]
    if not all(map(_is_number, (*values, *avals))):
        return None
    found = _by_table(eqn.primitive.name, eqn.params, values, avals)
    for v, aval in zip(found or (), avals, strict=found is not None):
        assert v.shape == aval.shape, (eqn, v.shape)
    return found


def _by_jax(eqn: Any, values: list[Any]) -> list[Any]:
    """One equation run by JAX."""
    if eqn.primitive.name in _COMPILED_AT_EVERY_CALL:
        found = _compiled_once(eqn.primitive, **eqn.params)(*values)
    else:
        found = eqn.primitive.bind(*values, **eqn.params)
    return [as_array(v) for v in (found if eqn.primitive.multiple_results else [found])]


#: Outside of a jit they compile their loops anew each time.
_COMPILED_AT_EVERY_CALL = frozenset(["random_gamma"])


@functools.cache
def _compiled_once(primitive: Any, **params: Any) -> Callable:
    return _JIT(lambda *values: primitive.bind(*values, **params))


def called(eqn: Any) -> Any:
    """The jaxpr that an equation calls, once."""
    if eqn.primitive.name not in _CALLS:
        return None
    return next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if k in eqn.params)


def _is_number(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return getattr(dtype, "kind", "none") in "biufc" or dtype == jax.numpy.bfloat16


def _by_table(name: str, params: Params, values: list[Any], avals: list[Any]) -> list[np.ndarray] | None:
    """What numpy makes of arrays; None where it is left to JAX.

    Numbers of 16 bits are computed in 32 and rounded, as XLA does.
    """
    if not all(isinstance(v, np.ndarray) for v in values):
        return None
    values = [v.astype(np.float32) if _is_half(v.dtype) else v for v in values]
    if name in _ENTRIES:
        found = _ENTRIES[name](*values)
    elif name in _OTHERS:
        found = _OTHERS[name](params, *values)
    elif name in _SEVERAL:
        found = _SEVERAL[name](params, *values)
        return found and [np.asarray(v, a.dtype) for v, a in zip(found, avals, strict=True)]
    else:
        return None
    return None if found is None else [np.asarray(found, avals[0].dtype)]


def _is_half(dtype: Any) -> bool:
    return dtype.itemsize == 2 and dtype.kind not in "iu"


# -- control flow -------------------------------------------------------------------------------------------------------


def _closed(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    return evaluate(jaxpr.jaxpr, jaxpr.consts, values)


def _scan(params: Params, values: list[Any]) -> list[Any]:
    fixed, count = scan_signature(params)
    steps, body = range(params["length"]), params["jaxpr"]
    carry, rows = values[fixed : fixed + count], {}
    for t in reversed(steps) if params["reverse"] else steps:
        out = _closed(body, [*values[:fixed], *carry, *(as_array(v[t]) for v in values[fixed + count :])])
        carry, rows[t] = out[:count], out[count:]
    kept = [_stack(v) for v in zip(*(rows[t] for t in steps), strict=True)] if steps else []
    if not steps:
        kept = [np.zeros((0, *a.shape), a.dtype) for a in body.out_avals[count:]]
    return [*carry, *kept]


def _stack(rows: Sequence[Any]) -> Any:
    return np.stack(rows) if isinstance(rows[0], np.ndarray) else jax.numpy.stack(rows)


def _while(params: Params, values: list[Any]) -> list[Any]:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    test, body, carry = values[:a], values[a : a + b], values[a + b :]
    # Of a batch, JAX goes on while any goes on, and keeps what is done.
    while np.any(going := _closed(params["cond_jaxpr"], [*test, *carry])[0]):
        new = _closed(params["body_jaxpr"], [*body, *carry])
        carry = [_where(going, n, c) for n, c in zip(new, carry, strict=True)] if np.ndim(going) else new
    return carry


def _where(which: np.ndarray, new: Any, old: Any) -> Any:
    """Entries of `new` where `which`, that has their first axes, says so."""
    return np.where(which.reshape(which.shape + (1,) * (np.ndim(new) - which.ndim)), new, old)


def _cond(params: Params, values: list[Any]) -> list[Any]:
    return _closed(chosen_branch(params, values), values[1:])


def chosen_branch(params: Params, values: list[Any]) -> Any:
    """The program that a condition runs."""
    branches = params["branches"]
    return branches[int(np.clip(int(values[0]), 0, len(branches) - 1))]


_LOOPS: dict[str, Callable[[Params, list[Any]], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
_CALLS = frozenset(
    [
        "pjit",
        "jit",
        "closed_call",
        "core_call",
        "remat",
        "checkpoint",
        "remat2",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_vmap_call",
    ]
)

# -- entry by entry -----------------------------------------------------------------------------------------------------


def _logistic(v: np.ndarray) -> np.ndarray:
    return np.where(v >= 0, 1 / (1 + np.exp(-np.abs(v))), np.exp(-np.abs(v)) / (1 + np.exp(-np.abs(v))))


def _div(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    return a / b if a.dtype.kind in "fc" else None  # XLA's whole division rounds to zero


def _choose(which: np.ndarray, *cases: np.ndarray) -> np.ndarray | None:
    if which.dtype != bool or len(cases) != 2:
        return None
    return np.where(which, cases[1], cases[0])


def _not(v: np.ndarray) -> np.ndarray:
    return np.logical_not(v) if v.dtype == bool else np.invert(v)


def _same(v: np.ndarray) -> np.ndarray:
    return v


def _rem(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    return np.fmod(a, b) if a.dtype.kind == "f" or b.all() else None


def _shifted(shift: Callable, logical: bool = False) -> Callable:
    """A shift by less than all bits: what a larger one gives, the standards leave open."""

    def run(v: np.ndarray, by: np.ndarray) -> np.ndarray | None:
        bits = 8 * v.dtype.itemsize
        if (by < 0).any() or (by >= bits).any():
            return None
        plain = v.view(f"u{v.dtype.itemsize}") if logical else v
        return shift(plain, by.astype(plain.dtype)).view(v.dtype)

    return run


_ENTRIES: dict[str, Callable[..., Any]] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": _div, "neg": np.negative,
    "max": np.maximum, "min": np.minimum, "abs": np.abs, "sign": np.sign, "exp": np.exp, "exp2": np.exp2,
    "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "tanh": np.tanh, "sinh": np.sinh, "cosh": np.cosh,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "atan2": np.arctan2, "atan": np.arctan, "asin": np.arcsin,
    "acos": np.arccos, "sqrt": np.sqrt, "cbrt": np.cbrt, "rsqrt": lambda v: 1 / np.sqrt(v), "square": lambda v: v * v,
    "logistic": _logistic, "floor": np.floor, "ceil": np.ceil, "is_finite": np.isfinite,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": _not, "select_n": _choose,
    "real": np.real, "imag": np.imag, "conj": np.conj, "copy": _same, "copy_p": _same, "stage": _same,
    "clamp": lambda low, v, high: np.minimum(np.maximum(v, low), high),
    "complex": lambda re, im: re + 1j * im, "stop_gradient": _same, "rem": _rem,
    "erf": special.erf, "erfc": special.erfc,
    "shift_left": _shifted(np.left_shift), "shift_right_logical": _shifted(np.right_shift, logical=True),
    "shift_right_arithmetic": _shifted(np.right_shift),
}  # fmt: skip


# -- the rest -----------------------------------------------------------------------------------------------------------


def _spread(p: Params, v: np.ndarray, *_: Any) -> np.ndarray:
    grown = [1] * len(p["shape"])
    for d, n in zip(p["broadcast_dimensions"], v.shape, strict=True):
        grown[d] = n
    return np.broadcast_to(v.reshape(grown), p["shape"])


def _dot(p: Params, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (ca, cb), (ba, bb) = p["dimension_numbers"]
    wanted = p.get("preferred_element_type")
    if wanted is not None and not _is_half(np.dtype(wanted)):
        a, b = a.astype(wanted), b.astype(wanted)
    fa = [d for d in range(a.ndim) if d not in (*ca, *ba)]
    fb = [d for d in range(b.ndim) if d not in (*cb, *bb)]
    left = a.transpose((*ba, *fa, *ca)).reshape((*(a.shape[d] for d in ba), _size(a, fa), _size(a, ca)))
    right = b.transpose((*bb, *cb, *fb)).reshape((*(b.shape[d] for d in bb), _size(b, cb), _size(b, fb)))
    rest = (*(a.shape[d] for d in fa), *(b.shape[d] for d in fb))
    return (left @ right).reshape((*(a.shape[d] for d in ba), *rest))


def _size(v: np.ndarray, axes: Sequence[int]) -> int:
    return int(np.prod([v.shape[d] for d in axes], dtype=int))


def _iota(p: Params) -> np.ndarray:
    shape, d = tuple(p["shape"]), p["dimension"]
    along = [-1 if k == d else 1 for k in range(len(shape))]
    return np.broadcast_to(np.arange(shape[d]).reshape(along), shape)


def _pad(p: Params, v: np.ndarray, filler: np.ndarray) -> np.ndarray:
    config = p["padding_config"]
    if any(low < 0 or high < 0 for low, high, _ in config):
        kept = [(max(low, 0), max(high, 0), inner) for low, high, inner in config]
        found = _pad({"padding_config": kept}, v, filler)
        ends = [
            (max(-low, 0), n - max(-high, 0)) for (low, high, _), n in zip(config, found.shape, strict=True)
        ]
        return found[tuple(slice(first, last) for first, last in ends)]
    spans = [
        low + high + n + max(n - 1, 0) * inner for n, (low, high, inner) in zip(v.shape, config, strict=True)
    ]
    found = np.full(spans, filler, v.dtype)
    found[
        tuple(
            slice(low, low + n + max(n - 1, 0) * inner, inner + 1)
            for n, (low, _, inner) in zip(v.shape, config, strict=True)
        )
    ] = v
    return found


def _slice(p: Params, v: np.ndarray) -> np.ndarray:
    strides = p["strides"] or (1,) * v.ndim
    return v[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _window(starts: Sequence[Any], sizes: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    first = [int(np.clip(int(s), 0, n - k)) for s, k, n in zip(starts, sizes, shape, strict=True)]
    return tuple(slice(f, f + k) for f, k in zip(first, sizes, strict=True))


def _update(p: Params, v: np.ndarray, new: np.ndarray, *starts: Any) -> np.ndarray:
    found = v.copy()
    found[_window(starts, new.shape, v.shape)] = new
    return found


def _along(fn: Callable) -> Callable:
    def run(p: Params, v: np.ndarray) -> np.ndarray:
        return np.flip(fn(np.flip(v, p["axis"]), p["axis"]), p["axis"]) if p["reverse"] else fn(v, p["axis"])

    return run


def _over(fn: Callable) -> Callable:
    return lambda p, v: fn(v, axis=tuple(p["axes"]))


def _power(p: Params, v: np.ndarray) -> np.ndarray | None:
    n = p["y"]
    return None if v.dtype.kind not in "fc" else np.power(v, n) if n >= 0 else 1 / np.power(v, -n)


def _converted(p: Params, v: np.ndarray) -> np.ndarray | None:
    new = np.dtype(p["new_dtype"])
    if v.dtype.kind == "f" and new.kind in "iu":
        held = np.iinfo(new)  # outside of it, and for no number, XLA has rules of its own
        return v if (np.isfinite(v) & (v > held.min) & (v < held.max)).all() else None
    return v.real if v.dtype.kind == "c" and new.kind != "c" else v


def _reinterpreted(p: Params, v: np.ndarray) -> np.ndarray | None:
    new = np.dtype(p["new_dtype"])
    return np.ascontiguousarray(v).view(new) if v.ndim and new.itemsize == v.dtype.itemsize else None


def _place(fn: Callable) -> Callable:
    def run(p: Params, v: np.ndarray) -> np.ndarray | None:
        return fn(v, p["axes"][0]) if len(p["axes"]) == 1 else None

    return run


def _sorted(p: Params, *values: np.ndarray) -> list[np.ndarray] | None:
    if p["num_keys"] != 1 or values[0].dtype.kind not in "iuf" or np.isnan(values[0]).any():
        return None
    order = np.argsort(values[0], axis=p["dimension"], kind="stable")
    return [np.take_along_axis(v, order, p["dimension"]) for v in values]


def _gathered(p: Params, v: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    """Slices of `v` at `indices`, all of them inside."""
    how, sizes = p["dimension_numbers"], p["slice_sizes"]
    if how.operand_batching_dims or indices.size == 0:
        return None
    slices = []
    for at in indices.reshape(-1, indices.shape[-1]):
        starts = np.zeros(v.ndim, int)
        starts[list(how.start_index_map)] = at
        if (starts < 0).any() or (starts + sizes > v.shape).any():
            return None
        slices.append(v[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))])
    found = np.stack(slices).squeeze(tuple(d + 1 for d in how.collapsed_slice_dims))
    batch = indices.shape[:-1]
    found = found.reshape((*batch, *found.shape[1:]))
    return np.moveaxis(found, range(len(batch), found.ndim), how.offset_dims)


def _scattered(add: bool) -> Callable:
    """`v` with rows put, or added, at `indices`, all of them inside."""

    def run(p: Params, v: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        how = p["dimension_numbers"]
        if how.operand_batching_dims or indices.size == 0 or not (add or _takes_the_new(p["update_jaxpr"])):
            return None
        sizes = np.ones(v.ndim, int)
        kept = [d for d in range(v.ndim) if d not in how.inserted_window_dims]
        sizes[kept] = [rows.shape[d] for d in how.update_window_dims]
        places = indices.reshape(-1, indices.shape[-1])
        starts = np.zeros((len(places), v.ndim), int)
        starts[:, list(how.scatter_dims_to_operand_dims)] = places
        if (starts < 0).any() or (starts + sizes > v.shape).any():
            return None
        batch = [d for d in range(rows.ndim) if d not in how.update_window_dims]
        rows = np.moveaxis(rows, batch, range(len(batch))).reshape((len(places), *sizes))
        found = v.copy()
        for at, row in zip(starts, rows, strict=True):
            window = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            found[window] = found[window] + row if add else row
        return found

    return run


def _takes_the_new(update: Any) -> bool:
    """Whether of an old and a new number it gives the new one."""
    return update is not None and not update.eqns and list(update.outvars) == list(update.invars[1:])


_OTHERS: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _spread,
    "reshape": lambda p, v: v.reshape(p["new_sizes"]) if p.get("dimensions") is None else None,
    "squeeze": lambda p, v: v.squeeze(tuple(p["dimensions"])),
    "expand_dims": lambda p, v: np.expand_dims(v, tuple(p["dimensions"])),
    "transpose": lambda p, v: v.transpose(p["permutation"]),
    "rev": lambda p, v: np.flip(v, tuple(p["dimensions"])),
    "concatenate": lambda p, *v: np.concatenate(v, axis=p["dimension"]),
    "convert_element_type": _converted,
    "dot_general": _dot,
    "dynamic_slice": lambda p, v, *starts: v[_window(starts, p["slice_sizes"], v.shape)],
    "dynamic_update_slice": _update,
    "integer_pow": _power,
    "pow": lambda p, a, b: np.power(a, b) if a.dtype.kind == "f" else None,
    "iota": _iota,
    "pad": _pad,
    "slice": _slice,
    "round": lambda p, v: np.rint(v) if int(p["rounding_method"]) == 1 else None,
    "stack": lambda p, *v: np.stack(v, p["axis"]),
    "bitcast_convert_type": _reinterpreted,
    "gather": _gathered,
    "scatter": _scattered(add=False),
    "scatter-add": _scattered(add=True),
    "argmax": _place(np.argmax),
    "argmin": _place(np.argmin),
    "reduce_sum": _over(np.sum),
    "reduce_prod": _over(np.prod),
    "reduce_max": _over(np.max),
    "reduce_min": _over(np.min),
    "reduce_and": _over(np.all),
    "reduce_or": _over(np.any),
    "cumsum": _along(np.cumsum),
    "cumprod": _along(np.cumprod),
    "cummax": _along(np.maximum.accumulate),
    "cummin": _along(np.minimum.accumulate),
}


def _threefry(p: Params, *values: np.ndarray) -> list[np.ndarray]:
    """Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3. Twenty rounds on two words."""
    a, b, x, y = np.broadcast_arrays(*values)
    keys = [a, b, a ^ b ^ np.uint32(0x1BD11BDA)]
    x, y = x + a, y + b
    for k in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[k % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(by)) | (y >> np.uint32(32 - by)))
        x, y = x + keys[(k + 1) % 3], y + keys[(k + 2) % 3] + np.uint32(k + 1)
    return [x, y]


#: Those with more results than one.
_SEVERAL: dict[str, Callable[..., Sequence[np.ndarray] | None]] = {
    "unstack": lambda p, v: list(np.moveaxis(v, p["axis"], 0)),
    "threefry2x32": _threefry,
    "iota_2x32_shape": lambda p: np.divmod(
        np.arange(np.prod(p["shape"], dtype=int)).reshape(p["shape"]), 1 << 32
    ),
    "split": lambda p, v: np.split(v, np.cumsum(p["sizes"])[:-1], p["axis"]),
    "sort": _sorted,
}
