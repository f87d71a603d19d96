"""Transitions of groups of many states, pushed through the step: the same gradients and traces as where they are written down."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_gradients import grad
from oracles import relative_error, summed_losses

import etcompile
from etcompile.lowering import unwritten

pytestmark = pytest.mark.usefixtures("by_numpy")
B, I, N, T = 2, 3, 4, 7
TOLERANCE = 1e-10


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS = {"w": draw(1, I, N), "g": 0.3 * draw(2, N)}
XS, YS = draw(3, T, B, I), draw(4, T, B, N)


def square(out, target):
    return jnp.sum((out - target) ** 2)


def ring(slots, feeds_back=True):
    """Neurons that hear themselves after a delay of their own, by a ring buffer."""
    delays = jnp.arange(N) % (slots - 1) + 1

    def fn(params, state, x):
        i, buffer = state["i"], state["buffer"]
        late = buffer[:, (i - delays) % slots, jnp.arange(N)]
        v = 0.9 * state["v"] + x @ params["w"] + (params["g"] * late if feeds_back else 0.0)
        return {"v": v, "buffer": buffer.at[:, i % slots].set(jnp.tanh(v)), "i": i + 1}, v + late

    return fn, {"v": jnp.zeros((B, N)), "buffer": draw(5, B, slots, N), "i": jnp.zeros((), jnp.int32)}


def mixed(count):
    """Compartments that all feed each other."""
    between = draw(6, count, count) / count

    def fn(params, state, x):
        given = x @ params["w"] + params["g"]
        h = jnp.tanh(jnp.einsum("ij,bnj->bni", between, state["h"]) + given[..., None])
        return {"h": h}, h.sum(-1)

    return fn, {"h": draw(7, B, N, count)}


def line(slots):
    """A shift register that feeds back: few blocks."""

    def fn(params, state, x):
        late = state["line"][:, -1]
        v = 0.9 * state["v"] + x @ params["w"] + params["g"] * late
        return {"v": v, "line": jnp.concatenate([jnp.tanh(v)[:, None], state["line"][:, :-1]], 1)}, v

    return fn, {"v": jnp.zeros((B, N)), "line": draw(5, B, slots, N)}


def compiled(model, algo="d_rtrl", **options):
    fn, state = model
    return etcompile.compile(etcompile.from_function(fn, PARAMS, state), XS[0], algo=algo, **options)


def pushed(step):
    """Whether transitions are pushed in chunks, and in steps alone."""
    functions = step.executor.functions
    (chunked,) = [s for s in functions.schedules if s.name == "chunks"]
    return bool(chunked.program.causal.model.unwritten), bool(functions.causal.model.unwritten)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (ring(12), (True, False)), (ring(28), (True, True)),
        (ring(12, feeds_back=False), (False, False)), (line(20), (False, False)), (mixed(2), (False, False)),
        (mixed(16), (True, False)),
    ],
)  # fmt: skip
def test_groups_of_many_blocks_are_pushed(model, where):
    assert pushed(compiled(model)) == where


def of_ways(model, algo, monkeypatch, ratio, **options):
    """Gradients of two calls, in steps and chunks, and of whole sequences without traces, as one and in blocks."""
    monkeypatch.setattr(unwritten, "_IN_CHUNKS", ratio)
    monkeypatch.setattr(unwritten, "_IN_STEPS", ratio)
    found = []
    for chunk in (1, 3):
        step = compiled(model, algo, **options)
        run = step.scan_value_and_grad(square, chunk=chunk)
        found.append([run(XS, YS), run(XS, YS)])
    assert relative_error(found[1], found[0]) < TOLERANCE
    for how in ("chunks", "replay"):
        step = compiled(model, algo, schedule=etcompile.Schedule(keep_traces=False, how=how), **options)
        found.append(step.scan_value_and_grad(square, chunk=3 if how == "replay" else T)(XS, YS))
    return found, pushed(step if how == "chunks" else compiled(model, algo, **options))


@pytest.mark.parametrize("model", [ring(5), mixed(3)])
@pytest.mark.parametrize(("algo", "options"), [("d_rtrl", {}), ("e_prop", {"kappa": 0.8})])
def test_they_are_the_same(model, algo, options, monkeypatch):
    written, where = of_ways(model, algo, monkeypatch, 1e9, **options)
    assert where == (False, False)
    found, where = of_ways(model, algo, monkeypatch, 0.0, **options)
    assert where == (True, True)
    assert relative_error(found, written) < TOLERANCE
    if algo == "d_rtrl":
        wanted = grad(summed_losses(model[0], model[1], XS, YS, square), PARAMS)
        assert relative_error(found[0][0][1], wanted) < TOLERANCE


def test_what_filters_them_has_them_written(monkeypatch):
    """The credit of `pp_prop` takes a transition from step to step, where no step is at hand."""
    found, where = of_ways(ring(5), "pp_prop", monkeypatch, 0.0, decay=0.9)
    assert where == (False, False)
    written, _ = of_ways(ring(5), "pp_prop", monkeypatch, 1e9, decay=0.9)
    assert relative_error(found, written) < TOLERANCE
