"""Models written as one body: the compiler sees it without marks, the oracles with them."""

from __future__ import annotations

import dataclasses

import brainstate
import jax.numpy as jnp
import numpy as np

from . import base

identity = lambda v: v  # noqa: E731
keep = lambda name, v: v  # noqa: E731


def weights(**shapes) -> dict:
    """Random arrays of the given shapes, scaled by their fan-in; arrays and trees are passed on as they are."""
    rng = np.random.default_rng(7)

    def draw(spec):
        if not isinstance(spec, tuple):
            return spec
        fan_in = spec[0] if len(spec) > 1 else 2
        return jnp.asarray(rng.normal(size=spec) / np.sqrt(fan_in))

    return {name: draw(spec) for name, spec in shapes.items()}


class Written(brainstate.nn.Module):
    """``body(params, state, x, *, cut, put) -> (new states, out)`` as a module with states of its own."""

    def __init__(self, body, params: dict, states: dict, kind):
        super().__init__()
        self.body, self.initial, self.kind = body, states, kind
        self.parameter_names = tuple(params)
        for name, value in params.items():
            setattr(self, name, brainstate.ParamState(value))

    def init_state(self, batch_size=None, **kwargs):
        for name, spec in self.initial.items():
            value = spec(batch_size) if callable(spec) else jnp.zeros(base.shape(batch_size, *spec))
            setattr(self, name, self.kind(value))

    def update(self, x):
        params = {n: getattr(self, n).value for n in self.parameter_names}
        state = {n: getattr(self, n).value for n in self.initial}
        new, out = self.body(params, state, x, cut=identity, put=keep)
        for name, value in new.items():
            getattr(self, name).value = value
        return out


def written(
    body,
    params: dict,
    states: dict,
    *,
    groups=None,
    exact: bool,
    batch,
    dtype,
    model_body=None,
    kind=brainstate.HiddenState,
    functional: bool = False,
    initial=None,
    **kwargs,
):
    """A built case of `body`.

    Parameters
    ----------
    states : dict
        Name to shape without the batch axis, or to a function of the batch size.
    groups : tuple of tuples, optional
        By default one group of all states.
    model_body : callable, optional
        What the model runs, where it differs from `body` by more than the marks (a library's softmax, say).
    functional : bool
        Whether the model is a plain function, for `etcompile.from_function`.
    """
    groups = (tuple(states),) if groups is None else groups

    def step(params, state, x, *, cut, put):
        new, out = body(params, state, x, cut=cut, put=put)
        return {**state, **new}, out

    module = Written(model_body or body, params, states, kind)
    built = base.from_module(
        module, step, groups=groups, exact=exact, batch=batch, dtype=dtype, state=initial, **kwargs
    )
    if not functional:
        return built

    def fn(params, state, x):
        new, out = (model_body or body)(params, state, x, cut=identity, put=keep)
        return {**state, **new}, out

    model = base.Function(fn, built.params, built.state)
    return dataclasses.replace(built, model=model)


def drive(p, x, h, cut):
    """``x U + h W + b`` with the recurrent use cut."""
    return x @ p["U"] + cut(h) @ p["W"] + p["b"]
