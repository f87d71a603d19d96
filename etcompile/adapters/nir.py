"""Networks in the neuromorphic exchange format NIR as models, and trained weights back into NIR."""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u

from etcompile.adapters.nir_nodes import (
    NODES,
    Discretisation,
    as_read,
    fast_sigmoid,
    fields_of,
    is_register,
    kind_of,
    read_line,
    steps_of,
)
from etcompile.adapters.nir_shapes import dtype_of, shapes_of
from etcompile.adapters.nir_wiring import Path, Wiring, dotted, wired
from etcompile.errors import InputError, ModelError, OptionError
from etcompile.frontend.function import FunctionModel, function_model
from etcompile.integers import positive_integer

__all__ = ["NirSource", "from_nir", "nir_model"]

_EXAMPLE = "etcompile.from_nir(graph, dt=1e-3)"

#: What a node that is read a step late, and shows none of its states, showed.
_SHOWN = "shown"


@dataclass(frozen=True, eq=False)
class NirSource:
    """The graph that a model was made of.

    Attributes
    ----------
    graph : nir.NIRGraph
        A copy of its own.
    """

    graph: Any

    def with_params(self, params: Any) -> Any:
        """The graph with these parameters in the place of its own; shapes and dtypes stay those of the graph."""
        graph = copy.deepcopy(self.graph)
        _write(graph, params)
        return graph


def from_nir(
    graph: Any,
    dt: Any = None,
    batch_size: int | None = None,
    *,
    trained: Collection[str] = ("weight", "bias"),
    method: str = "forward_euler",
    surrogate: Callable[[Any], Any] = fast_sigmoid,
    reset: str = "to_value",
    current: str = "old",
    dtype: Any = None,
) -> FunctionModel:
    """Make a model of a network in the format of the package ``nir``, accepted wherever a brainstate module is.

    Parameters
    ----------
    graph : nir.NIRGraph
        Such as ``nir.read("network.nir")``. It is not changed.
    dt : float or Quantity
        Length of a step: a number in the unit of the graph's time constants (seconds, by NIR), or a quantity of time.
    batch_size : int, optional
        Inputs and states have a batch axis of this size in front. None: no batch axis.
    trained : collection of str
        Which arrays are trained: fields of nodes (``"weight"``, ``"tau"``) or of one node by its path (``"lif.tau"``).
    method : {"forward_euler", "exponential_euler"}
        How a leaky value moves in a step towards its target: by dt/τ of the way, or by 1 - exp(-dt/τ).
    surrogate : callable
        Spikes of ``v - threshold``: 1 above zero and 0 elsewhere, with a derivative of its own. By default the one of SuperSpike,
        ``1 / (1 + 25 |v - threshold|)²``. Those of braintools, Spyx and others fit.
    reset : {"to_value", "subtract"}
        A spike puts the potential to ``v_reset``, as NIR says, or takes ``v_threshold - v_reset`` off it.
    current : {"old", "new"}
        Which synaptic current drives the potential of CubaLI and CubaLIF: that of the start of the step, or the one that the
        step has made.
    dtype : dtype, optional
        Of all arrays; by default the widest of the graph's floating-point arrays, as JAX makes it.

    Returns
    -------
    FunctionModel
        Its parameters are ``{node: {field: array}}``, and so are gradients; nodes of a subgraph stand in a dict of its own.
        States start at zero. A graph with several inputs takes a dict by name, and one with several outputs gives one.
        ``step.to_nir()`` is the graph with the weights as they are.

    Raises
    ------
    ModelError
        For nodes that are not known, shapes that do not fit, loops without a state, and time constants that dt does not
        resolve.
    OptionError
        For options that cannot be taken.

    Notes
    -----
    What several edges bring to a node is summed. A loop is cut behind a neuron or integrator: what follows reads its output of
    the step before. Connections from the inputs on stay in their step, and the one that leads back is late. A delay is rounded
    to whole steps; in a loop one of a step or more closes it by itself.

    Examples
    --------
    >>> import nir, numpy as np, jax.numpy as jnp, etcompile
    >>> ones = np.ones(5)
    >>> neurons = nir.LIF(tau=0.02 * ones, r=ones, v_leak=0 * ones, v_threshold=ones)
    >>> graph = nir.NIRGraph.from_list(nir.Affine(np.ones((5, 3)), 0 * ones), neurons)
    >>> step = etcompile.compile(etcompile.from_nir(graph, dt=1e-3, batch_size=4), jnp.ones((4, 3)))
    >>> step.params["affine"]["weight"].shape
    (5, 3)
    """
    if not _is_graph(graph):
        raise ModelError(
            "from_nir needs a nir.NIRGraph first.", got=f"a {type(graph).__name__}", expected=_EXAMPLE
        )
    if batch_size is not None:
        batch_size = positive_integer("batch_size", batch_size)
    how = Discretisation(
        _seconds(dt),
        _either("method", method, "forward_euler", "exponential_euler") == "exponential_euler",
        _callable("surrogate", surrogate),
        _either("reset", reset, "to_value", "subtract") == "subtract",
        _either("current", current, "old", "new") == "new",
        batch_size is not None,
    )
    graph = copy.deepcopy(graph)
    _refuse_unknown(graph, ())
    wiring = wired(graph, lambda node: bool(kind_of(node).states), lambda node: is_register(node, how.dt))
    arrays = _arrays(wiring, dtype)
    for path, node in wiring.nodes.items():
        _check_times(path, node, how)
    chosen = _chosen(wiring, trained)
    shapes = shapes_of(wiring, arrays, how)
    params = _nested({path: {f: a[f] for f in a if (path, f) in chosen} for path, a in arrays.items()})
    fixed = {path: {f: v for f, v in a.items() if (path, f) not in chosen} for path, a in arrays.items()}
    lead = () if batch_size is None else (batch_size,)
    inputs = {name: shapes[path] for name, path in wiring.inputs.items()}
    kind = dtype_of(arrays)
    state = _initial(wiring, shapes, lead, kind, how)

    def network(params: Any, state: Any, *given: Any) -> tuple[Any, Any]:
        held = {path: {**a, **_at(params, path)} for path, a in fixed.items()}
        return _run(wiring, how, held, state, _read(given, inputs, kind, how))

    return function_model(network, params, state, source=NirSource(graph))


def nir_model(model: Any, inputs: tuple[Any, ...]) -> None:
    """None for what is no NIR graph; for one nobody said how long a step is, so that it is refused."""
    if _is_graph(model):
        raise ModelError("compile needs the time step of the NIR graph.", got="a NIRGraph", expected=_EXAMPLE)


def _is_graph(value: Any) -> bool:
    nir = sys.modules.get("nir")
    return nir is not None and isinstance(value, nir.NIRGraph)


# -- what is asked ------------------------------------------------------------------------------------------------------


def _seconds(dt: Any) -> float:
    """The time step as a positive number."""
    expected = f"a positive number in the unit of the time constants, or a quantity of time: {_EXAMPLE}"
    if dt is None:
        raise OptionError("from_nir needs the time step.", got="no dt", expected=expected)
    try:
        seconds = float(dt.to_decimal(u.second) if isinstance(dt, u.Quantity) else dt)
    except (TypeError, ValueError, u.UnitMismatchError) as error:
        raise OptionError("dt is no length of time.", got=f"dt={dt!r}", expected=expected) from error
    if not (seconds > 0.0 and math.isfinite(seconds)):
        raise OptionError("dt must be positive.", got=f"dt={dt!r}", expected=expected)
    return seconds


def _either(name: str, value: Any, *choices: str) -> str:
    if value not in choices:
        raise OptionError(f"{name} must be one of {choices}.", got=f"{name}={value!r}")
    return value


def _callable(name: str, value: Any) -> Callable[[Any], Any]:
    if not callable(value):
        raise OptionError(
            f"{name} must be a function of v - threshold.",
            got=f"{name}={value!r}",
            expected="0 or 1, with a derivative of its own, such as braintools.surrogate.Sigmoid()",
        )
    return value


def _chosen(wiring: Wiring, trained: Collection[str]) -> set[tuple[Path, str]]:
    """Which field of which node is trained."""
    names = (trained,) if isinstance(trained, str) else tuple(trained)
    fields = {
        (path, field): {field, f"{dotted(path)}.{field}"}
        for path, node in wiring.nodes.items()
        for field in fields_of(node)
    }
    usual = {field for kind in NODES.values() for field in kind.arrays}
    for name in names:
        if name not in usual and not any(name in said for said in fields.values()):
            raise OptionError(
                "trained names what no node has.",
                got=f"{name!r}",
                expected=f"some of {sorted({text for said in fields.values() for text in said})}",
                hint="a delay is a whole number of steps, which has no derivative."
                if "delay" in name
                else None,
            )
    return {key for key, said in fields.items() if said & set(names)}


# -- the nodes and their arrays -----------------------------------------------------------------------------------------


def _refuse_unknown(graph: Any, path: Path) -> None:
    for name, node in graph.nodes.items():
        if _is_graph(node):
            _refuse_unknown(node, (*path, name))
        elif type(node).__name__ not in NODES:
            raise ModelError(
                f"the NIR node {dotted((*path, name))} is of a type that is not known.",
                got=type(node).__name__,
                expected=f"one of {', '.join([*NODES, 'NIRGraph'])}",
            )


def _arrays(wiring: Wiring, dtype: Any) -> dict[Path, dict[str, jax.Array]]:
    """The arrays of all nodes in one dtype."""
    found = {
        path: {f: np.asarray(getattr(node, f)) for f in fields_of(node)}
        for path, node in wiring.nodes.items()
    }
    if dtype is None:
        floating = [
            a for held in found.values() for a in held.values() if jnp.issubdtype(a.dtype, jnp.floating)
        ]
        dtype = jnp.result_type(*(floating or [float]))
    elif not jnp.issubdtype(dtype, jnp.floating):
        raise OptionError("dtype must be one of real numbers.", got=f"dtype={dtype!r}")
    return {path: {f: jnp.asarray(a, dtype) for f, a in held.items()} for path, held in found.items()}


def _check_times(path: Path, node: Any, how: Discretisation) -> None:
    """Time constants are positive, and a step of forward Euler does not overshoot by more than it corrects."""
    for field in kind_of(node).times:
        shortest = float(np.min(np.asarray(getattr(node, field))))
        if not shortest > 0.0:
            raise ModelError(
                f"{dotted(path)}.{field} is no time constant.",
                got=f"{shortest:g}",
                expected="positive numbers",
            )
        if not how.exponential and how.dt > 2.0 * shortest:
            raise ModelError(
                f"forward Euler with dt={how.dt:g} grows without bound at {dotted(path)}.{field}.",
                got=f"a time constant of {shortest:g}",
                expected="dt below twice the shortest time constant, better far below it",
                hint='a smaller dt, in the unit of the time constants; or method="exponential_euler".',
            )
    delays = np.asarray(getattr(node, "delay", 0.0), float)
    if not (np.isfinite(delays).all() and (delays >= 0.0).all()):
        raise ModelError(
            f"{dotted(path)}.delay is no delay.",
            got=f"{delays}",
            expected="finite numbers that are not negative",
        )


# -- one step -----------------------------------------------------------------------------------------------------------


def _initial(
    wiring: Wiring,
    shapes: Mapping[Path, tuple[int, ...]],
    lead: tuple[int, ...],
    dtype: Any,
    how: Discretisation,
) -> Any:
    """Zeros for all states."""
    read_late = {source for source, _ in wiring.late}
    found: dict[Path, dict[str, Any]] = {}
    for path, node in wiring.nodes.items():
        zeros = functools.partial(jnp.zeros, (*lead, *shapes[path]), dtype)
        state: dict[str, Any] = {name: zeros() for name in kind_of(node).states}
        if path in read_late and kind_of(node).shown is None:
            state[_SHOWN] = zeros()
        if hasattr(node, "delay") and steps_of(node, how.dt).any():
            state["line"] = [zeros() for _ in range(int(steps_of(node, how.dt).max()))]
        found[path] = state
    return _nested(found)


def _read(
    given: tuple[Any, ...], shapes: Mapping[str, tuple[int, ...]], dtype: Any, how: Discretisation
) -> dict[str, Any]:
    """The inputs by name, in the dtype of the network."""
    names = list(shapes)
    if len(given) != 1 or (
        len(names) > 1 and not (isinstance(given[0], Mapping) and set(given[0]) == set(names))
    ):
        raise InputError(
            "a NIR network takes one value: an array, or a dict by name where it has several inputs.",
            got=f"{len(given)} value(s), the first a {type(given[0]).__name__}" if given else "nothing",
            expected=f"inputs {names}",
        )
    found: Mapping[str, Any] = given[0] if len(names) > 1 else {names[0]: given[0]}
    for name, x in found.items():
        shape = jnp.shape(x)
        if (
            isinstance(x, u.Quantity)
            or len(shape) != len(shapes[name]) + how.batched
            or shape[how.batched :] != shapes[name]
        ):
            raise InputError(
                f"the NIR input {name} gets something else than it was made for.",
                got=f"{x.unit} in an array of shape {shape}"
                if isinstance(x, u.Quantity)
                else f"shape {shape}",
                expected=f"numbers of shape {shapes[name]}{' behind the batch axis' if how.batched else ''}",
                hint=None
                if how.batched
                else "from_nir(..., batch_size=...) makes a model with a batch axis.",
            )
    return {name: jnp.asarray(x, dtype) for name, x in found.items()}


def _run(
    wiring: Wiring, how: Discretisation, arrays: Mapping[Path, Any], state: Any, inputs: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The new state and the output of one step."""
    now: dict[Path, Any] = {}
    new: dict[Path, Any] = {}
    entering = {path: inputs[name] for name, path in wiring.inputs.items()}
    read_late = {source for source, _ in wiring.late}

    def brought(path: Path) -> Any:
        values = [
            _shown_before(wiring.nodes[s], _at(state, s)) if (s, path) in wiring.late else now[s]
            for s in wiring.sources[path]
        ]
        return functools.reduce(jnp.add, values)

    for path, node in wiring.nodes.items():
        held = _at(state, path)
        if path in wiring.registers:
            now[path] = read_line(steps_of(node, how.dt), held["line"])
            continue
        with jax.named_scope(dotted(path)):  # the report names it where it would name a line of a model
            x = entering[path] if path in entering else brought(path)
            new[path], now[path] = kind_of(node).step(node, as_read(node, arrays[path]), held, x, how)
        if path in read_late and kind_of(node).shown is None:
            new[path] = {**new[path], _SHOWN: now[path]}
    for path in wiring.registers:
        new[path] = {"line": [brought(path), *_at(state, path)["line"][:-1]]}
    out = {name: now[path] for name, path in wiring.outputs.items()}
    return _nested(new), out if len(out) > 1 else next(iter(out.values()))


def _shown_before(node: Any, state: Mapping[str, Any]) -> Any:
    return state[kind_of(node).shown or _SHOWN]


# -- dicts of nodes -----------------------------------------------------------------------------------------------------


def _nested(by_path: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Dicts in dicts, as the subgraphs are; nodes with nothing are left out."""
    tree: dict[str, Any] = {}
    for path, held in sorted(by_path.items()):
        if held:
            at = tree
            for name in path:
                at = at.setdefault(name, {})
            at.update(held)
    return tree


def _at(tree: Any, path: Path) -> dict[str, Any]:
    """What :func:`_nested` holds for a node."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _write(graph: Any, params: Mapping[str, Any]) -> None:
    for name, held in params.items():
        node = graph.nodes[name]
        if _is_graph(node):
            _write(node, held)
            continue
        for field, value in held.items():
            old = np.asarray(getattr(node, field))
            dtype = old.dtype if jnp.issubdtype(old.dtype, jnp.floating) else np.asarray(value).dtype
            setattr(node, field, np.asarray(value).astype(dtype))
