"""What it takes to compile a model grows as the model does: counted in calls and equations, never in seconds."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import etcompile

PACKAGE = str(Path(etcompile.__file__).parent)
WIDTH, BATCH = 3, 2


def layers(n):
    """A gated cell on another, n times."""
    params = {f"{k}{i}": jnp.full((WIDTH, WIDTH), 0.1) for k in "wr" for i in range(n)}
    state = {f"h{i}": jnp.zeros((BATCH, WIDTH)) for i in range(n)}

    def fn(params, state, x):
        new = {}
        for i in range(n):
            h, drive = state[f"h{i}"], x @ params[f"w{i}"]
            gate = jax.nn.sigmoid(drive + h @ params[f"r{i}"])
            x = new[f"h{i}"] = gate * h + (1 - gate) * jnp.tanh(drive)
        return new, x

    return fn, params, state


def leaky_populations(n):
    """The same, and all decays are numbers: traces are replaced by filters."""
    return populations(n, jnp.asarray)


def populations(n, squash=jnp.tanh):
    """n populations with filtered input, each of which projects to three others."""
    params = {f"w{i}_{k}": jnp.full((WIDTH, WIDTH), 0.1) for i in range(n) for k in range(3)}
    state = {f"{k}{i}": jnp.zeros((BATCH, WIDTH)) for k in "vs" for i in range(n)}

    def fn(params, state, x):
        new = {}
        for i in range(n):
            current = 0.8 * state[f"s{i}"] + (x if i == 0 else 0)
            for k in range(3):
                current += jnp.tanh(state[f"v{(i + k + 1) % n}"]) @ params[f"w{i}_{k}"]
            new[f"s{i}"] = current
            new[f"v{i}"] = squash(0.9 * state[f"v{i}"] + current)
        return new, new["v0"]

    return fn, params, state


MODELS = {"layers": layers, "populations": populations, "leaky populations": leaky_populations}
EXAMPLE = jnp.ones((BATCH, WIDTH))


def compiled(name, n):
    return etcompile.compile(etcompile.from_function(*MODELS[name](n)), EXAMPLE)


def calls(run):
    """How many functions of the package are called."""
    count = 0

    def seen(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def growth(of_size, n):
    """How much more is added from 2n to 4n than from n to 2n: 2 where it is linear, 4 where it is quadratic."""
    small, middle, large = (of_size(size) for size in (n, 2 * n, 4 * n))
    return (large - middle) / (middle - small)


@pytest.mark.parametrize("name", MODELS)
def test_calls_to_compile_and_report_grow_with_the_model(name):
    compiled(name, 4)  # what all models share is traced
    assert growth(lambda n: calls(lambda: str(compiled(name, n).report())), 4) < 2.2


@pytest.mark.parametrize("name", MODELS)
def test_equations_of_a_step_with_gradients_grow_with_the_model(name):
    def equations(n):
        step = compiled(name, n)

        def loss(params, carry, x):
            return jnp.sum(step.apply(params, carry, x)[1] ** 2)

        return len(jax.make_jaxpr(jax.grad(loss))(step.params, step.init_carry(), EXAMPLE).jaxpr.eqns)

    assert growth(equations, 3) < 2.1


def delayed(n):
    """Leaky units with a shift register of n slots: what each slot passes on is constant."""

    def fn(params, state, x):
        h = 0.7 * state["h"] + x @ params["w"] + state["slots"][-1] @ params["r"]
        return {"h": h, "slots": jnp.stack([h, *state["slots"][:-1]])}, h

    params = {"w": jnp.full((WIDTH, WIDTH), 0.1), "r": jnp.full((WIDTH, WIDTH), 0.1)}
    return fn, params, {"h": jnp.zeros((BATCH, WIDTH)), "slots": jnp.zeros((n, BATCH, WIDTH))}


@contextlib.contextmanager
def xla_programs():
    """A list with an entry for each program that XLA compiles."""
    found = []

    def seen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)


def test_constant_responses_take_no_programs_of_their_own():
    with xla_programs() as found:
        jax.jit(lambda x: x * 1.25)(jnp.ones(7))
    assert found, "programs are counted"
    model = etcompile.from_function(*delayed(9))
    with xla_programs() as found:
        step = etcompile.compile(model, EXAMPLE)
        assert "constant=" in str(step.program)
    assert not found


@pytest.mark.parametrize("name", ["populations", "leaky populations"])
def test_calls_to_trace_a_step_with_gradients_grow_with_the_model(name, monkeypatch):
    # A cost is found by tracing what value_and_grad runs; what is counted here ends there.
    monkeypatch.setattr("etcompile.runtime.cost.priced", lambda *_: None)

    def run(n):
        return calls(compiled(name, n).cost)

    run(4)
    assert growth(run, 4) < 2.2
