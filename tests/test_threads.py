"""Two threads that call one step: each call goes on from what the last one left, and none is lost."""

from __future__ import annotations

import sys
import threading

import jax.numpy as jnp
import pytest

import etcompile

CALLS = 150


def counter(params, state, x):
    h = state["h"] + 1 + 0 * (x @ params["w"])
    return {"h": h}, h


@pytest.fixture(autouse=True)
def switching():
    """Threads that switch as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("how", ["step", "value_and_grad", "scan"])
def test_no_call_is_lost(how):
    state = {"h": jnp.zeros((2, 4))}
    step = etcompile.compile(
        etcompile.from_function(counter, {"w": jnp.ones((3, 4))}, state), jnp.ones((2, 3))
    )
    x, xs = jnp.ones((2, 3)), jnp.ones((1, 2, 3))
    gradient = step.value_and_grad(jnp.sum)
    call = {"step": lambda: step(x), "value_and_grad": lambda: gradient(x), "scan": lambda: step.scan(xs)}[
        how
    ]
    call()
    step.reset()
    failed = []

    def work():
        try:
            for _ in range(CALLS):
                call()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert jnp.all(step.params["w"] == 1)
    assert step(x)[0, 0] == 2 * CALLS + 1
