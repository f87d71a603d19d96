"""Large arrays that a model closes over are arguments of what is compiled, and change no number."""

import re

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error

import etcompile
from etcompile.frontend.jaxpr import Constant
from etcompile.runtime.jitted import Constants

UNITS, SYNAPSES = 40, 6000
DRAW = np.random.default_rng(0)
SENDERS, RECEIVERS = DRAW.integers(0, UNITS, (2, SYNAPSES))
XS, YS = jnp.asarray(DRAW.standard_normal((3, UNITS))), jnp.asarray(DRAW.standard_normal((3, UNITS)))


class Sparse(brainstate.nn.Module):
    """Leaky units with a synapse for each pair of indices."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.asarray(np.random.default_rng(1).standard_normal(SYNAPSES) / 20))
        self.h = brainstate.HiddenState(jnp.zeros(UNITS))

    def update(self, x):
        arrived = jax.ops.segment_sum(self.w.value * jnp.tanh(self.h.value + x)[SENDERS], RECEIVERS, UNITS)
        self.h.value = jnp.tanh(0.8 * self.h.value + arrived)
        return self.h.value


def squared(out, y):
    return jnp.mean((out - y) ** 2)


def sparse_step():
    return etcompile.compile(Sparse(), XS[0])


PATHS = {
    "step": lambda step: step(XS[0]),
    "value_and_grad": lambda step: step.value_and_grad(squared)(XS[0], YS[0]),
    "scan": lambda step: step.scan(XS),
    "scan_value_and_grad": lambda step: step.scan_value_and_grad(squared, chunk=1)(XS, YS),
    "chunks": lambda step: step.scan_value_and_grad(squared, chunk=2)(XS, YS),
    "learn": lambda step: step.learn(squared, optax.sgd(0.1))(XS, YS),
}


def longest_literal(run, where):
    """Letters of the longest array in hexadecimal in what JAX compiles meanwhile: 8 or 16 for each index."""
    jax.config.update("jax_dump_ir_to", str(where))
    try:
        run()
    finally:
        jax.config.update("jax_dump_ir_to", "")
    programs = [p.read_text() for p in where.glob("*") if p.is_file()]
    assert programs
    return max(
        (len(found) for program in programs for found in re.findall("0x[0-9A-F]+", program)), default=0
    )


@pytest.mark.parametrize("path", PATHS)
def test_large_constants_are_not_in_the_compiled_program(path, tmp_path):
    step = sparse_step()
    assert longest_literal(lambda: PATHS[path](step), tmp_path) < SYNAPSES


def test_a_function_of_the_user_that_closes_over_them_has_them_inside(tmp_path):
    step = sparse_step()
    args = step.params, step.init_carry(), XS[0]
    assert longest_literal(lambda: jax.jit(step.apply)(*args), tmp_path) > 8 * SYNAPSES


def test_gradients_are_those_of_the_step_that_closes_over_them():
    """`apply` under the user's own jit closes over them, as any function does."""
    step = sparse_step()

    def loss(params, carry, x, y):
        carry, out = step.apply(params, carry, x)
        return squared(out, y), carry

    carry, params = step.init_carry(), step.params
    wanted = []
    for x, y in zip(XS, YS, strict=True):
        grads, carry = jax.jit(jax.grad(loss, has_aux=True))(params, carry, x, y)
        wanted.append(grads)
    found = [step.value_and_grad(squared)(x, y)[1] for x, y in zip(XS, YS, strict=True)]
    total = jax.tree.map(lambda *v: sum(v), *wanted)
    for one, other in zip(wanted, found, strict=True):
        assert relative_error(other, one) < 1e-10
    for chunk in (1, 2):
        step.reset()
        assert relative_error(step.scan_value_and_grad(squared, chunk=chunk)(XS, YS)[1], total) < 1e-10
    step.reset()
    assert jnp.abs(jax.tree.leaves(total)[0]).max() > 0.01
    _, shorter = step.scan_value_and_grad(squared, chunk=1)(
        XS[:2], YS[:2]
    )  # another length of the same function
    assert relative_error(shorter, jax.tree.map(lambda *v: sum(v), *wanted[:2])) < 1e-10


@pytest.mark.parametrize("outside", [False, True])
def test_indices_out_of_bounds_are_dropped_as_jax_does(outside):
    """Indices known to be in bounds are not looked at again; one that is not still counts for nothing."""
    receivers = RECEIVERS.copy()
    receivers[0] = UNITS + 3 if outside else 0

    def leaky(params, state, x):
        h = 0.5 * state["h"] + jnp.zeros(UNITS).at[receivers].add(params["w"] * x[SENDERS], mode="drop")
        return {"h": h}, h

    w = jnp.asarray(DRAW.standard_normal(SYNAPSES))
    model = etcompile.from_function(leaky, {"w": w}, {"h": jnp.zeros(UNITS)})
    step = etcompile.compile(model, XS[0])
    modes = {
        str(o.params["mode"])
        for o in step.executor.model.graph.operations
        if o.name.startswith("scatter") and isinstance(o.inputs[1], Constant)
    }
    assert modes == {"GatherScatterMode.FILL_OR_DROP" if outside else "GatherScatterMode.PROMISE_IN_BOUNDS"}
    _, grads = step.scan_value_and_grad(squared, chunk=1)(XS, YS)

    def whole(w):
        def body(h, item):
            state, out = leaky({"w": w}, {"h": h}, item[0])
            return state["h"], squared(out, item[1])

        return jnp.sum(jax.lax.scan(body, jnp.zeros(UNITS), (XS, YS))[1])

    assert relative_error(grads["w"], jax.grad(whole)(w)) < 1e-10
    assert (float(grads["w"][0]) == 0) is outside


def test_a_constant_is_kept_once_and_bound_to_no_device():
    kept, array = Constants(), np.arange(5000)
    bound = jax.device_put(jnp.asarray(array), jax.devices()[0])
    key = kept.key(array)
    assert key is not None and kept.key(array.copy()) == key == kept.key(bound)
    assert not kept[key].committed
    other = Constants()
    assert not other[other.key(bound)].committed
    assert kept.key(array[:100]) is None  # small ones stay in the program
