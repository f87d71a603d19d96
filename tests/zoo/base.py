"""What a zoo case is, and how one is built from a brainstate module or from a plain function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from brainstate.transform import StatefulFunction

LENGTH = 7
BATCH = 3


@dataclass(frozen=True)
class Function:
    """A model for `etcompile.from_function`: ``fn(params, state, x) -> (state, out)``."""

    fn: Callable
    params: Any
    state: Any


@dataclass(frozen=True)
class Built:
    """One model with data, ready to run.

    Attributes
    ----------
    model : brainstate.nn.Module or Function
        States hold the random values of `state`.
    step : callable or None
        The instrumented equivalent, written by hand; None where there is none (then `plain_step` serves for
        backpropagation through time and the first step only).
    params, state : dict
        By dotted path. `state` holds every state that the model carries, random keys included.
    groups : tuple of tuples of str, or None
        The hidden groups.
    exact : bool or None
        Whether nothing is cut between hidden states, or between a parameter and a hidden state. None: not stated.
    """

    model: Any
    step: Callable | None
    params: dict
    state: dict
    groups: tuple[tuple[str, ...], ...] | None
    xs: Any
    targets: tuple
    loss_fn: Callable
    exact: bool | None
    spikes: tuple[str, ...] = ()
    tolerance: float = 1e-10

    @property
    def plain_step(self) -> Callable:
        """The model itself as ``step(params, state, x, *, cut, put)``, for autodiff only: nothing is ever cut."""
        return functional(self.model)


@dataclass(frozen=True)
class Case:
    """A named model. `build(batch, dtype)` makes a fresh one; `batch` None means no batch axis."""

    name: str
    build: Callable[[int | None, Any], Built] = field(repr=False)
    tags: frozenset[str] = frozenset()
    batch: int | None = BATCH

    def __call__(self, dtype=jnp.float64) -> Built:
        """The case at its usual batch size."""
        return self.build(self.batch, dtype)


CASES: list[Case] = []


def case(*tags: str, batch: int | None = BATCH, name: str | None = None):
    """Add a builder ``(batch, dtype) -> Built`` to `CASES`, named after the function."""

    def add(build):
        CASES.append(Case(name or build.__name__, build, frozenset(tags), batch))
        return build

    return add


def dotted(path) -> str:
    return ".".join(str(part) for part in path)


def cast(leaf, dtype):
    """A floating leaf in `dtype`, a complex one in the complex type of that precision, others as they are."""
    leaf = np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.asarray(leaf, jnp.complex128 if jnp.dtype(dtype).itemsize == 8 else jnp.complex64)
    return jnp.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


def noisy(rng: np.random.Generator, tree, scale: float, dtype):
    """Every inexact leaf of `tree` moved by normal noise of size `scale`, in `dtype`."""

    def move(leaf):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            return leaf
        leaf = np.asarray(leaf)
        noise = rng.normal(size=leaf.shape) * scale
        if np.iscomplexobj(leaf):
            noise = noise + 1j * rng.normal(size=leaf.shape) * scale
        return cast(leaf + noise, dtype)

    return jax.tree.map(move, tree)


def shape(batch: int | None, *rest: int) -> tuple[int, ...]:
    return rest if batch is None else (batch, *rest)


def squared_error(out, target):
    return 0.5 * jnp.sum((out - target) ** 2)


def functional(model) -> Callable:
    """``step(params, state, x, *, cut, put)`` around a brainstate module's own update, or around a plain function."""
    if isinstance(model, Function):
        return lambda params, state, x, *, cut, put: model.fn(params, state, x)

    named = {dotted(path): state for path, state in model.states().items()}

    def step(params, state, x, *, cut, put):
        stateful = StatefulFunction(model.update, name="zoo")
        stateful.make_jaxpr(x)
        used = stateful.get_states(x)
        names = {id(s): n for n, s in named.items()}
        given = {**params, **state}
        keys = [names.get(id(s), "rng") for s in used]
        new, out = stateful.jaxpr_call([given[k] for k in keys], x)
        after = dict(state)
        for key, value in zip(keys, new, strict=True):
            if value is not None and key in state:
                after[key] = value
        return after, out

    return step


def from_module(
    module: brainstate.nn.Module,
    step: Callable | None,
    *,
    groups,
    exact: bool | None,
    batch: int | None,
    dtype,
    n_in: int = 3,
    n_out: int = 2,
    x_shape: tuple[int, ...] | None = None,
    x_integers: int | None = None,
    x_scale: float = 1.0,
    xs=None,
    targets: tuple | None = None,
    loss_fn: Callable = squared_error,
    param_noise: float = 0.3,
    state_noise: float = 0.5,
    params: dict | None = None,
    state: dict | None = None,
    spikes: tuple[str, ...] = (),
    rng_state: bool = False,
    low_precision_states: tuple[str, ...] = (),
    tolerance: float = 1e-10,
    seed: int = 0,
) -> Built:
    """Initialise `module`, move its parameters and states by noise, and draw inputs and targets.

    `params` and `state` override values by path (a callable gets the value it replaces).
    """
    rng = np.random.default_rng(seed)
    brainstate.nn.init_all_states(module, batch_size=batch)
    param_values, state_values = {}, {}
    for path, st in module.states().items():
        name = dotted(path)
        trained = isinstance(st, brainstate.ParamState)
        value = noisy(rng, st.value, param_noise if trained else state_noise, dtype)
        given = ((params if trained else state) or {}).get(name)
        if given is not None:
            value = given(value) if callable(given) else given
            value = jax.tree.map(lambda leaf: cast(leaf, dtype), value)
        if name in low_precision_states:
            value = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), value)
        st.value = value
        (param_values if trained else state_values)[name] = value
    if rng_state:
        brainstate.random.seed(seed)
        state_values["rng"] = brainstate.random.DEFAULT.value
    if xs is None:
        full = (LENGTH, *shape(batch, *((n_in,) if x_shape is None else x_shape)))
        if x_integers is None:
            xs = cast(rng.normal(size=full) * x_scale, dtype)
        else:
            xs = jnp.asarray(rng.integers(0, x_integers, size=full))
    if targets is None:
        targets = (cast(rng.normal(size=(LENGTH, *shape(batch, n_out))), dtype),)
    return Built(
        module, step, param_values, state_values, groups, xs, targets, loss_fn, exact, spikes, tolerance
    )


def from_function(fn, step, params, state, **kwargs) -> Built:
    """Like `from_module` for a plain function; `params` and `state` are flat dicts by name."""
    batch, dtype, rng = kwargs["batch"], kwargs["dtype"], np.random.default_rng(kwargs.get("seed", 0))
    full = (LENGTH, *shape(batch, *kwargs.get("x_shape", (kwargs.get("n_in", 3),))))
    xs = kwargs.get("xs")
    if xs is None:
        xs = cast(rng.normal(size=full), dtype)
    targets = kwargs.get("targets") or (
        cast(rng.normal(size=(LENGTH, *shape(batch, kwargs.get("n_out", 2)))), dtype),
    )
    params = jax.tree.map(lambda leaf: cast(leaf, dtype), params)
    state = jax.tree.map(lambda leaf: cast(leaf, dtype), state)
    return Built(
        Function(fn, params, state),
        step,
        params,
        state,
        kwargs["groups"],
        xs,
        targets,
        kwargs.get("loss_fn", squared_error),
        kwargs["exact"],
    )


def linear(p: dict, x):
    """What `brainstate.nn.Linear` does with its parameters."""
    y = x @ p["weight"]
    return y + p["bias"] if "bias" in p else y


def cat(*parts):
    return jnp.concatenate(parts, axis=-1)
