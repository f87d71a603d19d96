"""Loops inside a step stay loops: the same numbers as unrolled, at a cost that does not depend on the number of rounds."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import etcompile
from etcompile.errors import ModelError
from etcompile.frontend import jaxpr

pytestmark = pytest.mark.usefixtures("by_numpy")

BATCH, INPUTS, UNITS, STEPS = 2, 3, 4, 5


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    (v,), (t,) = primals, tangents
    return spike(v), t / (1 + jnp.abs(3 * v)) ** 2


def rounds_of(one, carry, rounds, **options):
    return jax.lax.scan(one, carry, None, length=rounds, **options)


def lif(rounds):
    """Current and membrane, integrated in small steps; the spikes of all rounds are counted."""

    def step(p, s, x):
        current = x @ p["w"] + s["z"] @ p["r"]

        def one(carry, _):
            v, i, count = carry
            i = i + 0.2 / rounds * (current - i)
            v = v + 1 / rounds * (i - p["leak"] * v)
            z = spike(v - 0.3)
            v = v - z
            return (v, i, count + z), z

        start = (s["v"], s["i"], jnp.zeros_like(s["v"]))
        (v, i, count), zs = rounds_of(one, start, rounds)
        return {"v": v, "i": i, "z": zs[-1]}, (count + zs.mean(0)) @ p["o"] + v[:, :2]

    return step, {"w": (INPUTS, UNITS), "r": (UNITS, UNITS), "leak": (UNITS,), "o": (UNITS, 2)}, "viz"


def two_states(rounds):
    """Element by element with two states, as Izhikevich's neuron or gates of ion channels: exact."""

    def step(p, s, x):
        current = x @ p["w"]

        def one(k, carry):
            v, u = carry
            return v + 0.5 / rounds * (v - v**3 / 3 - u + current + 0.01 * k), u + 0.3 / rounds * (
                v * p["a"] - 0.8 * u
            )

        v, u = jax.lax.fori_loop(0, rounds, one, (s["v"], s["u"]))
        return {"v": v, "u": u}, v @ p["o"]

    return step, {"w": (INPUTS, UNITS), "a": (UNITS,), "o": (UNITS, 2)}, "vu"


def liquid(rounds):
    """Weights meet data in every round."""

    def step(p, s, x):
        def one(v, _):
            inner = jnp.tanh(v @ jnp.abs(p["r"]) + x @ p["w"])
            v = v + 0.3 * (inner * p["gain"] - v)
            return v, v

        v, vs = rounds_of(one, s["v"], rounds, reverse=True)
        return {"v": v}, vs.mean(0) @ p["o"]

    return step, {"w": (INPUTS, UNITS), "r": (UNITS, UNITS), "gain": (UNITS,), "o": (UNITS, 2)}, "v"


def encoder(rounds):
    """Weights inside of the loop, but no memory in it that mixes units: exact."""

    def step(p, s, x):
        def one(carry, x):
            v, seen = carry
            seen = 0.5 * seen + 0.1 * x
            return (0.9 * v + jnp.tanh(seen @ p["w"] + p["b"]), seen), None

        series = jnp.sin(x + jnp.arange(rounds)[:, None, None])
        (v, _), _ = jax.lax.scan(one, (s["v"], jnp.zeros_like(x)), series)
        return {"v": v}, v @ p["o"]

    return step, {"w": (INPUTS, UNITS), "b": (UNITS,), "o": (UNITS, 2)}, "v"


def layered(rounds):
    """A loop over layers, each with weights of its own."""

    def step(p, s, x):
        def one(carry, w):
            return jnp.tanh(carry @ w), None

        top, _ = jax.lax.scan(one, x @ p["w"], p["deep"])
        v = 0.8 * s["v"] + top
        return {"v": v}, v @ p["o"]

    return step, {"w": (INPUTS, UNITS), "deep": (rounds, UNITS, UNITS), "o": (UNITS, 2)}, "v"


def nested(rounds):
    """A loop in a loop, with weights in the inner one, a condition and a random key."""

    def step(p, s, x):
        def outer(carry, _):
            v, key = carry
            key, now = jax.random.split(key)
            v = v + 0.01 * jax.random.normal(now, v.shape, v.dtype)

            def inner(_, u):
                u = jax.lax.cond(x.sum() > 0, lambda u: u * 0.95, lambda u: u * 0.9, u)
                return u + 0.1 * jnp.tanh(x @ p["w"] - u * p["gain"])

            return (jax.lax.fori_loop(0, 3, inner, v), key), None

        (v, _), _ = rounds_of(outer, (s["v"], jax.random.key(0)), rounds)
        return {"v": v}, v @ p["o"]

    return step, {"w": (INPUTS, UNITS), "gain": (UNITS,), "o": (UNITS, 2)}, "v"


def indexed(rounds):
    """A weight read at a running index."""

    def step(p, s, x):
        def one(k, v):
            return v + 0.1 * (jnp.tanh(x @ p["w"] * p["gain"][k]) - v)

        v = jax.lax.fori_loop(0, rounds, one, s["v"])
        return {"v": v}, v @ p["o"]

    return step, {"w": (INPUTS, UNITS), "gain": (rounds,), "o": (UNITS, 2)}, "v"


def alone(rounds):
    """One example, no batch axis."""

    def step(p, s, x):
        drive = x[0] @ p["w"]

        def one(k, v):
            return v + 0.1 * (jnp.tanh(drive) - v * p["leak"])

        v = jax.lax.fori_loop(0, rounds, one, s["v"][0])
        return {"v": jnp.stack([v, s["v"][1]])}, v[:2]

    return step, {"w": (INPUTS, UNITS), "leak": (UNITS,)}, "v"


MODELS = [lif, two_states, liquid, encoder, layered, nested, alone]
EXACT = {two_states, encoder, alone, nested}


def made(model, rounds):
    step, shapes, states = model(rounds)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    params = {
        name: 0.7 * jax.random.normal(key, shape) + (len(shape) == 1)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return step, params, {name: jnp.zeros((BATCH, UNITS)) for name in states}


def data(outputs):
    keys = jax.random.split(jax.random.key(2), 2)
    xs = jax.random.normal(keys[0], (STEPS, BATCH, INPUTS)) + 0.5
    return xs, jax.random.normal(keys[1], (STEPS, *outputs))


def square(out, y):
    return jnp.sum((out - y) ** 2)


def learned(monkeypatch, model, rounds, limit, algo="d_rtrl", chunk=1, **options):
    """The compiled step, losses and gradients, with loops of more than ``limit`` operations kept."""
    monkeypatch.setattr(jaxpr, "UNROLL_LIMIT", limit)
    step, params, state = made(model, rounds)
    xs, ys = data(jax.eval_shape(step, params, state, jnp.zeros((BATCH, INPUTS)))[1].shape)
    compiled = etcompile.compile(etcompile.from_function(step, params, state), xs[0], algo=algo, **options)
    return compiled, *compiled.scan_value_and_grad(square, chunk=chunk)(xs, ys)


def through_time(model, rounds):
    step, params, state = made(model, rounds)
    xs, ys = data(jax.eval_shape(step, params, state, jnp.zeros((BATCH, INPUTS)))[1].shape)

    def total(params):
        def one(state, item):
            state, out = step(params, state, item[0])
            return state, square(out, item[1])

        return jnp.sum(jax.lax.scan(one, state, (xs, ys))[1])

    return jax.grad(total)(params)


def assert_same(found, expected):
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        assert scale > 1e-6, f"{name} is dead"
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10 * scale, err_msg=name)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_a_loop_gives_the_numbers_of_the_unrolled_program(monkeypatch, model):
    kept, losses, grads = learned(monkeypatch, model, 5, 0)
    flat, same_losses, same = learned(monkeypatch, model, 5, 10**6)
    np.testing.assert_allclose(losses, same_losses, rtol=1e-12)
    assert_same(grads, same)
    assert kept.exact == flat.exact == (model in EXACT)
    assert bool(kept.program.header.cuts) == bool(flat.program.header.cuts)
    if model in EXACT:
        assert_same(grads, through_time(model, 5))


def test_cuts_in_a_loop_name_the_line_in_its_body(monkeypatch):
    kept, _, _ = learned(monkeypatch, liquid, 5, 0)
    flat, _, _ = learned(monkeypatch, liquid, 5, 10**6)
    assert {c.source for c in kept.program.header.cuts} == {c.source for c in flat.program.header.cuts}
    assert {c.primitive for c in kept.program.header.cuts} == {"dot_general"}


def test_a_weight_read_at_a_running_index_learns(monkeypatch):
    step, _, grads = learned(monkeypatch, indexed, 5, 0, "rtrl")
    assert_same(grads, through_time(indexed, 5))
    assert not learned(monkeypatch, indexed, 5, 0)[0].exact


@pytest.mark.parametrize("model", [lif, liquid], ids=lambda m: m.__name__)
@pytest.mark.parametrize("algo", ["rtrl", "pp_prop", "e_prop"])
def test_other_rules_agree_too(monkeypatch, model, algo):
    _, _, grads = learned(monkeypatch, model, 4, 0, algo)
    assert_same(grads, learned(monkeypatch, model, 4, 10**6, algo)[2])


@pytest.mark.parametrize("model", [liquid, nested], ids=lambda m: m.__name__)
def test_a_large_pattern_of_snap_is_backpropagation(monkeypatch, model):
    _, _, state = made(model, 40)
    states = sum(v.size for v in jax.tree.leaves(state))
    assert_same(learned(monkeypatch, model, 40, 0, "snap", "auto", n=states)[2], through_time(model, 40))


@pytest.mark.parametrize("model", [lif, liquid], ids=lambda m: m.__name__)
def test_chunks_that_do_not_divide_the_sequence(monkeypatch, model):
    _, losses, grads = learned(monkeypatch, model, 6, 0, chunk=3)
    _, one_by_one, same = learned(monkeypatch, model, 6, 0)
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-12)
    assert_same(grads, same)


def test_a_loop_of_many_rounds_equals_backpropagation_through_time(monkeypatch):
    step, _, grads = learned(monkeypatch, two_states, 1000, jaxpr.UNROLL_LIMIT)
    assert step.exact
    assert_same(grads, through_time(two_states, 1000))


def search(p, s, x, inside):
    """A while loop in a loop, which reads no trained parameter unless ``inside``."""

    def one(v, _):
        start = v if inside else x.sum()
        found = jax.lax.while_loop(lambda c: jnp.sum(c) < 1, lambda c: c + 0.5, start)
        return v + 0.1 * (jnp.tanh(x @ p["w"]) - v) + 0.01 * found, None

    v, _ = rounds_of(one, s["v"], 60)
    return {"v": v}, v


@pytest.mark.parametrize("inside", [False, True])
def test_a_while_loop_in_a_loop_is_data_or_refused(inside):
    params = {"w": jax.random.normal(jax.random.key(1), (INPUTS, UNITS))}
    model = etcompile.from_function(
        lambda p, s, x: search(p, s, x, inside), params, {"v": jnp.zeros((BATCH, UNITS))}
    )
    xs, ys = data((BATCH, UNITS))
    if inside:
        with pytest.raises(ModelError, match="while loop"):
            etcompile.compile(model, xs[0])
    else:
        step = etcompile.compile(model, xs[0])
        _, grads = step.scan_value_and_grad(square)(xs, ys)
        assert step.exact
        assert float(jnp.abs(grads["w"]).max()) > 1e-3


def size(closed):
    """Operations of a jaxpr, those of inner ones included."""
    total = 0
    for eqn in closed.eqns:
        inner = [v for v in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")) if hasattr(v, "eqns") or hasattr(v, "jaxpr")]  # fmt: skip
        total += 1 + sum(size(getattr(v, "jaxpr", v)) for v in inner)
    return total


@pytest.mark.parametrize("model", [lif, two_states, nested], ids=lambda m: m.__name__)
def test_the_compiled_program_does_not_grow_with_the_rounds(model):
    sizes = []
    for rounds in (600, 1000):
        fn, params, state = made(model, rounds)
        xs, ys = data(jax.eval_shape(fn, params, state, jnp.zeros((BATCH, INPUTS)))[1].shape)
        step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
        carry = step.init_carry()

        def loss(params, step=step, carry=carry, xs=xs, ys=ys):
            return square(step.apply(params, carry, xs[0])[1], ys[0])

        sizes.append(size(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert sizes[0] == sizes[1]


def test_a_for_loop_of_a_module_is_a_loop():
    class Cell(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(0.5 * jax.random.normal(jax.random.key(0), (INPUTS, UNITS)))
            self.r = brainstate.ParamState(0.5 * jax.random.normal(jax.random.key(1), (UNITS, UNITS)))
            self.v = brainstate.HiddenState(jnp.zeros((BATCH, UNITS)))

        def update(self, x):
            def one(k):
                self.v.value = self.v.value + 0.1 * jnp.tanh(
                    x @ self.w.value + self.v.value @ self.r.value - self.v.value
                )
                return self.v.value

            return jnp.mean(jnp.asarray(brainstate.transform.for_loop(one, jnp.arange(40))), axis=0)

    net = Cell()
    xs, ys = data((BATCH, UNITS))
    step = etcompile.compile(net, xs[0], algo="rtrl")
    _, grads = step.scan_value_and_grad(square)(xs, ys)

    def total(params):
        def one(v, item):
            def inner(v, _):
                v = v + 0.1 * jnp.tanh(item[0] @ params["w"] + v @ params["r"] - v)
                return v, v

            v, vs = jax.lax.scan(inner, v, None, length=40)
            return v, square(vs.mean(0), item[1])

        return jnp.sum(jax.lax.scan(one, jnp.zeros((BATCH, UNITS)), (xs, ys))[1])

    expected = jax.grad(total)({"w": net.w.value, "r": net.r.value})
    found = {key[-1] if isinstance(key, tuple) else key: v for key, v in grads.items()}
    assert_same(found, expected)
