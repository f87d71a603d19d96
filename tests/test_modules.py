"""Modules in lists and dicts, modules that are shared, and modules under Vmap: the gradient of each parameter, once."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import etcompile

nn = brainstate.nn


class InLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = [nn.GRUCell(3, 4), nn.GRUCell(4, 4)]
        self.heads = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}

    def update(self, x):
        for cell in self.cells:
            x = cell(x)
        return self.heads["a"](x) - self.heads["b"](x)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.again = self.encoder
        self.cell = nn.GRUCell(4, 4)

    def update(self, x):
        return self.cell(self.encoder(x) + self.again(2 * x))


def squares(out, y):
    return jnp.sum((out - y) ** 2)


@pytest.mark.parametrize("make", [InLists, Shared])
def test_modules_in_containers_and_shared_modules(make):
    net = make()
    x = np.random.default_rng(0).normal(size=(2, 3))
    step = etcompile.compile(net, x, batch_size=2)
    _, found = step.value_and_grad(squares)(x, 1.0)
    nn.init_all_states(net, batch_size=2)
    by_state = {id(state): found[path] for path, state in step.param_states.items()}
    states = {str(k): s for k, s in enumerate(net.states(brainstate.ParamState).values())}
    wanted = brainstate.transform.grad(lambda: squares(net(x), 1.0), states)()
    assert len(by_state) == len(found) == len({id(s) for s in states.values()})
    for key, state in states.items():
        for a, b in zip(jax.tree.leaves(by_state[id(state)]), jax.tree.leaves(wanted[key]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_cell_of_single_examples_under_vmap_is_the_cell_of_a_batch():
    xs = np.random.default_rng(0).normal(size=(5, 2, 3))
    ys = np.ones((5, 2, 4))
    found = []
    for mapped in (True, False):
        brainstate.random.seed(3)
        cell = nn.GRUCell(3, 4)
        if mapped:
            nn.vmap_init_all_states(cell, axis_size=2, state_tag="new")
            step = etcompile.compile(nn.Vmap(cell, vmap_states="new"), xs[0])
        else:
            step = etcompile.compile(cell, xs[0], batch_size=2)
        found.append(step.scan_value_and_grad(squares, chunk=2)(xs, ys)[1])
    first, second = (jax.tree.leaves(g) for g in found)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
