"""A plain attribute that changed since compile is said once, by name; what no step reads, and what a reset makes, is not."""

from __future__ import annotations

import types
import warnings

import brainstate
import jax.numpy as jnp
import numpy as np
import pytest

import etcompile
from etcompile.errors import PlainAttributeWarning

XS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)))


class Cell(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.ones((3, 4)))
        self.decay, self.mask, self.sizes = 0.9, jnp.ones(4), (4, 4)
        self.gains = {"in": 1.0, "out": [1.0, 2.0]}
        self.config = types.SimpleNamespace(shift=0.0, name="cell")
        self.epoch, self.calls = 0, 0
        self.data = list(range(1000))

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, self.sizes[0])))

    def update(self, x):
        self.calls += 1
        drive = self.gains["in"] * x @ self.w.value + self.config.shift
        self.h.value = self.mask * jnp.tanh(self.decay * self.h.value + drive)
        return self.h.value * self.gains["out"][0] + self.sizes[1]


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = [Cell()]

    def update(self, x):
        return self.cells[0](x)


@pytest.fixture
def net():
    return Net()


def loss(out):
    return jnp.mean(out**2)


CHANGES = {
    r"cells\.0\.decay of Net was 0\.9 .* is 0\.1 now": lambda cell: setattr(cell, "decay", 0.1),
    r"cells\.0\.mask of Net was Array.* is Array": lambda cell: setattr(cell, "mask", jnp.zeros(4)),
    r"cells\.0\.sizes of Net was \(4, 4\)": lambda cell: setattr(cell, "sizes", (4, 5)),
    r"cells\.0\.gains\['in'\] of Net was 1\.0": lambda cell: cell.gains.update({"in": 2.0}),
    r"cells\.0\.gains\['out'\]\[0\] of Net was 1\.0": lambda cell: cell.gains["out"].__setitem__(0, 3.0),
    r"cells\.0\.config\.shift of Net was 0\.0": lambda cell: setattr(cell.config, "shift", 1.0),
}


def test_a_changed_attribute_is_said_once_by_name(net):
    step = etcompile.compile(net, XS[0], batch_size=2)
    learn = step.value_and_grad(loss)
    learn(XS[0])
    for text, change in CHANGES.items():
        change(net.cells[0])
        with pytest.warns(PlainAttributeWarning, match=text) as told:
            learn(XS[0])
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learn(XS[0])


def test_it_is_said_before_another_compilation_takes_it_in(net):
    step = etcompile.compile(net, XS[0], batch_size=2)
    net.cells[0].decay = 0.5
    with pytest.warns(PlainAttributeWarning, match="decay"):
        step.reset(batch_size=3)


def test_nothing_is_said_of_what_no_step_reads_or_the_model_makes_itself(net):
    step = etcompile.compile(net, XS[0], batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.cells[0].epoch = 3
        net.cells[0].config.name = "other"
        net.cells[0].decay = 0.9  # the same number
        net.cells[0].note = "new"
        assert (
            len(step.executor.compilations.attributes._values) < 100
        )  # long lists hold data: comparing them would take time
        step.scan(XS)
        step.reset(batch_size=3)
        step.reset(batch_size=2)
        step.cost(batch=5)
        brainstate.nn.init_all_states(net, batch_size=2)
        step.scan(XS)


def test_a_list_of_steps_is_a_sequence(net):
    step = etcompile.compile(net, XS[0], batch_size=2)

    def against(out, y):
        return jnp.mean((out - y) ** 2)

    ys = jnp.ones((4, 2, 4))
    found = []
    for xs, targets in ((XS, ys), (list(XS), list(ys)), (XS, list(ys)), (list(XS), list(np.asarray(ys)))):
        step.reset()
        found.append((step.scan_value_and_grad(against)(xs, targets)[1]["cells.0.w"], step.scan(xs)))
    for other in found[1:]:
        np.testing.assert_array_equal(other[0], found[0][0])
        np.testing.assert_array_equal(other[1], found[0][1])
    import optax

    step.reset()
    losses = step.learn(against, optax.sgd(0.0))(list(XS), list(ys))
    step.reset()
    np.testing.assert_allclose(losses, step.scan_value_and_grad(against)(XS, ys)[0], rtol=1e-10)


def test_lists_of_steps_for_several_inputs_and_as_many_examples_as_steps():
    def two(params, state, a, b):
        h = 0.5 * state["h"] + a @ params["w"] + b["y"]
        return {"h": h}, h

    model = etcompile.from_function(two, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((4, 4))})
    a, b = jnp.ones((4, 4, 3)), jnp.arange(64.0).reshape(4, 4, 4)
    step = etcompile.compile(model, a[0], {"y": b[0]})
    wanted = step.scan((a, {"y": b}))
    for given in ([(a[k], {"y": b[k]}) for k in range(4)], (list(a), [{"y": v} for v in b])):
        step.reset()
        np.testing.assert_array_equal(step.scan(given), wanted)
    step.reset()
    run = step.scan_value_and_grad(lambda out, y: jnp.mean((out - y) ** 2))
    losses, _ = run((list(a), [{"y": v} for v in b]), list(b))
    step.reset()
    np.testing.assert_array_equal(losses, run((a, {"y": b}), b)[0])
