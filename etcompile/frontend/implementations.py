"""What primitives of other libraries compute, as ordinary jax functions.

A library that adds a primitive to jax gives it an implementation: a function that runs it, a function from which its
lowering is made, or kernels for several backends, one of them in jax. Where one of these can be traced, the compiler
looks into the primitive instead of treating it as one operation that it knows nothing of.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src.interpreters import mlir

__all__ = ["has_implementation", "traced_implementation"]

#: What leaves jax: an implementation that holds one of these shows nothing.
_FOREIGN = ("ffi_call", "pure_callback", "io_callback", "pallas_call", "custom_call", "tpu_custom_call")


def has_implementation(primitive: Any, params: dict[str, Any]) -> bool:
    """Whether a primitive brings a function of its own that `traced_implementation` would try."""
    return next(_candidates(primitive, primitive.get_bind_params(params)), None) is not None


def traced_implementation(primitive: Any, params: dict[str, Any], avals: Sequence[Any]) -> Any | None:
    """The jaxpr of a primitive's implementation on operands like ``avals``; None where it has none in jax.

    Parameters
    ----------
    primitive : jax Primitive
    params : dict
        As the jaxpr holds them.
    avals : sequence of jax.ShapeDtypeStruct
    """
    bound = primitive.get_bind_params(params)
    for fn in _candidates(primitive, bound):
        try:
            closed = jax.make_jaxpr(fn)(*avals)
        except Exception:  # made for arrays, such as one in numpy, or for another platform: look further
            continue
        if not closed.effects and not _names(closed) & {*_FOREIGN, primitive.name}:
            return closed
    return None


def _candidates(primitive: Any, params: dict[str, Any]) -> Iterator[Callable]:
    kernels = _jax_kernel(primitive, params)
    if kernels is not None:
        yield kernels
        return
    for fn in (primitive.impl, *_lowered_functions(primitive)):
        if _is_ordinary(fn):
            yield functools.partial(fn, **params)


def _is_ordinary(fn: Any) -> bool:
    """Whether a function is a library's own code, not jax's way to run a primitive by compiling it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    module = getattr(inspect.unwrap(fn), "__module__", None) or "jax"
    return module.startswith("jax.experimental.") or module.split(".")[0] not in ("jax", "jaxlib")


def _lowered_functions(primitive: Any) -> Iterator[Callable]:
    """Functions given to ``mlir.lower_fun``, those for this machine first."""
    tables = [mlir._platform_specific_lowerings.get(p, {}) for p in (jax.default_backend(), "cpu")]
    for table in (*tables, mlir._lowerings):
        entry = table.get(primitive)
        rule: Any = getattr(entry, "rule", None)
        if getattr(rule, "__qualname__", "").startswith("lower_fun."):
            yield inspect.getclosurevars(rule).nonlocals["fun"]


def _jax_kernel(primitive: Any, params: dict[str, Any]) -> Callable | None:
    """The kernel written in jax among those that brainevent has of one primitive."""
    brainevent = sys.modules.get("brainevent")
    if brainevent is None:
        return None
    kernel = brainevent.get_registry().get(primitive.name)
    if kernel is None or kernel.primitive is not primitive:
        return None
    for platform in (jax.default_backend(), "cpu"):
        entry = kernel._kernels.get(platform, {}).get("jax_raw")
        if entry is not None:
            others = {k: v for k, v in params.items() if k != "backend"}
            return lambda *args: entry.kernel_generator(**others)(*args)
    return None


def _names(closed: Any) -> set[str]:
    found: set[str] = set()
    todo = [closed.jaxpr]
    while todo:
        for eqn in todo.pop().eqns:
            found.add(eqn.primitive.name)
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(inner, "eqns"):
                        todo.append(getattr(inner, "jaxpr", inner))
    return found
