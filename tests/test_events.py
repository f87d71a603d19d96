"""Sparse products by events: the same sums, of the synapses whose senders send."""

from __future__ import annotations

import re

import brainevent
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile
from etcompile.sites import events
from etcompile.sites.events import Synapses

T, N, S = 7, 12, 60
DRAW = np.random.default_rng(0)
SEND, RECV = DRAW.integers(0, N, (2, S))
SEND[SEND < 2] = 7
SEND[:2], RECV[:2] = (0, 1), (0, 5)  # one hears itself alone, and one sends to one other
SIGN = np.where(np.arange(S) % 3 == 0, -1.0, 1.0)
STARTS = np.searchsorted(np.sort(SEND), np.arange(N + 1))
XS, YS = DRAW.standard_normal((T, N)), DRAW.standard_normal((T, N))
V = DRAW.uniform(0.0, 1.5, N)


@jax.custom_jvp
def spike(v):
    return (v > 0.8).astype(v.dtype)


spike.defjvp(lambda p, t: (spike(p[0]), t[0] / (1 + jnp.abs(p[0] - 0.8)) ** 2))


def summed(each):
    return jnp.moveaxis(jax.ops.segment_sum(jnp.moveaxis(each, -1, 0), RECV, N), 0, -1)


def lif(state, arrived, x):
    i = 0.8 * state["i"] + arrived + x
    return {"i": i, "v": 0.9 * state["v"] + 0.2 * i - spike(state["v"])}


def recurrent(params, state, x):
    new = lif(state, summed(params["w"] * spike(state["v"])[..., SEND]), x)
    return new, jnp.tanh(new["v"])


def signed(params, state, x):
    """Weights that keep their signs."""
    new = lif(state, summed(jax.nn.softplus(params["w"]) * SIGN * spike(state["v"])[..., SEND]), x)
    return new, jnp.tanh(new["v"])


def event_matrix(params, state, x):
    product = spike(state["v"]) @ brainevent.CSR((params["w"], RECV, STARTS), shape=(N, N))
    new = lif(state, product, x)
    return new, jnp.tanh(new["v"])


def two_populations(params, state, x):
    """The second hears the first within the step."""
    first = lif(state["a"], summed(params["w"] * spike(state["a"]["v"])[SEND]), x)
    second = lif(state["b"], summed(params["u"] * spike(first["v"])[RECV[::-1]]), 0.5 * x)
    return {"a": first, "b": second}, jnp.tanh(second["v"]) + first["v"]


def delayed(params, state, x):
    """Spikes come after three steps, from a ring of booleans."""
    slot = state["now"] % 3
    new = lif(state, summed(jnp.where(state["ring"][slot][SEND], params["w"], 0.0)), x)
    ring = state["ring"].at[slot].set(new["v"] > 0.8)
    return {**new, "ring": ring, "now": state["now"] + 1}, jnp.tanh(new["v"])


def adaptive(params, state, x):
    """Decays that change with time, and inputs that are sent, which are no spikes."""
    h = jax.nn.sigmoid(x) * state["h"] + summed(params["w"] * jnp.maximum(x, 0.0)[SEND]) + x
    return {"h": h}, h


def state_of(name, batch=()):
    one = {"i": jnp.zeros((*batch, N)), "v": jnp.broadcast_to(jnp.asarray(V), (*batch, N))}
    states = {
        "two_populations": {"a": one, "b": one},
        "delayed": {**one, "ring": jnp.zeros((3, N), bool), "now": jnp.zeros((), jnp.int32)},
        "adaptive": {"h": one["v"]},
    }  # fmt: skip
    return states.get(name, one)


MODELS = (signed, event_matrix, two_populations, delayed)


def model_of(fn, batch=()):
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal(S))}
    if fn is two_populations:
        params["u"] = -0.7 * params["w"][::-1]
    return etcompile.from_function(fn, params, state_of(fn.__name__, batch))


def squared(out, target):
    return jnp.mean((out - target) ** 2)


def results(fn, algo="d_rtrl", batch=(), steps=T, chunk=None, scan=False, **schedule):
    """Losses, gradients and traces of two sequences, and of a pass without a loss."""
    xs, ys = (
        np.broadcast_to(v[:steps].reshape(steps, *(1,) * len(batch), N), (steps, *batch, N)) for v in (XS, YS)
    )
    step = etcompile.compile(model_of(fn, batch), xs[0], algo=algo, schedule=etcompile.Schedule(**schedule))
    found = [step.scan_value_and_grad(squared, chunk=chunk)(xs, ys) for _ in range(2)]
    if not schedule.get("keep_traces", True):
        return found
    found.append(jax.tree.leaves(step.traces))
    return [*found, step.scan(xs), jax.tree.leaves(step.traces)] if scan else found


def same(fn, share, chunk=None, **options):
    return (
        relative_error(results(fn, chunk=chunk, events=share, **options), results(fn, chunk=1, **options))
        < 1e-10
    )


@pytest.mark.parametrize("fn", MODELS, ids=lambda fn: fn.__name__)
def test_it_is_the_same_as_step_by_step(fn):
    assert same(fn, 0.3, chunk=3)  # some steps fit


@pytest.mark.parametrize(("algo", "fn"), [("e_prop", signed), ("pp_prop", adaptive)])
def test_for_filtered_traces_too(algo, fn):
    assert same(fn, 0.6, algo=algo)


def test_one_step_of_a_batch_and_a_pass_without_a_loss():
    assert same(recurrent, 0.3, batch=(2,), steps=1, scan=True)


def test_traces_that_are_given_up():
    assert same(recurrent, 0.3, batch=(2,), keep_traces=False)


# -- the sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "in_order"), [(0.01, False), (0.3, True), (1.0, False)])
def test_sums_over_events_are_sums_over_synapses(share, in_order):
    draw = np.random.default_rng(5)
    send = np.minimum(draw.zipf(1.5, 400) - 1, 39)  # one sender has half of all synapses, some have none
    send, recv = np.sort(send) if in_order else send, draw.integers(0, 30, 400)
    synapses = Synapses(send, recv, senders=40, receivers=30, share=share)
    w, credits = draw.standard_normal(400), draw.standard_normal((6, 30))
    sent = draw.standard_normal((6, 40)) * (
        draw.random((6, 40)) < np.array([0, 0.02, 0.1, 0.3, 0.9, 1])[:, None]
    )
    met = jax.jit(synapses.meeting)(jnp.asarray(credits), jnp.asarray(sent), jnp.ones(400))
    expected = 1 + sum(c[recv] * x[send] for c, x in zip(credits, sent, strict=True))
    assert relative_error(met, expected) < 1e-12
    arriving = jax.jit(
        lambda x: synapses.arriving(jnp.asarray(w), x, lambda: jnp.zeros(30).at[recv].add(w * x[send]))
    )
    for x in sent:
        assert relative_error(arriving(x), np.bincount(recv, weights=w * x[send], minlength=30)) < 1e-12


@pytest.mark.parametrize(
    ("few", "most"), [(1e-6, 1 << 31), (0.3, 0), (1.0, 1 << 31)], ids=["all in order", "both", "all listed"]
)
def test_rounds_of_events_in_order_and_listed_are_the_same_sums(monkeypatch, few, most):
    monkeypatch.setattr(events, "_FEW", few)
    monkeypatch.setattr(events, "_MOST", most)  # 0: as of an array of more elements than 32 bits number
    synapses = Synapses(SEND, RECV, senders=N, receivers=N, share=0.1)
    draw = np.random.default_rng(6)
    sent, credit = draw.random((9, N)) * (draw.random((9, N)) < 0.2), draw.standard_normal((9, N))
    sent[:, SEND[4]] = 2.0  # one that sends at every step: the last rounds are its own
    sent[:, SEND[5]] = 0.0
    found = jax.jit(synapses.meeting)(jnp.asarray(credit), jnp.asarray(sent), jnp.ones(S))
    expected = 1 + np.einsum("ts,ts->s", credit[:, RECV], sent[:, SEND])
    assert relative_error(found, expected) < 1e-12
    assert (np.asarray(found)[SEND[5] == SEND] == 1).all()


def test_a_list_of_several_parts_is_summed_part_by_part(monkeypatch):
    monkeypatch.setattr(events, "_TOGETHER", 8)
    synapses = Synapses(SEND, RECV, senders=N, receivers=N, share=0.7)
    for who in ([], [3], [2, 5, 8], [0, 1, 2, 4, 5, 9]):
        x = np.zeros(N)
        x[who] = 2.0
        found = jax.jit(lambda x: synapses.arriving(jnp.asarray(SIGN), x, lambda: jnp.full(N, jnp.nan)))(x)
        assert relative_error(found, np.bincount(RECV, weights=SIGN * x[SEND], minlength=N)) < 1e-12


def test_a_list_that_fits_holds_the_senders_alone():
    synapses = Synapses(SEND, RECV, senders=N, receivers=N, share=0.4)
    sent = np.zeros(N)
    sent[[2, 5]] = 1.0
    found = jax.jit(synapses.listed, static_argnums=1)(jnp.asarray(sent), synapses.capacity)
    assert bool(found.fits) and int(found.size.sum()) == np.isin(SEND, [2, 5]).sum()
    assert not synapses.listed(jnp.ones(N), synapses.capacity).fits


# -- what runs ----------------------------------------------------------------------------------------------------


def test_it_runs_where_it_is_asked_for_and_says_so():
    step = etcompile.compile(model_of(recurrent), XS[0], schedule=etcompile.Schedule(events=0.3))
    functions = step.executor.functions
    schedule = functions.causal.schedule
    assert [functions.plan(schedule, T, wanted).how.name for wanted in (None, 1)] == ["events", "steps"]
    assert step.report().to_dict()["events"] == {"w": 0.3} and "up to 0.3 of all" in str(step.report())
    assert (
        etcompile.compile(model_of(recurrent), XS[0])
        .executor.functions.plan(etcompile.Schedule(), T)
        .how.name
        != "events"
    )


def dense(params, state, x):
    h = jnp.tanh(0.8 * state["h"] + x @ params["w"])
    return {"h": h}, h


def test_what_cannot_run_by_events_is_said():
    model = etcompile.from_function(dense, {"w": jnp.ones((N, N))}, {"h": jnp.zeros(N)})
    with pytest.raises(etcompile.EtcompileError, match="no weight that meets what is gathered"):
        etcompile.compile(model, XS[0], schedule=etcompile.Schedule(events=0.1))
    with pytest.raises(etcompile.EtcompileError, match="rtrl cannot"):
        etcompile.compile(model_of(recurrent), XS[0], algo="rtrl", schedule=etcompile.Schedule(events=0.1))
    step = etcompile.compile(model_of(recurrent), XS[0], schedule=etcompile.Schedule(how="events"))
    with pytest.raises(etcompile.EtcompileError, match="needs to know how much is sent"):
        step.scan_value_and_grad(squared)(XS, YS)


@pytest.mark.parametrize("share", [0, 1.5, -0.1, True, "5 %", float("nan")])
def test_a_share_is_a_part_of_one(share):
    with pytest.raises(etcompile.OptionError, match=re.escape("at most 1")):
        etcompile.Schedule(events=share)
