"""Whether a step is cheaper as one of many in a chunk than alone, from shapes: for weights that become no matrix product.

Chunks make traces and sums of gradients once, by matrix products, and not at every step. What is kept for all steps of a chunk,
f_t and a credit of y, goes through memory instead. Where every weight has a place of its own among the units, as in a sparse
product, f_t is as large as the trace, and both are found element by element for all steps at once, out of the cache: such
steps run one by one, unless dense weights beside them gain more.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from etcompile.lowering.causal import CausalProgram
from etcompile.precision import accumulator

__all__ = ["chunks_pay_off"]

#: What a byte of a sparse weight costs in a chunk, measured in bytes of a trace that a step reads or writes.
_ONE_BY_ONE = 40
#: Bytes below which other things than memory decide, and chunks are as good.
_NEGLIGIBLE = 1 << 18


def chunks_pay_off(causal: CausalProgram) -> bool:
    """Whether steps in a chunk take no more time than as many steps alone."""
    found, sparse = 0, set()
    for relation in causal.model.analysis.relations:
        geometry = causal.model.traces[relation.name]
        if geometry.scattered and math.prod(geometry.contracted) == 1:
            sparse.add(relation.name)
            span = jax.ShapeDtypeStruct(relation.shape, geometry.dtype)
            found += _ONE_BY_ONE * sum(relation.rows) * _bytes(span)
    return not found or found <= max(_NEGLIGIBLE, _saved(causal, sparse))


def _saved(causal: CausalProgram, sparse: set[str]) -> int:
    """Bytes that a step alone reads and writes for the other weights: traces and sums of gradients."""
    carried = causal.init_traces_shapes()
    traces = [v for name, v in carried.items() if causal.program.equation(name).type.of not in sparse]
    sites = {causal.model.traces[name].relation.site for name in sparse}
    weights = [site.weight for name, site in causal.model.sites.items() if name not in sites]
    return 2 * _bytes(traces) + 2 * sum(w.size * jnp.dtype(accumulator(w.dtype)).itemsize for w in weights)


def _bytes(tree: object) -> int:
    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))
