"""Models of other frameworks, each with one step as its framework computes it; of NIR graphs, as ``test_nir`` checks it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import nir_models
import numpy as np
import pytest

import etcompile

__all__ = ["FOREIGN", "Foreign", "draw"]


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@dataclass(frozen=True)
class Foreign:
    """A module as a model.

    Attributes
    ----------
    model : FunctionModel
    step : callable
        ``step(params, carry, x) -> (carry, out)``, through the framework's own call of the module.
    params : pytree
        Trained parameters as the framework itself separates them.
    carry : pytree
    size : tuple of int
        Shape of one input.
    names : set of str
        Some of the parameters.
    """

    model: Any
    step: Callable
    params: Any
    carry: Any
    size: tuple[int, ...]
    names: set[str]


# -- Equinox ------------------------------------------------------------------------------------------------------------


def equinox_model(
    make: Callable, names: set[str], call: Callable | None = None, batch: tuple = (2,)
) -> Foreign:
    """A module of 3 inputs and 4 units."""
    import equinox as eqx

    module, carry = make(eqx)
    carry = jax.tree.map(lambda k: draw(k, *batch, 4), carry)
    params, rest = eqx.partition(module, eqx.is_inexact_array)

    def step(params: Any, carry: Any, x: Any) -> Any:
        net = eqx.combine(params, rest)
        if call is not None:
            return call(net, carry, x)
        new = jax.vmap(net)(x, carry) if batch else net(x, carry)
        return new, (new[0] if isinstance(new, tuple) else new)

    return Foreign(etcompile.from_equinox(module, carry, call), step, params, carry, (*batch, 3), names)


def _stack(eqx: Any) -> Any:
    class Leaky(eqx.Module):
        decay: jax.Array
        into: Any
        scale: float = 0.5

        def __call__(self, h: Any, x: Any) -> Any:
            return jnp.tanh(self.decay * h + self.scale * self.into(x))

    class Net(eqx.Module):
        cells: list
        readout: Any
        mask: jax.Array
        activation: Callable

        def __call__(self, carry: Any, x: Any) -> Any:
            h = []
            for cell, old in zip(self.cells, carry, strict=True):
                x = cell(old, x * self.mask[0])
                h.append(x)
            return h, self.activation(self.readout(x))

    k = jax.random.split(jax.random.key(0), 3)
    cells = [
        Leaky(jnp.full(4, 0.5), eqx.nn.Linear(3, 4, key=k[0])),
        Leaky(jnp.full(4, 0.7), eqx.nn.Linear(4, 4, key=k[1])),
    ]
    return Net(cells, eqx.nn.Linear(4, 2, key=k[2]), jnp.array([2]), jax.nn.softplus), [1, 2]


def _mapped(net: Any, carry: Any, x: Any) -> Any:
    return jax.vmap(net)(carry, x)


EQUINOX = {
    "eqx-gru": lambda: equinox_model(
        lambda eqx: (eqx.nn.GRUCell(3, 4, key=jax.random.key(0)), 1), {"weight_ih", "bias_n"}
    ),
    "eqx-lstm": lambda: equinox_model(
        lambda eqx: (eqx.nn.LSTMCell(3, 4, key=jax.random.key(0)), (1, 2)), {"weight_hh", "bias"}
    ),
    "eqx-gru-no-batch": lambda: equinox_model(
        lambda eqx: (eqx.nn.GRUCell(3, 4, key=jax.random.key(0)), 1), {"weight_ih"}, batch=()
    ),
    "eqx-stack": lambda: equinox_model(
        _stack, {"cells.0.decay", "cells.1.into.weight", "readout.bias"}, _mapped
    ),
}


# -- Flax NNX -----------------------------------------------------------------------------------------------------------


def nnx_model(make: Callable, names: set[str], **options: Any) -> Foreign:
    """A module of 3 inputs and 4 units, whose call is (carry, x) -> (carry, out)."""
    from flax import nnx

    module, carry = make(nnx)
    carry = jax.tree.map(lambda k: draw(k, 2, 4), carry)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def step(params: Any, carry: Any, x: Any) -> Any:
        live = nnx.merge(graph, params, rest)
        return (live.cell if isinstance(live, nnx.RNN) else live)(carry, x)

    return Foreign(etcompile.from_nnx(module, carry), step, params, carry, (2, 3), names)


def _nnx_cell(kind: str, carry: Any) -> Callable:
    def make(nnx: Any) -> Any:
        return getattr(nnx, kind)(3, 4, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), carry

    return make


def _nnx_rnn(nnx: Any) -> Any:
    return nnx.RNN(_nnx_cell("GRUCell", 1)(nnx)[0]), 1


def _nnx_stack(nnx: Any) -> Any:
    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            dtype = {"param_dtype": jnp.float64, "rngs": rngs}
            self.cells = nnx.List([nnx.GRUCell(3, 4, **dtype), nnx.LSTMCell(4, 4, **dtype)])
            self.readout = nnx.Linear(4, 2, **dtype)
            self.scale = nnx.Variable(jnp.full(4, 0.5))

        def __call__(self, carry: Any, x: Any) -> Any:
            new = []
            for cell, old in zip(self.cells, carry, strict=True):
                old, x = cell(old, x)
                new.append(old)
            return new, self.readout(x * self.scale)

    return Net(nnx.Rngs(0)), [1, (2, 3)]


NNX = {
    "nnx-gru": lambda: nnx_model(_nnx_cell("GRUCell", 1), {"dense_i.kernel", "dense_h.kernel"}),
    "nnx-lstm": lambda: nnx_model(_nnx_cell("LSTMCell", (1, 2)), {"ii.kernel", "hf.bias"}),
    "nnx-optimized-lstm": lambda: nnx_model(_nnx_cell("OptimizedLSTMCell", (1, 2)), {"dense_i.kernel"}),
    "nnx-simple": lambda: nnx_model(_nnx_cell("SimpleCell", 1), {"dense_i.kernel", "dense_h.kernel"}),
    "nnx-rnn": lambda: nnx_model(_nnx_rnn, {"cell.dense_i.kernel"}),
    "nnx-stack": lambda: nnx_model(
        _nnx_stack, {"cells.0.dense_i.kernel", "cells.1.hf.kernel", "readout.bias"}
    ),
}


# -- Flax linen ---------------------------------------------------------------------------------------------------------


def linen_model(make: Callable, names: set[str], size: tuple[int, ...] = (2, 3)) -> Foreign:
    """A module whose call is (carry, x) -> (carry, out)."""
    import flax.linen as nn

    module, carry = make(nn)
    method = (lambda rnn, *given: rnn.cell(*given)) if isinstance(module, nn.RNN) else None
    variables = module.init(jax.random.key(0), carry, jnp.ones(size), method=method)

    def step(params: Any, carry: Any, x: Any) -> Any:
        return module.apply({"params": params}, carry, x, method=method)

    return Foreign(
        etcompile.from_linen(module, variables, carry), step, variables["params"], carry, size, names
    )


def _linen_cell(kind: str, *carry: int) -> Callable:
    def make(nn: Any) -> Any:
        held = tuple(draw(k, 2, 4) for k in carry)
        dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        return getattr(nn, kind)(4, **dtypes), held if len(held) > 1 else held[0]

    return make


def _linen_convolution(nn: Any) -> Any:
    cell = nn.ConvLSTMCell(2, (3,), dtype=jnp.float64, param_dtype=jnp.float64)
    return cell, (draw(1, 2, 5, 2), draw(2, 2, 5, 2))


def _linen_rnn(nn: Any) -> Any:
    cell, carry = _linen_cell("GRUCell", 1)(nn)
    return nn.RNN(cell), carry


def _linen_stack(nn: Any) -> Any:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            dtype, new = {"param_dtype": jnp.float64}, []
            for k, cell in enumerate(
                (nn.GRUCell(4, name="below", **dtype), nn.MGUCell(4, name="above", **dtype))
            ):
                h, x = cell(carry[k], x)
                new.append(h)
            return new, nn.Dense(2, name="readout", **dtype)(x)

    return Net(), [draw(1, 2, 4), draw(2, 2, 4)]


LINEN = {
    "linen-gru": lambda: linen_model(_linen_cell("GRUCell", 1), {"hn.kernel", "in.bias"}),
    "linen-lstm": lambda: linen_model(_linen_cell("LSTMCell", 1, 2), {"hf.kernel"}),
    "linen-optimized-lstm": lambda: linen_model(_linen_cell("OptimizedLSTMCell", 1, 2), {"hf.kernel"}),
    "linen-mgu": lambda: linen_model(_linen_cell("MGUCell", 1), {"hf.kernel"}),
    "linen-simple": lambda: linen_model(_linen_cell("SimpleCell", 1), {"h.kernel", "i.kernel"}),
    "linen-convolution": lambda: linen_model(_linen_convolution, {"hh.kernel"}, (2, 5, 3)),
    "linen-rnn": lambda: linen_model(_linen_rnn, {"cell.hn.kernel"}),
    "linen-stack": lambda: linen_model(_linen_stack, {"below.hn.kernel", "above.hf.kernel", "readout.bias"}),
}


# -- Spyx ---------------------------------------------------------------------------------------------------------------


def spyx_model(*kinds: str) -> Foreign:
    """Layers of Spyx, NNX modules whose call is (x, state) -> (out, state), each behind a product, and a leaky readout."""
    import spyx.nn as snn
    from flax import nnx

    rngs, layers = nnx.Rngs(0), []
    for size, kind in zip((3, 4), kinds, strict=False):
        layers += [
            nnx.Linear(size, 4, param_dtype=jnp.float64, rngs=rngs),
            getattr(snn, kind)((4,), threshold=0.5, rngs=rngs),
        ]
    layers += [nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs), snn.LI((2,), rngs=rngs)]
    module = snn.Sequential(*layers)
    wide = jax.tree.map(lambda v: v.astype(jnp.float64), nnx.state(module, nnx.Param))
    nnx.update(module, wide)
    leaves, tree = jax.tree.flatten(module.initial_state(2))
    carry = jax.tree.unflatten(tree, [0.5 + 0.5 * draw(k, *v.shape) for k, v in enumerate(leaves)])
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def call(module: Any, carry: Any, x: Any) -> Any:
        out, new = module(x, carry)
        return new, out

    def step(params: Any, carry: Any, x: Any) -> Any:
        return call(nnx.merge(graph, params, rest), carry, x)

    names = {"layers.0.kernel", f"layers.{len(layers) - 1}.beta"}
    return Foreign(etcompile.from_nnx(module, carry, call), step, params, carry, (2, 3), names)


SPYX = {
    f"spyx-{'-'.join(kinds).lower()}": functools.partial(spyx_model, *kinds)
    for kinds in (("ALIF",), ("CuBaLIF",), ("RLIF",), ("RCuBaLIF",), ("LIF", "PSU_LIF"), ("RIF", "IF"))
}


# -- NIR ----------------------------------------------------------------------------------------------------------------


def nir_model(make: Callable) -> Foreign:
    import nir

    case = make(nir)
    model = etcompile.from_nir(case.graph, nir_models.DT, batch_size=2, **case.options)
    leaves, tree = jax.tree.flatten(model.state)
    model.state = jax.tree.unflatten(tree, [0.3 * draw(k, *v.shape) for k, v in enumerate(leaves)])
    return Foreign(model, model.fn, model.params, model.state, (2, *case.shape), case.names)


NIR = {name: functools.partial(nir_model, make) for name, make in nir_models.CASES.items()}


def _parameters(package: str, makers: dict[str, Callable]) -> list[Any]:
    missing = importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"{package} is not installed")
    return [pytest.param(make, id=name, marks=skip) for name, make in makers.items()]


FOREIGN = [
    *_parameters("equinox", EQUINOX),
    *_parameters("flax", NNX),
    *_parameters("flax", LINEN),
    *_parameters("spyx", SPYX),
    *_parameters("nir", NIR),
]
