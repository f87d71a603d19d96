"""Several states in one array: the gradients of the same model with an array for each."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_gradients import grad
from oracles import relative_error, summed_losses

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")
TOLERANCE = 1e-10
B, I, O, T = 2, 3, 4, 7


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


XS, YS = draw(0, T, B, I), draw(1, T, B, O)
PARAMS = {"w": draw(2, I, O), "k": 0.5 * draw(3, O)}
START = (draw(4, B, O), draw(5, B, O))


def square(out, target):
    return jnp.sum((out - target) ** 2)


def neuron(params, v, a, x):
    v = params["k"] * v + x @ params["w"] - 0.5 * a
    return v, 0.9 * a + 0.2 * jnp.tanh(v)


def by_parts(unpack, pack):
    def step(params, state, x):
        old_v, old_a = unpack(state["s"])
        v, a = neuron(params, old_v, old_a, x)
        return {"s": pack(v, a)}, jnp.tanh(v)

    return step, {"s": pack(*START)}


def interleaved(v, a):
    return jnp.stack([v, a], -1).reshape(*v.shape[:-1], 2 * O)


FORMS = {
    "in turns": by_parts(lambda s: (s[..., ::2], s[..., 1::2]), interleaved),
    "in turns, by a reshape": by_parts(
        lambda s: (s.reshape(B, O, 2)[..., 0], s.reshape(B, O, 2)[..., 1]), interleaved
    ),
    "halves by a reshape": by_parts(
        lambda s: (s.reshape(B, 2, O)[:, 0], s.reshape(B, 2, O)[:, 1]),
        lambda v, a: jnp.concatenate([v, a], -1),
    ),
    "dict": by_parts(lambda s: (s["v"], s["a"]), lambda v, a: {"v": v, "a": a}),
    "stack behind": by_parts(lambda s: (s[..., 0], s[..., 1]), lambda v, a: jnp.stack([v, a], -1)),
    "stack in front": by_parts(tuple, lambda v, a: jnp.array([v, a])),
    "stack between": by_parts(lambda s: (s[:, 0], s[:, 1]), lambda v, a: jnp.stack([v, a], 1)),
    "concatenate": by_parts(lambda s: jnp.split(s, 2, -1), lambda v, a: jnp.concatenate([v, a], -1)),
    "slices": by_parts(lambda s: (s[:, :O], s[:, O:]), lambda v, a: jnp.concatenate([v, a], 1)),
}


def compiled(fn, params, state):
    return etcompile.compile(etcompile.from_function(fn, params, state), XS[0])


def bptt(fn, params, state):
    return grad(summed_losses(fn, state, XS, YS, square), params)


@pytest.mark.parametrize("how", ["at", "slice"])
def test_parts_that_are_set_one_by_one(how):
    def fn(params, state, x):
        s = state["s"]
        v, a = neuron(params, s[..., 0], s[..., 1], x)
        if how == "at":
            s = s.at[..., 0].set(v).at[..., 1].set(a)
        else:
            s = jax.lax.dynamic_update_slice_in_dim(s, a[..., None], 1, 2).at[..., 0].set(v)
        return {"s": s}, jnp.tanh(v)

    check(fn, PARAMS, {"s": jnp.stack(START, -1)})


def check(fn, params, state):
    step, wanted = compiled(fn, params, state), bptt(fn, params, state)
    assert step.exact
    for chunk in (1, 3):
        step.reset()
        _, grads = step.scan_value_and_grad(square, chunk=chunk)(XS, YS)
        assert relative_error(grads, wanted) < TOLERANCE
    return step


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_exact(form):
    fn, state = FORMS[form]
    step = check(fn, PARAMS, state)
    (group,) = step.program.header.groups
    assert group.pattern == ((True, True), (True, True))
    assert len(jax.tree.leaves(step.init_carry().states)) == len(jax.tree.leaves(state))


def test_a_group_state_of_brainstate():
    class Neuron(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.k = (brainstate.ParamState(PARAMS[name]) for name in "wk")
            self.s = brainstate.HiddenGroupState(jnp.stack(START, -1))

        def init_state(self, batch_size=B):
            self.s.value = jnp.zeros((batch_size, O, 2))

        def update(self, x):
            params = {"w": self.w.value, "k": self.k.value}
            old = jnp.asarray(self.s.value)
            v, a = neuron(params, old[..., 0], old[..., 1], x)
            self.s.value = jnp.stack([v, a], -1)
            return jnp.tanh(v)

    model = Neuron()
    step = etcompile.compile(model, XS[0])
    assert step.exact
    _, grads = step.scan_value_and_grad(square, chunk=3)(XS, YS)
    fn, state = FORMS["stack behind"]
    wanted = bptt(fn, PARAMS, state)
    assert relative_error({path[-1]: g for path, g in grads.items()}, wanted) < TOLERANCE
    assert jnp.shape(model.s.value) == (B, O, 2)
    step.reset(batch_size=5)
    assert step(jnp.ones((5, I))).shape == (5, O)
    assert jnp.shape(model.s.value) == (5, O, 2)


def test_pairs_turned_by_a_constant_matrix():
    turn = np.array([[0.9, 0.3], [-0.3, 0.9]])

    def fn(params, state, x):
        s = jnp.einsum("ij,bnj->bni", turn, state["s"]) + jnp.stack([x @ params["w"], x @ params["u"]], -1)
        return {"s": s}, jnp.tanh(s[..., 0])

    check(fn, {"w": PARAMS["w"], "u": draw(6, I, O)}, {"s": jnp.stack(START, -1)})


def lstm(params, c, h, x):
    i, f, g, o = jnp.split(x @ params["wx"] + h @ params["wh"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


def test_where_credit_is_cut_the_gradients_are_those_of_two_arrays_too():
    def two(params, state, x):
        c, h = lstm(params, state["c"], state["h"], x)
        return {"c": c, "h": h}, h

    def halves(params, state, x):
        old = jnp.split(state["s"], 2, -1)
        c, h = lstm(params, old[0], old[1], x)
        return {"s": jnp.concatenate([c, h], -1)}, h

    def rows(params, state, x):
        c, h = lstm(params, state["s"][0], state["s"][1], x)
        return {"s": jnp.array([c, h])}, h

    def columns(params, state, x):
        c, h = lstm(params, state["s"][..., 0], state["s"][..., 1], x)
        new = jnp.stack([c, h], -1)
        return {"s": new}, new[..., 1]

    params = {"wx": draw(8, I, 4 * O), "wh": draw(9, O, 4 * O)}
    c, h = START
    forms = [
        (two, {"c": c, "h": h}),
        (halves, {"s": jnp.concatenate(START, -1)}),
        (rows, {"s": jnp.stack(START)}),
        (columns, {"s": jnp.stack(START, -1)}),
    ]
    steps = [compiled(fn, params, state) for fn, state in forms]
    wanted, *others = [step.scan_value_and_grad(square, chunk=3)(XS, YS)[1] for step in steps]
    assert not any(step.exact for step in steps)
    for grads in others:
        assert relative_error(grads, wanted) < TOLERANCE


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("how", ["concatenate", "roll"])
def test_delays(how, slots):
    def fn(params, state, x):
        y, old = jnp.tanh(x @ params["w"]), state["buffer"]
        if how == "roll":
            buffer = jnp.roll(old, 1, 0).at[0].set(y)
        else:
            buffer = jnp.concatenate([y[None], old[:-1]])
        h = params["k"] * state["h"] + buffer[-1]
        return {"buffer": buffer, "h": h}, h

    step = check(fn, PARAMS, {"buffer": draw(7, slots, B, O), "h": START[0]})
    read = len(step.program.header.groups[0].states) - 1
    assert read == slots or (
        how == "concatenate" and read == slots - 1
    )  # nothing reads its last slot's old value


def test_a_state_that_is_read_whole_stays_in_one():
    """Each element moves on by one: all of an example's, which are more than a few, are one unit."""

    def fn(params, state, x):
        s = 0.5 * state["s"] + jnp.concatenate([(x @ params["w"])[:, :1], state["s"][:, :-1]], -1)
        return {"s": s}, s[:, :O]

    step = check(fn, {"w": PARAMS["w"]}, {"s": jnp.concatenate(START, -1)})
    assert [path for path, _ in step.program.header.groups[0].states] == ["s"]


def test_halves_of_a_state_that_is_read_whole():
    def fn(params, state, x):
        s = 0.5 * state["s"] + jnp.concatenate([x @ params["w"], state["s"][:, :O]], -1)
        return {"s": s}, s[:, :O]

    step = check(fn, {"w": PARAMS["w"]}, {"s": jnp.concatenate(START, -1)})
    assert [path for path, _ in step.program.header.groups[0].states] == ["s.0", "s.1"]


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("mapped", [False, True])
def test_two_recurrent_layers_however_states_lie(axis, mapped):
    """Their gradients are approximate, and the same for arrays of their own, for a packed state, and for one that is mapped."""
    weights = {**PARAMS, "w": draw(6, I + O, O), "u": draw(7, O, O)}

    def one(params, v, a, h, x, put):
        new = neuron(params, v, a, jnp.concatenate([x, v], -1))
        s, v = put(*new)
        return s, 0.8 * h + jnp.tanh(v) @ params["u"]

    def packed(params, s, h, x):
        return one(params, jnp.take(s, 0, axis), jnp.take(s, 1, axis), h, x, put)

    def put(v, a):
        s = jnp.stack([v, a], axis)
        return s, (s[0] if axis == 0 else s[..., 0])

    def together(params, state, x):
        s, h = packed(params, state["s"], state["h"], x)
        return {"s": s, "h": h}, jnp.tanh(h)

    def by_vmap(params, state, x):
        fn = jax.vmap(lambda s, h, x: packed(params, s, h, x))
        s, h = fn(state["s"], state["h"], x)
        return {"s": s, "h": h}, jnp.tanh(h)

    def apart(params, state, x):
        (v, a), h = one(params, state["v"], state["a"], state["h"], x, lambda v, a: ((v, a), v))
        return {"v": v, "a": a, "h": h}, jnp.tanh(h)

    where = axis if not mapped or axis == -1 else 1
    first = {"s": jnp.stack(START, where), "h": draw(8, B, O)}
    own = compiled(apart, weights, {"v": START[0], "a": START[1], "h": first["h"]})
    step = compiled(by_vmap if mapped else together, weights, first)
    assert len(step.report().groups) == len(own.report().groups) == 2
    found, wanted = (s.scan_value_and_grad(square)(XS, YS)[1] for s in (step, own))
    assert relative_error(found, wanted) < TOLERANCE
