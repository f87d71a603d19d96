"""The cost of a step: against XLA's own analysis, at other batch sizes, and for models that no machine could hold."""

from __future__ import annotations

import re
import resource

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from zoo.spiking import spike

import etcompile
from etcompile.cost.cost import measured, priced
from etcompile.lowering.losses import Loss
from etcompile.runtime.calls import DONATED, apart, one_step, sequence
from etcompile.runtime.cost import step_cost

Shape = jax.ShapeDtypeStruct
OUT = 10


def shapes(dtype=jnp.float32, **sizes):
    return {name: Shape(size, dtype) for name, size in sizes.items()}


def gru(batch=8, n_in=64, n=192):
    def fn(p, s, x):
        gates = jax.nn.sigmoid(jnp.concatenate([x, s["h"]], -1) @ p["gates"] + p["gate_bias"])
        z, r = jnp.split(gates, 2, axis=-1)
        c = jnp.tanh(jnp.concatenate([x, r * s["h"]], -1) @ p["w"] + p["bias"])
        h = (1 - z) * s["h"] + z * c
        return {"h": h}, h @ p["readout"]

    params = shapes(gates=(n_in + n, 2 * n), gate_bias=(2 * n,), w=(n_in + n, n), bias=(n,), readout=(n, OUT))
    return fn, params, shapes(h=(batch, n)), Shape((batch, n_in), jnp.float32)


def lstm(batch=8, n_in=64, n=128):
    def fn(p, s, x):
        i, f, o, g = jnp.split(jnp.concatenate([x, s["h"]], -1) @ p["w"] + p["bias"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * s["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return {"h": h, "c": c}, h @ p["readout"]

    params = shapes(w=(n_in + n, 4 * n), bias=(4 * n,), readout=(n, OUT))
    return fn, params, shapes(h=(batch, n), c=(batch, n)), Shape((batch, n_in), jnp.float32)


def spiking(batch=8, n_in=64, n=192):
    """Synaptic currents, adaptation, a leaky readout."""

    def fn(p, s, x):
        z = spike(s["v"] - 1 - 0.1 * s["a"])
        i = 0.8 * s["i"] + x @ p["w"] + z @ p["recurrent"]
        v = 0.9 * s["v"] * (1 - z) + i
        a = 0.95 * s["a"] + z
        y = 0.9 * s["y"] + spike(v - 1 - 0.1 * a) @ p["readout"]
        return {"v": v, "a": a, "i": i, "y": y}, y

    params = shapes(w=(n_in, n), recurrent=(n, n), readout=(n, OUT))
    state = shapes(v=(batch, n), a=(batch, n), i=(batch, n), y=(batch, OUT))
    return fn, params, state, Shape((batch, n_in), jnp.float32)


def conv(batch=4, channels=8, side=16):
    def fn(p, s, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        u = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)
        u += lax.conv_general_dilated(s["h"], p["recurrent"], (1, 1), "SAME", dimension_numbers=numbers)
        h = 0.9 * s["h"] + 0.1 * jnp.tanh(u + p["bias"])
        return {"h": h}, h.reshape(h.shape[0], -1) @ p["readout"]

    params = shapes(
        w=(3, 3, 4, channels), recurrent=(3, 3, channels, channels), bias=(channels,), readout=(side * side * channels, OUT)
    )  # fmt: skip
    return fn, params, shapes(h=(batch, side, side, channels)), Shape((batch, side, side, 4), jnp.float32)


MODELS = {"gru": gru, "lstm": lstm, "spiking": spiking, "conv": conv}
RULES = ["d_rtrl", "e_prop", "pp_prop"]


def compiled(model, algo, schedule=None, **sizes):
    fn, params, state, x = MODELS[model](**sizes)
    return etcompile.compile(etcompile.from_function(fn, params, state), x, algo=algo, schedule=schedule)


def loss(out, y):
    return jnp.mean((out - y) ** 2)


# ----------------------------------------------------------------------------------------------------------------
# against XLA

SCHEDULES = {"step": (None, 1), "scan": (20, 1), "chunk": (20, 20), "chunks_and_a_rest": (25, 10)}


def run_of(step, steps, chunk):
    """The function that the step runs, and the shapes of what it is called with."""
    model = step.executor.functions.model
    out = Shape(model.outputs[0].aval.shape, model.outputs[0].aval.dtype)
    inputs, targets, fn = step.executor.inputs, (out,), one_step(step.executor.functions)
    if steps is not None:
        over_time = jax.tree.map(lambda v: Shape((steps, *v.shape), v.dtype), (inputs, targets))
        (inputs, targets), fn = (
            over_time,
            sequence(
                step.executor.functions, step.executor.functions.plan(etcompile.Schedule(), steps, chunk)
            ),
        )
    traces = step.executor.compiled.causal.init_traces_shapes()
    plain = Loss.plain(loss)
    given = (inputs, (plain.fixed, plain.carried), ((targets, None), None), {})
    args = (step.executor.live.params(), step.executor.live.states(), traces, *given)
    return apart(fn, plain.program), args


def of_xla(step, steps, chunk):
    """What XLA says of that function, its large constants among its arguments."""
    program, args = run_of(step, steps, chunk)
    closed, out = jax.make_jaxpr(program, return_shape=True)(*args)

    keys = [(np.shape(c), np.asarray(c).tobytes()) for c in closed.consts]
    places = list(dict.fromkeys(keys))  # those that are alike are one

    def run(*given):
        *given, known = given
        consts = [known[places.index(key)] for key in keys]
        found = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(given))
        return jax.tree.unflatten(jax.tree.structure(out), found)

    known = [closed.consts[keys.index(key)] for key in places]
    found = jax.jit(run, donate_argnums=(DONATED,)).lower(*args, known).compile()
    memory, count = found.memory_analysis(), found.cost_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return count["flops"], count["bytes accessed"], peak + memory.temp_size_in_bytes


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("algo", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_within_a_quarter_of_what_xla_says(model, algo, schedule):
    step = compiled(model, algo)
    steps, chunk = SCHEDULES[schedule]
    flops, moved, peak = of_xla(step, steps, chunk)
    target = Shape((step.executor.functions.causal.model.examples, OUT), jnp.float32)
    # XLA counts the body of a loop once.
    cost = step_cost(step.executor, None, steps, chunk if steps else None, loss, (target,), every_trip=False)
    each = steps or 1
    assert each * cost.flops == pytest.approx(flops, rel=0.25)
    assert each * cost.bytes_moved == pytest.approx(moved, rel=0.25)
    assert cost.peak_bytes == pytest.approx(peak, rel=0.25)
    assert cost.trace_bytes == step.report().trace_bytes
    assert cost.peak_bytes > cost.trace_bytes > 0


def sparse(units=200, synapses=40_000):
    """Leaky neurons with exponential synapses that keep their sign, and rests after a spike: a brain of :mod:`tools.brain`."""
    random = np.random.default_rng(0)
    senders, receivers = (random.integers(0, units, synapses, np.int32) for _ in range(2))
    receivers, sign = np.sort(receivers), np.where(random.random(synapses) < 0.3, -1, 1).astype(np.float32)

    def fn(p, s, x):
        w = sign * jax.nn.softplus(p["w"])
        g = 0.8 * s["g"] + jax.ops.segment_sum(w * s["sent"][senders].astype(w.dtype), receivers, units)
        v = jnp.where(s["rests"] == 0, 0.9 * s["v"] + 0.1 * (g + x), 0.0)
        z = spike(v - 1.0)
        rests = jnp.where(z > 0, 5, jnp.maximum(s["rests"] - 1, 0))
        return {"g": g, "v": jnp.where(z > 0, 0.0, v), "rests": rests, "sent": z > 0}, z

    neurons = (units,)
    state = {**shapes(g=neurons, v=neurons), **shapes(jnp.int32, rests=neurons), **shapes(bool, sent=neurons)}
    return etcompile.from_function(fn, shapes(w=(synapses,)), state), Shape(neurons, jnp.float32)


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("algo", RULES)
def test_sparse_weights_within_a_tenth_of_what_xla_says(algo, steps):
    """Where arrays of synapses are all there is: gathered values, sums of gradients, and what a loop makes once."""
    model, x = sparse()
    step = etcompile.compile(model, x, algo=algo)
    _, moved, peak = of_xla(step, steps, 1)
    cost = step_cost(step.executor, None, steps, 1 if steps else None, loss, (x,), every_trip=False)
    assert cost.peak_bytes == pytest.approx(peak, rel=0.1)
    assert (steps or 1) * cost.bytes_moved == pytest.approx(moved, rel=0.25)


@pytest.mark.parametrize(("algo", "chunk"), [("d_rtrl", 20), ("pp_prop", 10)])
def test_sparse_weights_by_events_within_15_percent_of_what_xla_says(algo, chunk):
    model, x = sparse()
    step = etcompile.compile(model, x, algo=algo, schedule=etcompile.Schedule(events=0.05))
    flops, moved, peak = of_xla(step, 20, chunk)
    cost = step_cost(step.executor, None, 20, chunk, loss, (x,), every_trip=False)
    assert cost.peak_bytes == pytest.approx(peak, rel=0.15)
    assert 20 * cost.bytes_moved == pytest.approx(moved, rel=0.15)
    assert 20 * cost.flops == pytest.approx(flops, rel=0.15)


def test_traces_are_written_where_they_were_although_gradients_have_their_shape():
    model, x = sparse()
    step = etcompile.compile(model, x)
    program, args = run_of(step, 20, 1)
    compiled = jax.jit(program, donate_argnums=(DONATED,)).lower(*args).compile()
    (weights,) = jax.tree.leaves(step.executor.live.params())
    assert not re.findall(rf"f32\[{weights.size}\]\S* copy\(", compiled.as_text())


def test_what_a_loop_makes_of_its_constants_counts_once():
    def fn(h, w):
        return lax.scan(lambda h, _: (h * jnp.exp(w), None), h, length=7)[0]

    args = (Shape((1000,), jnp.float32), Shape((1000,), jnp.float32))
    cost = priced(measured(jax.make_jaxpr(fn)(*args), [0]), None, 1, None)
    assert (cost.flops, cost.transcendentals) == (7 * 1000, 1000)
    assert cost.peak_bytes == 4 * 3 * 1000


def test_of_equal_loops_and_constants_one_counts():
    def fn(h, scale):
        wave = np.arange(1000, dtype=np.float32)  # a new constant at each call

        def add(total, _):
            return total + jnp.sin(h) * scale * total, None

        return lax.scan(add, h * wave, length=7)[0]

    def twice(h):
        return fn(h, 2.0), fn(h, 2.0), fn(h, 3.0)

    def priced_for(fn):
        closed = jax.make_jaxpr(fn)(Shape((1000,), jnp.float32))
        return priced(measured(closed, []), None, 1, None)

    alone, found = priced_for(lambda h: fn(h, 2.0)), priced_for(twice)
    other = priced_for(lambda h: (fn(h, 2.0), fn(h, 3.0)))
    assert found.flops == other.flops
    assert found.transcendentals == other.transcendentals
    assert alone.flops < found.flops < 2 * alone.flops


def test_products_sums_and_functions_by_hand():
    def fn(a, b, bias):
        return jnp.tanh(a @ b + bias)

    args = (Shape((32, 64), jnp.float32), Shape((64, 128), jnp.float32), Shape((128,), jnp.float32))
    cost = priced(measured(jax.make_jaxpr(fn)(*args), []), None, 1, None)
    product = 32 * 128
    assert (cost.flops, cost.transcendentals) == (2 * 64 * product + product, product)
    # The product is written and read again; the sum and tanh run as one.
    arguments = 32 * 64 + 64 * 128 + 128
    assert cost.bytes_moved == 4 * (arguments + 3 * product)
    assert cost.peak_bytes == 4 * (arguments + product)  # the product may lie where the result will be


def test_every_trip_of_a_loop_counts():
    def fn(h, w):
        return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=7)[0]

    closed = jax.make_jaxpr(fn)(Shape((8, 16), jnp.float32), Shape((16, 16), jnp.float32))
    once, all_ = (priced(measured(closed, [0]), None, 1, None, every_trip=e) for e in (False, True))
    assert (all_.flops, all_.transcendentals) == (7 * once.flops, 7 * once.transcendentals)
    assert all_.peak_bytes == once.peak_bytes
    step = compiled("gru", "d_rtrl", n=32)
    short, long = (step.cost(steps=steps, chunk=1) for steps in (100, 1000))
    assert long.flops == pytest.approx(short.flops, rel=0.01)
    inputs_and_losses = 900 * (8 * (64 + OUT) + 1) * 4
    assert long.peak_bytes - short.peak_bytes == inputs_and_losses


# ----------------------------------------------------------------------------------------------------------------
# other batch sizes


@pytest.mark.parametrize(("model", "algo"), [("gru", "e_prop"), ("spiking", "d_rtrl"), ("conv", "pp_prop")])
@pytest.mark.parametrize("run", [{}, {"steps": 12, "chunk": 1}, {"steps": 25, "chunk": 10}], ids=str)
def test_another_batch_size_costs_what_a_model_compiled_for_it_does(model, algo, run):
    wanted = compiled(model, algo, batch=11).cost(**run)
    assert compiled(model, algo, batch=4).cost(batch=11, **run) == wanted
    assert wanted.batch == 11


def test_looking_at_a_cost_changes_nothing_of_what_runs():
    step = compiled("gru", "d_rtrl", batch=40, n=16)

    def program():
        args = (
            step.executor.live.params(),
            step.executor.live.states(),
            step.executor.compiled.causal.init_traces_shapes(),
        )
        plain = Loss.plain(loss)
        fn = apart(one_step(step.executor.functions), plain.program)
        given = (
            step.executor.inputs,
            (plain.fixed, plain.carried),
            (((Shape((40, OUT), jnp.float32),), None), None),
            {},
        )
        return str(jax.make_jaxpr(fn)(*args, *given))

    before = program()
    step.cost(), step.cost(steps=6)
    assert program() == before


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = brainstate.nn.GRUCell(12, 20), brainstate.nn.Linear(20, OUT)

    def update(self, x):
        return self.readout(self.cell(x))


def test_another_batch_size_leaves_the_model_as_it_was():
    net = Net()
    step = etcompile.compile(net, jnp.ones((1, 12)), batch_size=1)
    state, value, key = net.cell.h, net.cell.h.value, brainstate.random.DEFAULT.value
    at_seven = step.cost(batch=7, steps=9)
    assert net.cell.h is state and state.value is value
    assert (brainstate.random.DEFAULT.value == key).all()
    assert step(jnp.ones((1, 12))).shape == (1, OUT)
    step.reset(batch_size=7)
    assert step.cost(steps=9) == at_seven


def test_a_module_made_of_shapes():
    net = brainstate.transform.eval_shape(Net)
    step = etcompile.compile(net, jnp.ones((4, 12)), batch_size=4)
    assert step.cost() == etcompile.compile(Net(), jnp.ones((4, 12)), batch_size=4).cost()
    with pytest.raises(etcompile.ModelError, match="shapes alone"):
        step(jnp.ones((4, 12)))


# ----------------------------------------------------------------------------------------------------------------
# without allocating


def test_a_model_larger_than_any_machine():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arrays = sum(a.nbytes for a in jax.live_arrays())
    sizes = {"batch": 2, "n_in": 4096, "n": 65536}
    step = compiled("gru", "d_rtrl", etcompile.Schedule(write_every=1), **sizes)
    causal, chunks = step.cost(batch=1024), step.cost(batch=1024, steps=1000, chunk=50)
    inputs = 4096 + 65536
    # One row per gate that carries memory: the update gate's half of the fused weight, the candidate, and their biases.
    assert causal.trace_bytes == chunks.trace_bytes == 4 * 1024 * 65536 * 2 * (inputs + 1)
    assert causal.flops > 5 * causal.trace_bytes / 4 / 2
    assert causal.bytes_moved > 3 * causal.trace_bytes
    assert chunks.bytes_moved < causal.bytes_moved / 20
    assert sum(a.nbytes for a in jax.live_arrays()) - arrays < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert "TiB" in str(causal) and "batch 1024" in str(causal)
    later = compiled("gru", "d_rtrl", **sizes).cost(batch=1024)  # with f and x of four steps
    assert 1 < later.trace_bytes / causal.trace_bytes < 1.001


def test_compile_allocates_no_traces():
    fn, params, state, x = gru(batch=4, n_in=8, n=64)
    model = etcompile.from_function(fn, *jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), (params, state)))
    held = jax.live_arrays()  # kept, so that garbage of other tests that goes meanwhile does not count
    before = sum(a.nbytes for a in held)
    step = etcompile.compile(model, x)
    size = step.report().trace_bytes
    assert sum(a.nbytes for a in jax.live_arrays()) - before < size / 10
    step(jnp.ones(x.shape, x.dtype))
    assert sum(a.nbytes for a in jax.live_arrays()) - before > size


def test_traces_may_be_used_first_inside_of_a_transformation():
    def losses(first_use):
        net = Net()
        step = etcompile.compile(net, jnp.ones((2, 12)), batch_size=2)
        xs, ys = jax.random.normal(jax.random.key(0), (6, 2, 12)), jnp.ones((6, 2, OUT))
        found = []
        if first_use == "outside":
            step.value_and_grad(loss)(xs[0], ys[0])
            step.reset()

        def run():
            step.reset()

            def total():
                return jnp.sum(brainstate.transform.for_loop(lambda x, y: loss(step(x), y), xs, ys))

            return brainstate.transform.grad(total, step.param_states, return_value=True)()

        for _ in range(2):
            found.append(brainstate.transform.jit(run)())
        assert all(isinstance(v, jax.Array) for v in jax.tree.leaves(step.traces_state.value))
        return found

    brainstate.random.seed(1)
    wanted = losses("outside")
    brainstate.random.seed(1)
    found = losses("inside")
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.allclose(mine, theirs, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------------
# what may be asked


def test_chunks_follow_the_schedule():
    fn, params, state, x = gru(batch=4, n_in=8, n=16)
    model = etcompile.from_function(fn, params, state)
    causal = etcompile.compile(model, x, schedule="causal").cost(steps=40)
    fixed = etcompile.compile(model, x, schedule=etcompile.Schedule(chunk=20)).cost(steps=40)
    step = etcompile.compile(model, x)
    assert (causal.chunk, fixed.chunk) == (1, 20)
    assert causal == step.cost(steps=40, chunk=1)
    assert fixed == step.cost(steps=40, chunk=20)
    assert step.cost(chunk=20) == step.cost(steps=20, chunk=20)
    windows = etcompile.compile(model, x, algo="bptt").cost(steps=40, chunk=10)
    assert windows.chunk == 10 and windows.trace_bytes == 0


@pytest.mark.parametrize("algo", ["rtrl", "uoro", "osttp", "three_factor", "kf_rtrl", "snap"])
def test_other_rules_have_a_cost(algo):
    options = {"n": 1} if algo == "snap" else {}
    fn, params, state, x = gru(batch=4, n_in=8, n=16)
    step = etcompile.compile(etcompile.from_function(fn, params, state), x, algo=algo, **options)
    cost = step.cost(steps=5)
    assert cost.trace_bytes == step.report().trace_bytes
    assert cost.flops > 0 and cost.bytes_moved > 0 and cost.peak_bytes > cost.trace_bytes


def test_mistakes():
    step = compiled("gru", "d_rtrl", batch=4, n_in=8, n=16)
    for wrong in ({"batch": 0}, {"steps": -1}, {"steps": 2.0}, {"chunk": 0}, {"chunk": "auto"}):
        with pytest.raises(etcompile.OptionError):
            step.cost(**wrong)
    with pytest.raises(etcompile.InputError, match="targets are for"):
        step.cost(batch=8, loss_fn=loss, targets=(Shape((4, OUT), jnp.float32),))
    with pytest.raises(etcompile.UnsupportedError):
        compiled("gru", "rtrl", batch=4, n_in=8, n=16).cost(steps=10, chunk=5)

    def alone(params, state, x):
        h = 0.9 * state["h"] + params["w"] @ x
        return {"h": h}, h

    model = etcompile.from_function(alone, shapes(w=(4, 3)), shapes(h=(4,)))
    step = etcompile.compile(model, Shape((3,), jnp.float32))
    assert step.cost().batch is None
    with pytest.raises(etcompile.InputError, match="no batch axis"):
        step.cost(batch=8)
    runs = (
        lambda: step(jnp.ones(3)),
        lambda: step.traces,
        lambda: step.init_carry(),
        lambda: step.learn(loss, None),
        lambda: step.scan_value_and_grad(loss)(jnp.ones((5, 3)), jnp.ones((5, 4))),
    )
    for run in runs:
        with pytest.raises(etcompile.ModelError, match=r"shapes alone[\s\S]*\['params'\]\['w'\]"):
            run()
