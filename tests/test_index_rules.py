"""Every index rule against the Jacobian of its primitive: which elements of an operand reach which elements of the results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy_evaluation import interpreted

from etcompile.analysis import index_rules
from etcompile.analysis.index_rules import ELEMENTWISE, MANY, NONE, operand_influence
from etcompile.frontend.jaxpr import Constant, bind, flatten_jaxpr

rng = np.random.default_rng(0)
X, Y = (jnp.asarray(rng.uniform(0.1, 0.9, size=(2, 3, 4))) for _ in range(2))
ONE = jnp.asarray(0.3)
K = jnp.asarray(rng.normal(size=(2, 3, 2)))
ROWS, TWICE = np.asarray([[2], [0]]), np.asarray([[1], [1]])
TAKE = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
PUT = lax.ScatterDimensionNumbers(
    update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
)


def scatter(fn, where):
    return lambda x, y: fn(x[0], where, y[0, :2], PUT)


#: Functions of one operation each that has a rule, in several forms.
FUNCTIONS = {
    "optimization_barrier": [(lambda x, y: lax.optimization_barrier((x, y[0])), X, Y)],
    "reshape": [(lambda x: lax.reshape(x, (4, 6)), X)],
    "squeeze": [(lambda x: lax.squeeze(x, (1,)), X[:, :1])],
    "transpose": [(lambda x: lax.transpose(x, (2, 0, 1)), X), (lambda x: lax.transpose(x, (1, 0, 2)), X)],
    "rev": [(lambda x: lax.rev(x, (0, 2)), X)],
    "slice": [(lambda x: lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 2)), X), (lambda x: x[1:, :2], X)],
    "broadcast_in_dim": [
        (lambda x: lax.broadcast_in_dim(x, (5, 2, 3, 4), (1, 2, 3)), X),
        (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (0, 1, 2)), X[:, :1]),
        (lambda x: lax.broadcast_in_dim(x, (3,), ()), ONE),
    ],
    "concatenate": [(lambda x, y: lax.concatenate([x, y[:, :1], x], 1), X, Y)],
    "split": [(lambda x: lax.split(x, (1, 3), 2), X.astype(jnp.float32))],  # of 64 bits it is slices with jaxlib 0.10
    "tile": [(lambda x: lax.tile(x, (2, 1, 3)), X)],
    "stack": [(lambda x, y: jnp.stack([x, y, x], 1), X, Y)],
    "unstack": [(lambda x: tuple(jnp.unstack(x, axis=1)), X)],
    "reduce_sum": [(lambda x: jnp.sum(x, (0, 2)), X), (jnp.sum, X)],
    "reduce_max": [(lambda x: jnp.max(x, 1), X)],
    "reduce_min": [(lambda x: jnp.min(x, (1, 2)), X)],
    "reduce_prod": [(lambda x: jnp.prod(x, 0), X)],
    "dot_general": [
        (lambda x, y: jnp.einsum("bik,bjk->bij", x, y), X, Y),
        (lambda x, y: lax.dot_general(x, y, (((1,), (1,)), ((2, 0), (2, 0)))), X, Y),
        (lambda x, y: lax.dot_general(x, y, (((2, 0), (2, 0)), ((), ()))), X, Y),
        (lambda x, y: lax.dot_general(x[0], y[1], (((), ()), ((), ()))), X, Y),
        (lambda x, y: lax.dot_general(x[:, :, :1], y[:, :, :1], (((2,), (2,)), ((0,), (0,)))), X, Y),
    ],
    "cumsum": [(lambda x: lax.cumsum(x, 1), X), (lambda x: lax.cumsum(x, 0, reverse=True), X)],
    "cumprod": [(lambda x: lax.cumprod(x, 2), X)],
    "cumlogsumexp": [(lambda x: lax.cumlogsumexp(x, 1), X)],
    "cummax": [(lambda x: lax.cummax(x, 1), X)],
    "cummin": [(lambda x: lax.cummin(x, 1), X)],
    "gather": [
        (lambda x: lax.gather(x[0], ROWS, TAKE, (1, 4)), X),
        (lambda x: lax.gather(x[0], TWICE, TAKE, (1, 4)), X),
        (lambda x: x[:, np.asarray([2, 5, 0]) % 3, 1], X),
        (lambda x: jnp.take(x, np.asarray([1, 7]), 2, mode="fill"), X),
    ],
    "dynamic_slice": [(lambda x: lax.dynamic_slice(x, (0, 1, 2), (2, 2, 2)), X)],
    "dynamic_update_slice": [(lambda x, y: lax.dynamic_update_slice(x, y[:1, :2], (1, 0, 0)), X, Y)],
    "scatter": [(scatter(lax.scatter, ROWS), X, Y)],
    "scatter-add": [(scatter(lax.scatter_add, ROWS), X, Y), (scatter(lax.scatter_add, TWICE), X, Y)],
    "pad": [
        (lambda x, v: lax.pad(x, v, ((0, 0, 0), (1, 2, 1), (-1, 0, 0))), X, ONE),
        (lambda x: lax.pad(x, 0.0, ((0, 1, 0), (0, 0, 2), (0, 0, 0))), X),
    ],
    "reduce_window_sum": [(lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "VALID"), X)],
    "conv_general_dilated": [(lambda x, k: lax.conv_general_dilated(x, k, (1,), "SAME"), X, K)],
    "sort": [(lambda x: lax.sort(x, dimension=1), X)],
    "while": [(lambda x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1], X)],
}  # fmt: skip

#: Rules that say more than one position where one is right: the safe side. Why:
COARSE = {
    "cumsum": "an element is taken to reach all of its axis, not what comes after it alone",
    "cumprod": "as cumsum",
    "cumlogsumexp": "as cumsum",
    "cummax": "as cumsum",
    "cummin": "as cumsum",
    "conv_general_dilated": "a convolution mixes units",
    "while": "nobody looks inside of a loop whose number of rounds is not known",
    "sort": "where an element goes depends on its value",
    "reduce_max": "which element is taken depends on its value",
    "reduce_min": "as reduce_max",
    "reduce_window_sum": "windows that overlap count as many positions, also where they reach the same one",
}


def graph_of(fn, *args):
    """The operations of a function, those that have a rule."""
    return flatten_jaxpr(jax.make_jaxpr(fn)(*args))


def jacobians(graph, operation, operand):
    """For each result, (its elements, elements of the operand): whether a derivative differs from zero somewhere."""
    avals = [graph.aval(i) for i in operation.inputs]

    @interpreted
    @jax.jacfwd
    def jacobian(value, rest):
        rest = [value if k == operand else v for k, v in enumerate(rest)]
        return [jnp.asarray(v, jnp.result_type(v, float)) for v in bind(operation, rest)]

    found = None
    for _ in range(6):
        values = [
            i.value
            if isinstance(i, Constant)
            else jnp.asarray(rng.uniform(0.1, 0.9, size=a.shape) + (operation.name == "acosh")).astype(
                a.dtype
            )
            for i, a in zip(operation.inputs, avals, strict=True)
        ]
        jac = jacobian(values[operand], values)
        size = avals[operand].size
        reached = [np.asarray(j).reshape(-1, size) != 0 for j in jac]
        found = reached if found is None else [a | b for a, b in zip(found, reached, strict=True)]
    return found


def drawn(shapes):
    """Positions that results reach: each its own, some the same, some none or many; a result may reach nothing at all."""
    start, found = 0, []
    for shape in shapes:
        size = int(np.prod(shape))
        own = np.arange(start, start + size)
        kind = rng.integers(0, 8, size)
        own = np.where(kind == 0, NONE, np.where(kind == 1, MANY, np.where(kind == 2, start, own)))
        found.append(own.reshape(shape))
        start += size
    return found


def expected(reached, influence):
    """What each element of the operand reaches, from Jacobians."""
    found = []
    for i in range(reached[0].shape[1]):
        met = {int(p) for j, inf in zip(reached, influence, strict=True) for p in inf.ravel()[j[:, i]]} - {
            NONE
        }
        found.append(NONE if not met else MANY if MANY in met or len(met) > 1 else met.pop())
    return np.asarray(found)


def check(name, fn, *args):
    graph = graph_of(fn, *args)
    operations = [o for o in graph.operations if o.name == name]
    for operation in operations:
        for operand, source in enumerate(operation.inputs):
            aval = graph.aval(source)
            if isinstance(source, Constant) or not aval.differentiable:
                continue
            reached = jacobians(graph, operation, operand)
            for _ in range(4):
                influence = drawn([graph.aval(v).shape for v in operation.outputs])
                given = [v.copy() for v in influence]
                found = operand_influence(graph, operation, operand, given, lambda *_: pytest.fail("no rule"))
                found = np.full(aval.shape, NONE) if found is None else np.asarray(found)
                assert found.shape == aval.shape
                found, wanted = found.ravel(), expected(reached, influence)
                safe = (found == wanted) | (found == MANY) | (wanted == NONE)
                assert safe.all(), (operand, found, wanted)
                if name not in COARSE and name not in ELEMENTWISE:
                    assert (found == wanted).all(), (operand, found, wanted)
    return len(operations)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_says_what_the_jacobian_says(name):
    for form in FUNCTIONS[name]:
        assert check(name, *form), "the operation does not come up"


CONSTANT = rng.normal(size=(3, 4))
INTO_CONSTANTS = {
    "scatter": lambda y, c: lax.scatter(c, ROWS, y[0, :2], PUT),
    "scatter-add": lambda y, c: lax.scatter_add(c, TWICE, y[0, :2], PUT),
    "dynamic_update_slice": lambda y, c: lax.dynamic_update_slice(c, y[0, :2], (1, 0)),
    "pad": lambda y, c: lax.pad(y[0], c[0, 0], ((0, 1, 0), (0, 0, 2))),
}


@pytest.mark.parametrize("name", INTO_CONSTANTS)
def test_complex_elements_move_as_real_ones_do_whatever_the_constants_around_them(name):
    def found(dtype):
        constant = jnp.asarray(CONSTANT + (1j * CONSTANT if dtype is complex else 0), dtype)
        graph = graph_of(lambda y: INTO_CONSTANTS[name](y, constant), X.astype(dtype))
        (operation,) = [o for o in graph.operations if o.name == name]
        operand = next(k for k, v in enumerate(operation.inputs) if not isinstance(v, Constant))
        size = graph.aval(operation.outputs[0]).size
        reached = [np.arange(size).reshape(graph.aval(operation.outputs[0]).shape)]
        return operand_influence(graph, operation, operand, reached, lambda *_: pytest.fail("no rule"))

    np.testing.assert_array_equal(found(complex), found(float))
    assert (np.asarray(found(complex)) >= 0).any()


def test_every_rule_is_compared():
    assert set(FUNCTIONS) == set(index_rules._RULES)
    assert set(COARSE) <= set(FUNCTIONS)


#: How to call what is not a function of one, two or three arrays.
SPECIAL = {
    "clamp": (lambda x, y: lax.clamp(x, y, x + 1), X, Y),
    "complex": (lambda x, y: lax.complex(x, y), X, Y),
    "convert_element_type": (lambda x: lax.convert_element_type(x, jnp.float32), X),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), X),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 10), X),
    "select_n": (lambda x, y: lax.select_n(X > 0.5, x, y), X, Y),
    "add_any": (jax.grad(lambda x: jnp.sum(jnp.sin(x) * jnp.cos(x))), X),
    "copy": (jnp.copy, X),
}


#: jax has none: only by moving an element would one see what it reaches.
WITHOUT_DERIVATIVE = {"igamma_grad_a", "zeta", "nextafter", "polygamma"}


def test_operations_on_elements_reach_the_same_element_alone():
    """All of jax.lax that the table names and that numbers can be given to."""
    seen = set()
    for name in sorted(ELEMENTWISE):
        fn = getattr(lax, name, None)
        if name in SPECIAL:
            forms = [SPECIAL[name]]
        elif callable(fn):
            forms = [(fn, *(X, Y, X)[:count]) for count in (1, 2, 3)]
        else:
            continue
        for form in forms:
            try:
                graph_of(*form)
            except (TypeError, ValueError):  # another number of arguments, or other dtypes
                continue
            if name not in WITHOUT_DERIVATIVE and check(name, *form):
                seen.add(name)
    must = {
        "add",
        "mul",
        "div",
        "tanh",
        "logistic",
        "pow",
        "atan2",
        "select_n",
        "erf",
        "integer_pow",
        "max",
        "igamma",
    }
    assert must <= seen
    assert len(seen) > 45
