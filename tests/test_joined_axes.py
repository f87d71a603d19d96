"""Elements of a state that a step joins along an axis of a few of them are one unit: matrices that are computed, norms, windows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_gradients import grad
from oracles import relative_error

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")
TOLERANCE = 1e-10
B, I, N, T = 2, 3, 4, 7


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def square(out, target):
    return jnp.sum((out - target) ** 2)


def compared(fn, params, state, xs=None):
    """The step, and how far the gradients of steps and chunks are from backpropagation through time."""
    xs = draw(0, T, B, I) if xs is None else xs
    _, out = jax.eval_shape(fn, params, state, xs[0])
    ys = draw(1, len(xs), *out.shape)

    def total(params):
        def body(state, item):
            state, out = fn(params, state, item[0])
            return state, square(out, item[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, ys))[1])

    step, wanted = etcompile.compile(etcompile.from_function(fn, params, state), xs[0]), grad(total, params)
    errors = []
    for chunk in (1, 3):
        step.reset()
        _, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, ys)
        errors.append(relative_error(grads, wanted))
    return step, max(errors)


def check(fn, params, state, xs=None):
    step, error = compared(fn, params, state, xs)
    assert step.exact, str(step.report())
    assert error < TOLERANCE
    return step


def rotation(angle):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s], -1), jnp.stack([s, c], -1)], -2)


PAIRS = {"s": draw(2, B, N, 2)}
PARAMS = {"a": 0.5 * draw(3, N), "w": draw(4, I, N), "u": draw(5, I, N), "r": 0.3 * draw(6, I, N)}


def turned(params, s, x):
    """By a matrix for each unit, one for all, one from the input, one from the state; in the forms in which one writes it."""
    own, all_same = rotation(params["a"]), rotation(params["a"][0])
    return {
        "einsum": lambda: jnp.einsum("bnk,nkj->bnj", s, own),
        "einsum the other way round": lambda: jnp.einsum("njk,bnk->bnj", own, s),
        "matmul of a column": lambda: jnp.matmul(own, s[..., None])[..., 0],
        "shared": lambda: s @ all_same,
        "scaled first": lambda: (0.9 * s) @ all_same,
        "sum of products": lambda: (s[..., None] * own).sum(-2),
        "vmap": lambda: jax.vmap(jax.vmap(jnp.matmul), (0, None))(s, own),
        "from the input": lambda: jnp.einsum("bnk,bnkj->bnj", s, rotation(params["a"] + x @ params["r"])),
        "from the state": lambda: jnp.einsum("bnk,bnkj->bnj", s, rotation(params["a"] + s[..., 0])),
        "slices of a curve": lambda: jnp.stack([jnp.tanh(s)[..., 1], params["a"] * jnp.tanh(s)[..., 0]], -1),
        "reversed": lambda: jnp.tanh(s) + 0.3 * jnp.tanh(s)[..., ::-1],
        "normed": lambda: s / jnp.sqrt(1 + (s**2).sum(-1, keepdims=True)),
        "softmax": lambda: s + jax.nn.softmax(params["a"][:, None] * s, -1),
    }


@pytest.mark.parametrize("how", turned(PARAMS, PAIRS["s"], draw(0, B, I)))
def test_pairs_that_are_joined(how):
    def fn(params, state, x):
        new = 0.9 * turned(params, state["s"], x)[how]()
        new = new + jnp.stack([x @ params["w"], x @ params["u"]], -1)
        return {"s": new}, jnp.tanh(new.sum(-1))

    step = check(fn, PARAMS, PAIRS)
    assert [path for path, _ in step.program.header.groups[0].states] == ["s.0", "s.1"]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_may_lie_anywhere(axis):
    def fn(params, state, x):
        old = jnp.moveaxis(state["s"], axis, -1)
        new = 0.9 * jnp.einsum("bnk,nkj->bnj", old, rotation(params["a"]))
        new = new + jnp.stack([x @ params["w"], x @ params["u"]], -1)
        return {"s": jnp.moveaxis(new, -1, axis)}, jnp.tanh(new.sum(-1))

    check(fn, PARAMS, {"s": jnp.moveaxis(PAIRS["s"], -1, axis)})


@pytest.mark.parametrize("inputs", [I, N])
def test_without_a_batch(inputs):
    """Where a parameter has an entry for each unit, the first axis is no batch, be there as many inputs as units or not."""

    def fn(params, state, x):
        s = 0.9 * jnp.einsum("nk,nkj->nj", state["s"], rotation(params["a"]))
        s = s + jnp.stack([x @ params["w"], jnp.tanh(x @ params["w"])], -1)
        return {"s": s}, s.sum(-1)

    params = {"a": PARAMS["a"], "w": draw(4, inputs, N)}
    check(fn, params, {"s": PAIRS["s"][0]}, draw(0, T, inputs))


@pytest.mark.parametrize("size", [3, 4])
def test_matrices_that_are_put_together_of_trained_numbers(size):
    """A circulant matrix of a few numbers for each unit."""

    def fn(params, state, x):
        matrix = jnp.stack([jnp.roll(params["m"], k, -1) for k in range(size)], -2)
        s = jnp.tanh(jnp.einsum("bnk,nkj->bnj", state["s"], matrix) + (x @ params["w"])[..., None])
        return {"s": s}, s.sum(-1)

    check(fn, {"m": 0.5 * draw(7, 2, size), "w": draw(4, I, 2)}, {"s": draw(2, B, 2, size)})


def test_constant_matrices_may_be_larger():
    """The memory of a Legendre unit; each channel is a unit."""
    matrix = jnp.asarray(0.4 * np.random.default_rng(8).normal(size=(6, 6)))

    def fn(params, state, x):
        m = jnp.einsum("jk,bnk->bnj", matrix, state["m"]) + (x @ params["w"])[..., None] * jnp.arange(1.0, 7)
        return {"m": m}, jnp.tanh(m @ params["e"])

    check(fn, {"w": draw(4, I, N), "e": draw(5, 6)}, {"m": draw(2, B, N, 6)})


def test_what_goes_on_element_by_element_is_of_parts_as_well():
    """A filter of a packed state, and a sum of its parts."""

    def fn(params, state, x):
        v, a = state["s"][..., 0], state["s"][..., 1]
        s = jnp.stack([0.5 * v + a * params["a"] + x @ params["w"], 0.3 * a - v], -1)
        m = 0.8 * state["m"] + jnp.sin(s)
        h = 0.7 * state["h"] + m.sum(-1)
        return {"s": s, "m": m, "h": h}, jnp.tanh(m.sum(-1)) + h

    step = check(fn, PARAMS, {**PAIRS, "m": draw(7, B, N, 2), "h": draw(8, B, N)})
    assert len(step.program.header.groups[0].states) == 5


@pytest.mark.parametrize("size", [6, 12])
@pytest.mark.parametrize("how", ["halves turned", "rolled by a third", "halves beside a filter"])
def test_a_few_large_parts_of_a_state_that_is_read_whole(how, size):
    def fn(params, state, x):
        s, half = state["s"], size // 2
        if how == "halves turned":
            other = jnp.concatenate([-s[..., half:], s[..., :half]], -1)
        elif how == "rolled by a third":
            other = jnp.roll(jnp.tanh(s), size // 3, -1)
        else:
            other = jnp.concatenate([s[..., half:], jnp.tanh(s[..., :half])], -1) + state["m"]
        s = 0.7 * (s * jnp.cos(params["a"]) + other * jnp.sin(params["a"])) + x @ params["w"]
        return {"s": s, "m": 0.9 * state["m"] + s}, s

    params = {"a": draw(3, size), "w": draw(4, I, size)}
    check(fn, params, {"s": draw(2, B, size), "m": draw(5, B, size)})


@pytest.mark.parametrize("how", ["concatenate", "roll"])
@pytest.mark.parametrize("read", ["sum", "einsum"])
def test_a_window_over_the_last_inputs(how, read):
    """The convolution in front of a gated recurrence: the old inputs are read as a whole, and moved on."""

    def fn(params, state, x):
        u = x @ params["w"]
        if how == "concatenate":
            window = jnp.concatenate([state["window"], u[:, None]], 1)
            new = window[:, 1:]
        else:
            window = new = jnp.roll(state["window"], -1, 1).at[:, -1].set(u)
        kernel = params["kernel"][: window.shape[1]]
        c = (window * kernel).sum(1) if read == "sum" else jnp.einsum("bkn,kn->bn", window, kernel)
        h = jax.nn.sigmoid(x @ params["u"]) * state["h"] + jnp.tanh(c)
        return {"window": new, "h": h}, h

    params = {**PARAMS, "kernel": draw(7, 4, N)}
    check(fn, params, {"window": draw(2, B, 3, N), "h": draw(3, B, N)})


def test_a_window_of_windows():
    """A slice of pieces of slices: what was moved twice and cut once."""

    def fn(params, state, x):
        u = x @ params["w"]
        twice = jnp.concatenate(
            [jnp.concatenate([state["s"], u[:, None]], 1)[:, 1:], jnp.tanh(u)[:, None]], 1
        )
        s = twice[:, 1:6]
        return {"s": s}, (s * params["k"]).sum(1)

    check(fn, {"w": PARAMS["w"], "k": draw(7, 5, N)}, {"s": draw(2, B, 5, N)})


@pytest.mark.parametrize("how", ["parts", "joined"])
def test_in_the_rounds_of_a_loop(how):
    """An equation in small steps, in a loop that stays one."""
    turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])

    def fn(params, state, x):
        u = x @ params["w"]

        def round_of(k, s):
            if how == "parts":
                v, a = s[..., 0], s[..., 1]
                change = jnp.stack([u - v - params["a"] * a, jnp.tanh(v) - a], -1)
            else:
                change = s * (params["a"][:, None] - (s**2).sum(-1, keepdims=True)) + s @ turn + u[..., None]
            return s + 0.02 * change

        s = jax.lax.fori_loop(0, 40, round_of, state["s"])
        return {"s": s}, s[..., 0]

    step = check(fn, PARAMS, PAIRS)
    assert [path for path, _ in step.program.header.groups[0].states] == ["s.0", "s.1"]


def made_of(weights, of):
    """Recurrent weights as they are, or as a model makes them of its parameters."""
    return {
        "as they are": lambda: weights,
        "tanh": lambda: jnp.tanh(weights),
        "normed": lambda: weights / jnp.linalg.norm(weights, axis=-1, keepdims=True),
        "softmax": lambda: jax.nn.softmax(weights, -1),
        "masked": lambda: weights * jnp.tril(jnp.ones(weights.shape[-2:])),
        "transposed": lambda: jnp.swapaxes(weights, -1, -2),
    }[of]()


@pytest.mark.parametrize("of", ["as they are", "tanh", "normed", "softmax", "masked", "transposed"])
@pytest.mark.parametrize("wide", [2, 3, 8])
def test_recurrent_weights_stay_cut(wide, of):
    """All units of an example, or all of a head, joined by trained weights: no unit, however few there are."""

    def fn(params, state, x):
        h = jnp.tanh(x @ params["w"] + state["h"] @ made_of(params["u"], of))
        return {"h": h}, h

    step, _ = compared(fn, {"w": draw(1, I, wide), "u": draw(2, wide, wide)}, {"h": draw(3, B, wide)})
    assert not step.exact
    assert step.report().trace_bytes == 0

    def heads(params, state, x):
        g = (x @ params["w"]).reshape(B, 2, wide)
        u = made_of(params["u"], of)
        h = 0.5 * state["h"] + jnp.tanh(g + jnp.einsum("bhd,hde->bhe", state["h"], u))
        return {"h": h}, h

    params = {"w": draw(1, I, 2 * wide), "u": draw(2, 2, wide, wide)}
    step, error = compared(heads, params, {"h": draw(3, B, 2, wide)})
    assert not step.exact and error > TOLERANCE
    assert [path for path, _ in step.program.header.groups[0].states] == ["h"]
