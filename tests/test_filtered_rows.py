"""Rows of a dense trace that are constant beside others that are not: filters of what the weight meets take their place."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from oracles import relative_error

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")

T, I, O = 7, 5, 4


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def squared(out, target):
    return jnp.mean((out - target) ** 2)


@jax.custom_jvp
def spike(v):
    return (v > 0.5).astype(v.dtype)


spike.defjvp(lambda v, dv: (spike(v[0]), dv[0] / (1 + jnp.abs(v[0] - 0.5)) ** 2))


def current(params, state, x):
    """An exponential synapse beside a membrane that spikes, with recurrent weights."""
    i = 0.8 * state["i"] + x @ params["w"] + spike(state["v"]) @ params["u"] + params["b"]
    v = 0.9 * state["v"] + 0.2 * i - spike(state["v"])
    return {"i": i, "v": v}, jnp.tanh(v)


def adaptive(params, state, x):
    """The same with a threshold that adapts: two rows that read each other are left."""
    z = spike(state["v"] - 0.3 * state["a"])
    i = 0.8 * state["i"] + x @ params["w"]
    v = 0.9 * state["v"] + 0.2 * i - z
    return {"i": i, "v": v, "a": 0.97 * state["a"] + z}, jnp.tanh(v)


def two_synapses(params, state, x):
    """Two weights, each with a synapse and a decay of its own, into one membrane."""
    i = 0.8 * state["i"] + x @ params["w"]
    j = 0.6 * state["j"] + jnp.cos(x) @ params["u"]
    v = 0.9 * state["v"] + 0.2 * i - 0.3 * j - spike(state["v"])
    return {"i": i, "j": j, "v": v}, jnp.tanh(v)


def alpha(params, state, x):
    """An alpha synapse: two constant rows, one of which reads the other."""
    g = 0.7 * state["g"] + x @ params["w"]
    i = 0.8 * state["i"] + 0.3 * state["g"]
    v = 0.9 * state["v"] + 0.2 * i - spike(state["v"])
    return {"g": g, "i": i, "v": v}, jnp.tanh(v)


def both_ways(params, state, x):
    """A weight with two rows of different decay, both filters."""
    y = x @ params["w"]
    i, j = 0.8 * state["i"] + y, 0.5 * state["j"] - 2.0 * y
    v = jnp.tanh(0.9 * state["v"] + 0.2 * i + 0.1 * j)
    return {"i": i, "j": j, "v": v}, v


def two_decays(params, state, x):
    """Units of two kinds."""
    i = jnp.where(jnp.arange(O) < 2, 0.7, 0.85) * state["i"] + 0.5 * (x @ params["w"])
    v = jnp.tanh(0.9 * state["v"] + 0.2 * i)
    return {"i": i, "v": v}, v


def turned(params, state, x):
    """The weight with its axes the other way round."""
    i = 0.8 * state["i"] + jnp.einsum("oi,...i->...o", params["wt"], x)
    v = jnp.tanh(0.9 * state["v"] + 0.2 * i)
    return {"i": i, "v": v}, v


def fused(params, state, x):
    """One weight for the current and for a gate of the membrane."""
    y, g = jnp.split(x @ params["wide"], 2, axis=-1)
    i = 0.8 * state["i"] + y
    v = jax.nn.sigmoid(g) * state["v"] + 0.2 * i
    return {"i": i, "v": v}, jnp.tanh(v)


#: Models, their states, and what they carry for each example: numbers of traces of weights, of their filters.
MODELS = {
    "current": (current, "iv", 2 * I * O - O * (I - O), I + O),
    "adaptive": (adaptive, "iva", 2 * I * O, I),
    "two_synapses": (two_synapses, "ijv", 2 * I * O, 2 * I),
    "alpha": (alpha, "giv", I * O, 2 * I),
    "both_ways": (both_ways, "ijv", I * O, 2 * I),
    "two_decays": (two_decays, "iv", I * O, 2 * I),
    "turned": (turned, "iv", I * O, I),
}
USED = {
    "current": "wub",
    "two_synapses": ("w", "u5"),
    "turned": ("wt",),
    "fused": ("wide",),
}


def params_of(name):
    shapes = {"w": (I, O), "u": (O, O), "b": (O,), "wt": (O, I), "wide": (I, 2 * O), "u5": (I, O)}
    used = USED.get(name, "w")
    return {k[0] if k == "u5" else k: 0.7 * draw(n, *shapes[k]) for n, k in enumerate(used)}


def compiled(name, batch=(2,), **options):
    fn, states = (fused, "iv") if name == "fused" else MODELS[name][:2]
    params = params_of(name)
    state = {k: jnp.linspace(0.0, 0.8, O) + jnp.zeros((*batch, O)) for k in states}
    model = etcompile.from_function(fn, params, state)
    return etcompile.compile(model, jnp.zeros((*batch, I)), **options), fn, params, state


def data(batch=(2,), steps=T):
    return draw(20, steps, *batch, I), draw(21, steps, *batch, O)


def whole(name, **options):
    """The same without optimisations: every row of every trace."""
    return compiled(name, optimise=False, **options)[0]


def twice(step, chunk, batch=(2,), mask=None):
    """Gradients of two sequences, the second with the traces that the first left."""
    xs, ys = data(batch)
    run = step.scan_value_and_grad(squared, chunk=chunk)
    masks = {} if mask is None else {"mask": mask}
    return [run(xs, ys, **masks)[1], run(xs[::-1], ys, **masks)[1]]


def carried(step):
    return sum(v.size for v in jax.tree.leaves(step.traces))


@pytest.mark.parametrize("name", MODELS)
def test_constant_rows_are_not_in_the_trace(name):
    step = compiled(name)[0]
    filters = sum(v.size for k, v in step.traces.items() if k.startswith("z") and v.ndim)
    _, _, traces, of_filters = MODELS[name]
    assert filters == 2 * of_filters
    assert sum(
        e.size for k, v in step.traces.items() if k.startswith("e") for e in jax.tree.leaves(v)
    ) == 2 * (traces + (O if name == "current" else 0))
    assert carried(step) < carried(whole(name))
    assert etcompile.parse_program(str(step.program)) == step.program


@pytest.mark.parametrize(
    ("name", "algo"),
    [(name, algo) for name in (*MODELS, "fused") for algo in ("d_rtrl", "e_prop")]
    + [("alpha", "superspike"), ("current", "superspike"), ("adaptive", "pp_prop")],
)
def test_gradients_are_those_of_the_whole_trace(name, algo):
    wanted = twice(whole(name, algo=algo), 1)
    step = compiled(name, algo=algo)[0]
    for chunk in (1, 3):  # which does not divide the sequence
        step.reset()
        assert relative_error(twice(step, chunk), wanted) < 1e-10


@pytest.mark.parametrize("name", [n for n in MODELS if n != "current"])  # that one has recurrent weights
@pytest.mark.parametrize("chunk", [1, 3])
def test_they_equal_backpropagation(name, chunk):
    step, fn, params, state = compiled(name)
    if name == "adaptive":
        assert step.exact
    xs, ys = data()

    def losses(params):
        def body(state, item):
            state, out = fn(params, state, item[0])
            return state, squared(out, item[1])

        return jnp.sum(lax.scan(body, state, (xs, ys))[1])

    assert (
        relative_error(step.scan_value_and_grad(squared, chunk=chunk)(xs, ys)[1], jax.grad(losses)(params))
        < 1e-10
    )


@pytest.mark.parametrize("algo", ["d_rtrl", "e_prop"])
def test_masks_resets_windows_and_single_examples(algo):
    for batch in ((), (2,)):
        full, step = whole("current", batch=batch, algo=algo), compiled("current", batch=batch, algo=algo)[0]
        mask = jnp.arange(T) % 3 != 1
        wanted = twice(full, 1, batch, mask)
        for chunk in (2, 5):
            step.reset()
            assert relative_error(twice(step, chunk, batch, mask), wanted) < 1e-10
        xs, ys = data(batch)
        for one in (full, step):
            one.reset()
        run = [one.value_and_grad(squared) for one in (full, step)]
        for x, y in zip(xs, ys, strict=True):
            assert relative_error(run[1](x, y)[1], run[0](x, y)[1]) < 1e-10
    one = data(steps=1)
    full, step = whole("adaptive", algo=algo), compiled("adaptive", algo=algo)[0]
    for chunk in (1, 4):
        found, wanted = (
            s.scan_value_and_grad(squared, chunk=c)(*one)[1] for s, c in ((step, chunk), (full, 1))
        )
        assert relative_error(found, wanted) < 1e-10
    windows = [f("adaptive", within="exact") for f in (whole, lambda *a, **k: compiled(*a, **k)[0])]
    assert relative_error(twice(windows[1], 3), twice(windows[0], 3)) < 1e-10


def test_without_a_loss_and_without_kept_traces():
    xs, ys = data()
    step, full = compiled("adaptive")[0], whole("adaptive")
    step.scan(xs)
    full.scan(xs)
    found, wanted = (s.scan_value_and_grad(squared, chunk=4)(xs, ys)[1] for s in (step, full))
    assert relative_error(found, wanted) < 1e-10
    alone = compiled("adaptive", schedule=etcompile.Schedule(keep_traces=False))[0]
    step.reset()
    assert (
        relative_error(
            *(s.scan_value_and_grad(squared, chunk=c)(xs, ys)[1] for s, c in ((alone, T), (step, 1)))
        )
        < 1e-10
    )


def test_updates_at_every_step():
    optax = pytest.importorskip("optax")
    ends = []
    for step in (compiled("current")[0], whole("current")):
        losses = step.learn(squared, optax.sgd(0.05))(*data())
        ends.append((losses, step.params))
    assert relative_error(*ends) < 1e-10


def test_stored_in_sixteen_bits():
    """Filters are small and keep their own dtype."""
    step = compiled("adaptive", schedule=etcompile.Schedule(trace_dtype="bfloat16"))[0]
    kinds = {k: {v.dtype for v in jax.tree.leaves(value)} for k, value in step.traces.items()}
    assert kinds["z0"] == {jnp.dtype("float64")} and kinds["e0"] == {jnp.dtype("bfloat16")}
    found, wanted = twice(step, 3), twice(whole("adaptive"), 3)
    assert 0 < relative_error(found, wanted) < 2e-2


def test_a_decay_for_every_unit_keeps_its_row():
    def fn(params, state, x):
        i = jnp.linspace(0.1, 0.9, 20) * state["i"] + x @ params["w"]
        v = jnp.tanh(0.9 * state["v"] + 0.2 * i)
        return {"i": i, "v": v}, v

    state = {k: jnp.zeros((2, 20)) for k in "iv"}
    step = etcompile.compile(etcompile.from_function(fn, {"w": draw(0, I, 20)}, state), jnp.zeros((2, I)))
    assert carried(step) == 2 * 2 * I * 20


def test_convolutions():
    def fn(params, state, x):
        y = lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        i = 0.8 * state["i"] + y
        v = jnp.tanh(0.9 * state["v"] + 0.2 * i)
        return {"i": i, "v": v}, v

    xs, ys = draw(3, T, 2, 4, 5, 2), draw(4, T, 2, 4, 5, 3)
    model = etcompile.from_function(
        fn, {"k": draw(5, 3, 3, 2, 3)}, {k: jnp.zeros((2, 4, 5, 3)) for k in "iv"}
    )
    step, full = (etcompile.compile(model, xs[0], optimise=o) for o in (True, False))
    assert carried(step) < 0.6 * carried(full)
    wanted = [full.scan_value_and_grad(squared, chunk=1)(xs, ys)[1] for _ in range(2)]
    for chunk in (1, 3):
        step.reset()
        found = [step.scan_value_and_grad(squared, chunk=chunk)(xs, ys)[1] for _ in range(2)]
        assert relative_error(found, wanted) < 1e-10


def test_embeddings():
    def fn(params, state, x):
        i = 0.8 * state["i"] + params["table"][x]
        v = jnp.tanh(0.9 * state["v"] + 0.2 * i)
        return {"i": i, "v": v}, v

    xs, ys = jax.random.randint(jax.random.key(0), (T, 2), 0, I), draw(1, T, 2, O)
    model = etcompile.from_function(fn, {"table": draw(2, I, O)}, {k: jnp.zeros((2, O)) for k in "iv"})
    step, full = (etcompile.compile(model, xs[0], optimise=o) for o in (True, False))
    wanted = [full.scan_value_and_grad(squared, chunk=1)(xs, ys)[1] for _ in range(2)]
    for chunk in (1, 3):
        step.reset()
        found = [step.scan_value_and_grad(squared, chunk=chunk)(xs, ys)[1] for _ in range(2)]
        assert relative_error(found, wanted) < 1e-10


def test_a_chunk_has_one_product_for_each_row_and_one_for_the_gradient():
    """With the filter of the synapse taken of the credits; else each would have another one."""
    batch, steps, inputs = 2, 6, 11

    def fn(params, state, x):
        i = 0.8 * state["i"] + x @ params["w"]
        v = jnp.tanh(0.9 * state["v"] + 0.2 * i)
        return {"i": i, "v": v}, v

    state = {k: jnp.zeros((batch, O)) for k in "iv"}
    model = etcompile.from_function(fn, {"w": draw(0, inputs, O)}, state)
    step = etcompile.compile(model, jnp.zeros((batch, inputs)))
    run = step.scan_value_and_grad(squared, chunk=steps)
    jaxpr = brainstate.transform.make_jaxpr(run)(
        jnp.zeros((steps, batch, inputs)), jnp.zeros((steps, batch, O))
    )[0]
    over_time = [shape for shape in _products(jaxpr.jaxpr) if steps in shape or steps * batch in shape]
    of_x = [shape for shape in over_time if inputs in shape]
    assert len(of_x) == 3  # and the model's own


def _products(jaxpr):
    """Shapes of the first operand of every product."""
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            yield e.invars[0].aval.shape + e.invars[1].aval.shape
        for value in e.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _products(inner)


def test_a_checkpoint_with_whole_traces_is_refused(tmp_path):
    step, full = compiled("adaptive")[0], whole("adaptive")
    for one in (step, full):
        one.scan(data()[0])
    etcompile.Checkpoints(tmp_path).save(full, 1)
    with pytest.raises(etcompile.CheckpointError, match=r"traces.e0.1, traces.z0"):
        etcompile.Checkpoints(tmp_path).restore(step)
