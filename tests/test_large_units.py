"""Units of many elements: long delays that feed back, whose traces are moved as the slots are. Against backpropagation through time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error, summed_losses

import etcompile
from etcompile import parse_program

TOLERANCE = 1e-10
I, N = 3, 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def square(out, target):
    return jnp.sum((out - target) ** 2)


def bptt(fn, params, state, xs, ys):
    return jax.jit(jax.grad(summed_losses(fn, state, xs, ys, square)))(params)


def check(model, steps, chunks, exact=True, **options):
    """Gradients of whole sequences and of chunks that do not divide them; the step."""
    fn, params, state = model
    lead = state["v"].shape[:-1]
    xs, ys = draw(7, steps, *lead, I), draw(8, steps, *lead, N)
    step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0], **options)
    assert step.exact == exact
    wanted = bptt(fn, params, state, xs, ys)
    for chunk in chunks:
        step.reset()
        _, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, ys)
        assert relative_error(grads, wanted) < TOLERANCE, chunk
    return step


def lead_of(batch):
    return () if batch is None else (batch,)


PARAMS = {"w": draw(1, I, N), "g": 0.5 * draw(2, N)}


def register(slots, batch, how="concatenate"):
    lead = lead_of(batch)

    def fn(params, state, x):
        old = state["buffer"]
        v = 0.9 * state["v"] + x @ params["w"] + params["g"] * jnp.tanh(old[-1])
        z = jnp.tanh(v)
        if how == "concatenate":
            new = jnp.concatenate([z[None], old[:-1]])
        elif how == "roll":
            new = jnp.roll(old, 1, 0).at[0].set(z)
        else:
            new = jnp.stack([z, *old[:-1]])
        return {"v": v, "buffer": new}, v

    return fn, PARAMS, {"v": draw(5, *lead, N), "buffer": draw(6, slots, *lead, N)}


def ring(slots, batch, delays=None):
    """What the neuron shows comes back after a delay, of all neurons the same or of each its own."""
    lead = lead_of(batch)

    def fn(params, state, x):
        i, buffer = state["i"], state["buffer"]
        late = buffer[..., i % slots] if delays is None else buffer[..., jnp.arange(N), (i - delays) % slots]
        v = 0.9 * state["v"] + x @ params["w"] + params["g"] * jnp.tanh(late)
        return {"v": v, "buffer": buffer.at[..., i % slots].set(jnp.tanh(v)), "i": i + 1}, v

    state = {"v": draw(5, *lead, N), "buffer": draw(6, *lead, N, slots), "i": jnp.zeros((), jnp.int32)}
    return fn, PARAMS, state


def currents(slots, delays):
    """Currents that arrive after a delay behind their weight, each slot emptied once it was read."""

    def fn(params, state, x):
        i, buffer = state["i"], state["buffer"]
        v = 0.9 * state["v"] + buffer[i % slots]
        buffer = buffer.at[i % slots].set(0.0)
        current = x @ params["w"] + params["g"] * jnp.tanh(v)
        buffer = buffer.at[(i + delays) % slots, jnp.arange(N)].add(current)
        return {"v": v, "buffer": buffer, "i": i + 1}, v

    return fn, PARAMS, {"v": draw(5, N), "buffer": draw(6, slots, N), "i": jnp.zeros((), jnp.int32)}


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defjvp(lambda primals, tangents: (spike(*primals), tangents[0] / (1 + jnp.abs(primals[0])) ** 2))


def lif(slots, batch):
    """Spikes that come back, with adaptation and a reset: four states of one unit, and a bias."""
    lead = lead_of(batch)

    def fn(params, state, x):
        late = params["g"] * state["buffer"][..., 0]
        v = 0.9 * state["v"] * (1 - state["z"]) + x @ params["w"] + params["b"] + late - state["a"]
        z = spike(v - 1)
        buffer = jnp.concatenate([state["buffer"][..., 1:], z[..., None]], -1)
        return {"v": v, "z": z, "a": 0.95 * state["a"] + 0.1 * z, "buffer": buffer}, v + z

    small = {"v": draw(5, *lead, N), "z": jnp.zeros((*lead, N)), "a": draw(9, *lead, N)}
    return fn, {**PARAMS, "b": draw(3, N)}, {**small, "buffer": draw(6, *lead, N, slots)}


def gated(slots, batch):
    """A projection of which each unit reads four results: a class, and a trace, for each."""
    lead = lead_of(batch)

    def fn(params, state, x):
        i, f, c, o = jnp.split(x @ params["w"], 4, -1)
        late = params["g"] * state["buffer"][..., -1]
        c = jax.nn.sigmoid(f) * state["v"] + jax.nn.sigmoid(i) * jnp.tanh(c + late)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return {"v": c, "buffer": jnp.roll(state["buffer"], 1, -1).at[..., 0].set(h)}, h

    state = {"v": draw(5, *lead, N), "buffer": draw(6, *lead, N, slots)}
    return fn, {"w": draw(1, I, 4 * N), "g": PARAMS["g"]}, state


DELAYS = jnp.array([1, 3, 39, 17])
MODELS = {
    "register": (register(40, 2), 45, (1, 7)),
    "register, rolled": (register(40, 1, "roll"), 41, ("auto",)),
    "register, no batch": (register(64, None), 66, (1, "auto")),
    "register of 200": (register(200, 2), 205, (1, 60)),
    "ring": (ring(40, 2), 45, (1, 7)),
    "ring, a delay for each": (ring(40, None, DELAYS), 42, (1, "auto")),
    "ring of 200, a delay for each": (ring(200, 1, 5 * DELAYS), 205, (60,)),
    "currents": (currents(40, DELAYS), 45, (1, 7)),
    "spikes": (lif(64, 2), 66, (1, 9)),
    "spikes, one step": (lif(64, 1), 1, (1, "auto")),
    "gates": (gated(40, 2), 42, (1, 7)),
}


@pytest.mark.parametrize("name", MODELS)
def test_long_delays_with_feedback_are_exact(name):
    model, steps, chunks = MODELS[name]
    step = check(model, steps, chunks)
    assert step.report().to_dict()["cuts"] == []
    assert parse_program(str(step.program)) == step.program


def test_a_stack_of_slots():
    check(register(34, 2, "stack"), 36, (5,))


def test_slots_are_positions_of_a_trace():
    """A trace has an entry for each slot and input; other states stand at the first slot of their unit."""
    step = check(register(40, 2), 3, ())
    (group,) = step.program.header.groups
    assert [path for path, _ in group.states] == ["buffer", "v"]
    assert group.shape == (40, 2, N)
    report = step.report().to_dict()
    assert report["parameters"]["w"]["how"] == "trace of g0 (40 positions each), and one step"
    assert report["parameters"]["w"]["trace_bytes"] == 8 * 2 * 40 * 2 * N * I


def test_whole_sequences_need_no_trace():
    step = check(lif(64, 2), 70, ("auto",), schedule=etcompile.Schedule(keep_traces=False))
    assert step.report().trace_bytes == 0


def test_traces_go_on_from_call_to_call():
    fn, params, state = ring(40, 2, DELAYS)
    xs, ys = draw(7, 50, 2, I), draw(8, 50, 2, N)
    step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
    total = jax.tree.map(jnp.zeros_like, params)
    run = step.scan_value_and_grad(square)
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        _, grads = run(xs[start:stop], ys[start:stop])
        total = jax.tree.map(jnp.add, total, grads)
    assert relative_error(total, bptt(fn, params, state, xs, ys)) < TOLERANCE
    step.reset()
    step.scan(xs[:45])
    _, grads = run(xs[45:], ys[45:])
    online = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
    for x in xs[:45]:
        online(x)
    wanted = jax.tree.map(jnp.zeros_like, params)
    for x, y in zip(xs[45:], ys[45:], strict=True):
        _, one = online.value_and_grad(square)(x, y)
        wanted = jax.tree.map(jnp.add, wanted, one)
    assert relative_error(grads, wanted) < TOLERANCE


def test_recurrent_weights_beside_a_delay_are_the_only_cut():
    def fn(params, state, x):
        z = jnp.tanh(state["v"])
        v = 0.9 * state["v"] + x @ params["w"] + params["g"] * state["buffer"][-1] + z @ params["r"]
        return {"v": v, "buffer": jnp.concatenate([z[None], state["buffer"][:-1]])}, v

    model = fn, {**PARAMS, "r": draw(4, N, N)}, register(40, 2)[2]
    step = check(model, 3, (), exact=False)
    (cut,) = step.program.header.cuts
    assert cut.primitive == "dot_general" and cut.origins == ("v",)
    check(model, 1, (1,), exact=False)
    check(model, 6, (6,), exact=False, within="exact")


LATE = np.array([1, 3, 20, 39])


@pytest.mark.parametrize(
    "model",
    [register(40, None), ring(40, None, LATE), currents(40, LATE)],
    ids=["register", "ring", "currents"],
)
def test_a_layer_below_is_cut_at_the_weights_alone(model):
    """As of short delays: credit stays in the units above, and does not reach what the layer below remembers."""
    fn, params, state = model

    def two(p, s, x):
        h = 0.8 * s["h"] + jnp.tanh(x @ p["below"])
        above, out = fn(p, {k: s[k] for k in state}, jnp.sin(h))
        return {**above, "h": h}, out

    params, state_of_two = {**params, "below": draw(3, I, I)}, {**state, "h": draw(4, I)}
    xs, ys = draw(7, 60, I), draw(8, 60, N)
    step = etcompile.compile(etcompile.from_function(two, params, state_of_two), xs[0])
    assert [cut.primitive for cut in step.report().cuts] == ["dot_general"]
    wanted = bptt(two, params, state_of_two, xs, ys)
    _, grads = step.scan_value_and_grad(square, chunk=1)(xs, ys)
    above = [name for name in params if name != "below"]
    assert relative_error({n: grads[n] for n in above}, {n: wanted[n] for n in above}) < TOLERANCE


@pytest.mark.parametrize("batch", [None, 2])
def test_a_memory_without_channels(batch):
    """A Legendre memory unit of one number: the order is an axis of one unit, joined by a matrix that is not trained."""
    order = 40
    A, b = 0.3 * draw(11, order, order) / order**0.5, draw(12, order)

    def fn(params, state, x):
        m = state["m"] @ A.T + (x @ params["w"]) * b
        return {"m": m, "v": 0.5 * state["v"]}, m[..., :N]

    lead = lead_of(batch)
    check((fn, {"w": draw(1, I, 1)}, {"m": draw(5, *lead, order), "v": draw(6, *lead, N)}), 6, (1, 4))


def test_what_reads_slots_of_others_is_cut():
    def fn(params, state, x):
        v = 0.9 * state["v"] + x @ params["w"] + params["g"] * jnp.roll(state["buffer"][-1], 1, -1)
        return {"v": v, "buffer": jnp.concatenate([jnp.tanh(v)[None], state["buffer"][:-1]])}, v

    step = check((fn, PARAMS, register(40, 2)[2]), 3, (), exact=False)
    assert step.program.header.cuts


@pytest.mark.parametrize("algo", ["e_prop", "pp_prop", "decolle"])
def test_other_rules_run_step_by_step(algo):
    """Their traces are no sums that a chunk could take at once: whoever asks for chunks is told so."""
    fn, params, state = lif(40, 2)
    xs, ys = draw(7, 9, 2, I), draw(8, 9, 2, N)
    step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0], algo=algo)
    found = []
    for options in ({}, {"chunk": 1}):
        step.reset()
        found.append(step.scan_value_and_grad(square, **options)(xs, ys)[1])
    assert relative_error(*found) < TOLERANCE
    with pytest.raises(
        etcompile.UnsupportedError, match=f"{algo} cannot run in chunks: units of this model have many"
    ):
        step.scan_value_and_grad(square, chunk=4)(xs, ys)
