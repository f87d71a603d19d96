"""Primitives of other libraries: analysed through what they compute, with the derivative that they declare."""

from __future__ import annotations

import brainevent
import brainstate
import jax
import jax.experimental.sparse
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import etcompile
from etcompile.frontend import jaxpr

brainevent.config.set_backend("cpu", "jax_raw")

draw = np.random.default_rng(3)
PATTERN = np.array([0, 2, 3, 1, 0, 3], np.int32), np.array([0, 2, 4, 6], np.int32)
ROWS = np.repeat(np.arange(3, dtype=np.int32), 2)


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before():
    """In some draws no unit fires."""
    draw.bit_generator.state = np.random.default_rng(3).bit_generator.state


def squares(out, y):
    return jnp.sum((out - y) ** 2)


def dense(w):
    return jnp.zeros((3, 4)).at[ROWS, PATTERN[0]].set(w)


def leaky(product):
    def step(p, s, x):
        h = jnp.tanh(0.8 * s["h"] + product(p["w"], x))
        return {"h": h}, h

    return step


def compiled(product, w, batch, algo="d_rtrl"):
    units = jax.eval_shape(product, w, jnp.ones((*batch, 3))).shape
    model = etcompile.from_function(leaky(product), {"w": w}, {"h": jnp.zeros(units)})
    return etcompile.compile(model, jnp.ones((*batch, 3)), algo=algo)


def gradient(step, xs, ys, chunk=None):
    step.reset()
    return step.scan_value_and_grad(squares, chunk=chunk)(xs, ys)[1]["w"]


def trace_numbers(step):
    return sum(v.size for v in jax.tree.leaves(step.init_carry().traces))


def same(first, second):
    scale = max(float(jnp.abs(second).max()), 1e-30)
    assert float(jnp.abs(first - second).max()) <= 1e-10 * scale
    assert scale > 1e-3


def through_time(product, w, xs, ys):
    def whole(w):
        def body(s, item):
            s, out = leaky(product)({"w": w}, s, item[0])
            return s, squares(out, item[1])

        units = jax.eval_shape(product, w, xs[0]).shape
        return jnp.sum(jax.lax.scan(body, {"h": jnp.zeros(units)}, (xs, ys))[1])

    return jax.grad(whole)(w)


def data(batch, steps=5):
    return draw.standard_normal((steps, *batch, 3)), draw.standard_normal((steps, *batch, 4))


SPARSE = {
    "brainevent_csr": lambda w, x: x @ brainevent.CSR((w, *PATTERN), shape=(3, 4)),
    "brainevent_events": lambda w, x: brainevent.BinaryArray(x) @ brainevent.CSR((w, *PATTERN), shape=(3, 4)),
    "saiunit_csr": lambda w, x: x @ u.sparse.CSR((w, *PATTERN), shape=(3, 4)),
    "saiunit_coo": lambda w, x: x @ u.sparse.COO((w, ROWS, PATTERN[0]), shape=(3, 4)),
    "jax_bcoo": lambda w, x: x @ jax.experimental.sparse.BCOO(
        (w, np.stack([ROWS, PATTERN[0]], 1)), shape=(3, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch", [(), (2,)], ids=["no_batch", "batch"])
@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_product_keeps_one_entry_per_stored_weight(name, batch):
    w = jnp.asarray(draw.standard_normal(6))
    xs, ys = data(batch)
    if "events" in name:
        xs = (xs > 0).astype(xs.dtype)
    step = compiled(SPARSE[name], w, batch)
    assert step.exact
    assert trace_numbers(step) <= 6 * int(np.prod(batch))
    right = through_time(lambda w, x: x @ dense(w), w, xs, ys)
    same(gradient(step, xs, ys), right)
    same(gradient(step, xs, ys, chunk=2), right)
    same(gradient(step, xs, ys, chunk="auto"), right)


def test_a_sparse_matrix_of_many_units_is_compiled_like_a_small_one(monkeypatch):
    compared, jit = [], jax.jit

    def watched(fn, **options):
        if "_is_its_derivative" in getattr(fn, "__qualname__", ""):
            seen = lambda *args: (compared.append(jax.make_jaxpr(fn)(*args).consts), fn(*args))[1]  # noqa: E731
            return jit(seen, **options)
        return jit(fn, **options)

    monkeypatch.setattr(jax, "jit", watched)
    units, targets = 10_000, np.random.default_rng(0).integers(0, 10_000, 20_000).astype(np.int32)
    starts = np.arange(0, 20_001, 2, dtype=np.int32)

    def leaky(params, state, x):
        h = 0.9 * state["h"] + x @ brainevent.CSR((params["w"], targets, starts), shape=(units, units))
        return {"h": h}, h

    w, h = jnp.ones(20_000), jnp.zeros(units)
    step = etcompile.compile(etcompile.from_function(leaky, {"w": w}, {"h": h}), h)
    assert step.exact
    assert trace_numbers(step) == 10_000  # one for each sender
    # What lies in a program XLA computes with while it compiles: with the starts of a million synapses for half a minute.
    constants = [c for consts in compared for c in consts]
    assert constants and not any(np.array_equal(c, given) for c in constants for given in (starts, targets))


def test_the_derivative_of_events_by_what_sends_them_is_kept():
    """brainevent lets credit through an event product as if the events were numbers."""
    w = jnp.asarray(draw.standard_normal(6))
    xs, ys = data((2,), steps=1)

    def product(v, x):
        return SPARSE["brainevent_events"](w, jnp.tanh(x * v))

    v = jnp.asarray(draw.standard_normal(3))
    step = compiled(product, v, (2,))  # a sender has several receivers: exact within the step
    found = step.value_and_grad(squares)(xs[0], ys[0])[1]["w"]
    same(found, jax.grad(lambda v: squares(jnp.tanh(product(v, xs[0])), ys[0]))(v))


def spiking_product():
    """A product whose value is a spike and whose derivative is a smooth function's."""
    p = Primitive("spiking_product_of_a_test")

    def impl(x, w):
        return (x @ w > 0).astype(x.dtype)

    p.def_impl(impl)
    p.def_abstract_eval(lambda x, w: jax.core.ShapedArray((*x.shape[:-1], w.shape[1]), x.dtype))
    mlir.register_lowering(p, mlir.lower_fun(impl, multiple_results=False))

    def jvp(primals, tangents):
        tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
        return p.bind(*primals), jax.jvp(lambda x, w: jnp.tanh(x @ w), primals, tangents)[1]

    ad.primitive_jvps[p] = jvp
    return lambda w, x: p.bind(x, w)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["no_batch", "batch"])
def test_a_surrogate_derivative_is_never_lost(batch):
    product, w = spiking_product(), jnp.asarray(draw.standard_normal((3, 4)))
    xs, ys = data(batch)
    step = compiled(product, w, batch)
    assert [s.kind for s in step.program.header.sites] == ["dot_general"]
    right = through_time(product, w, xs, ys)
    same(gradient(step, xs, ys), right)
    same(gradient(step, xs, ys, chunk=2), right)
    np.testing.assert_array_equal(product(w, xs[0]), x_fires := (xs[0] @ w > 0) * 1.0)
    step.reset()
    same(step(xs[0]), jnp.tanh(x_fires))


def test_what_is_alike_is_looked_into_once_and_other_constants_are_not_alike(monkeypatch):
    looked, look = [], jaxpr.traced_implementation
    monkeypatch.setattr(
        jaxpr, "traced_implementation", lambda p, *rest: looked.append(p.name) or look(p, *rest)
    )
    product, w = spiking_product(), jnp.asarray(draw.standard_normal((3, 4)))
    xs, ys = data((2,))
    same(gradient(compiled(product, w, (2,)), xs, ys), through_time(product, w, xs, ys))
    assert "spiking_product_of_a_test" in looked
    looked.clear()
    same(gradient(compiled(product, w, (2,)), xs, ys), through_time(product, w, xs, ys))
    assert "spiking_product_of_a_test" not in looked

    values = jnp.asarray(draw.standard_normal(6))
    for columns in (PATTERN[0], np.array([1, 3, 0, 2, 1, 2], np.int32)):
        here = lambda w, x, c=columns: x @ u.sparse.CSR((w, c, PATTERN[1]), shape=(3, 4))  # noqa: E731
        whole = lambda w, x, c=columns: x @ jnp.zeros((3, 4)).at[ROWS, c].set(w)  # noqa: E731
        same(gradient(compiled(here, values, (2,)), xs, ys), through_time(whole, values, xs, ys))


def test_a_transpose_of_its_own_is_kept():
    """Feedback alignment: linear, and transposed through other weights."""
    p = Primitive("aligned_product_of_a_test")
    back = jnp.asarray(draw.standard_normal((4, 3)))

    def impl(x, w):
        return x @ w

    p.def_impl(impl)
    p.def_abstract_eval(lambda x, w: jax.core.ShapedArray((*x.shape[:-1], w.shape[1]), x.dtype))
    mlir.register_lowering(p, mlir.lower_fun(impl, multiple_results=False))

    def jvp(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        moved = [p.bind(dx, w)] if type(dx) is not ad.Zero else []
        moved += [p.bind(x, dw)] if type(dw) is not ad.Zero else []
        return p.bind(x, w), sum(moved[1:], moved[0])

    def transpose(ct, x, w):
        return (ct @ back, None) if ad.is_undefined_primal(x) else (None, x.T @ ct)

    def batched(args, dims):
        moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True)]
        size = next(a.shape[0] for a, d in zip(moved, dims, strict=True) if d is not None)
        full = [
            jnp.broadcast_to(a, (size, *a.shape)) if d is None else a
            for a, d in zip(moved, dims, strict=True)
        ]
        return jax.lax.map(lambda one: p.bind(*one), full), 0

    ad.primitive_jvps[p] = jvp
    ad.primitive_transposes[p] = transpose
    batching.primitive_batchers[p] = batched
    readout = jnp.asarray(draw.standard_normal((3, 4)))

    def product(v, x):
        return p.bind(jnp.tanh(x * v), readout)

    v = jnp.asarray(draw.standard_normal(3))
    xs, ys = data((2,), steps=1)
    step = compiled(product, v, (2,))
    found = step.value_and_grad(squares)(xs[0], ys[0])[1]["w"]
    same(found, jax.grad(lambda v: squares(jnp.tanh(product(v, xs[0])), ys[0]))(v))


def test_custom_vmap_is_looked_into():
    @jax.custom_batching.custom_vmap
    def multiply(x, w):
        return x @ w

    @multiply.def_vmap
    def _(size, mapped, x, w):
        return jax.vmap(jnp.matmul, [0 if m else None for m in mapped])(x, w), True

    w = jnp.asarray(draw.standard_normal((3, 4)))
    xs, ys = data((2,))
    step = compiled(lambda w, x: multiply(x, w), w, (2,))
    assert [s.kind for s in step.program.header.sites] == ["dot_general"]
    same(gradient(step, xs, ys, chunk=2), through_time(lambda w, x: x @ w, w, xs, ys))


def test_a_primitive_in_numpy_stays_what_it_is():
    p = Primitive("in_numpy_of_a_test")
    p.def_impl(lambda x: np.sin(np.asarray(x)))
    p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(
        p, mlir.lower_fun(lambda x: jax.pure_callback(np.sin, x, x, vmap_method="legacy_vectorized"), False)
    )
    ad.defjvp(p, lambda t, x: t * jnp.cos(x))
    batching.primitive_batchers[p] = lambda args, dims: (p.bind(*args), dims[0])
    w = jnp.asarray(draw.standard_normal((3, 4)))
    xs, ys = data((2,))
    step = compiled(lambda w, x: p.bind(x @ w), w, (2,))
    same(gradient(step, xs, ys), through_time(lambda w, x: jnp.sin(x @ w), w, xs, ys))


# braintrace: layers and operations that mark weights for it


@pytest.mark.parametrize(
    ("name", "algo", "batch"),
    [
        ("matmul", "pp_prop", ()),
        ("matmul", "d_rtrl", (2,)),
        ("weight_fn", "e_prop", (2,)),
        ("weight_fn", "pp_prop", (2,)),
        ("lora", "d_rtrl", ()),
        ("lora", "pp_prop", (2,)),
    ],
)
def test_braintrace_operations_are_the_plain_ones(name, batch, algo):
    braintrace = pytest.importorskip("braintrace")
    marked, plain = {
        "matmul": (lambda w, x: braintrace.matmul(x, w), lambda w, x: x @ w),
        "weight_fn": (lambda w, x: braintrace.matmul(x, w, weight_fn=jnp.tanh), lambda w, x: x @ jnp.tanh(w)),
        "lora": (
            lambda w, x: braintrace.lora_matmul(x, w[:, :2], w.T[2:, :3].T[:2, :2] @ jnp.ones((2, 4))),
            lambda w, x: (x @ w[:, :2]) @ (w.T[2:, :3].T[:2, :2] @ jnp.ones((2, 4))),
        ),
    }[name]
    w = jnp.asarray(draw.standard_normal((3, 4)))
    xs, ys = data(batch)
    first, second = compiled(marked, w, batch, algo), compiled(plain, w, batch, algo)
    assert trace_numbers(first) == trace_numbers(second)
    same(gradient(first, xs, ys), gradient(second, xs, ys))
    same(gradient(first, xs, ys, chunk=2), gradient(second, xs, ys))


@pytest.mark.parametrize(("algo", "batch"), [("d_rtrl", 2), ("pp_prop", None)])
def test_braintrace_layers_learn_as_those_of_brainstate(algo, batch):
    braintrace = pytest.importorskip("braintrace")

    class Net(brainstate.nn.Module):
        def __init__(self, nn):
            super().__init__()
            self.cell = nn.ValinaRNNCell(3, 4)
            self.readout = nn.Linear(4, 2)

        def update(self, x):
            return self.readout(self.cell(x))

    lead = () if batch is None else (batch,)
    xs = draw.standard_normal((5, *lead, 3))
    ys = draw.standard_normal((5, *lead, 2))
    found = []
    for nn in (braintrace.nn, brainstate.nn):
        brainstate.random.seed(1)
        net = Net(nn)
        for state in net.states(brainstate.ParamState).values():
            numbers = np.random.default_rng(1)
            state.value = jax.tree.map(
                lambda v, n=numbers: jnp.asarray(n.standard_normal(v.shape)), state.value
            )
        brainstate.nn.init_all_states(net, batch_size=batch)
        step = etcompile.compile(net, xs[0], algo=algo)
        found.append((step.scan_value_and_grad(squares, chunk=2)(xs, ys)[1], trace_numbers(step)))
    (first, size), (second, wanted) = found
    assert size == wanted
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        same(a, b)


def test_a_gru_of_braintrace_costs_what_the_stock_one_costs():
    braintrace = pytest.importorskip("braintrace")
    net = braintrace.nn.GRUCell(64, 256)
    step = etcompile.compile(net, jnp.ones((16, 64)), batch_size=16)
    assert trace_numbers(step) == 2 * 16 * (320 * 256 + 256)
