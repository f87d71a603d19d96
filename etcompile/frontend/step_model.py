"""The traced model: one step as a flat graph, with the names and trees needed to talk to the user again."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import InputError, ModelError
from etcompile.frontend.cut_windows import with_cut_windows
from etcompile.frontend.environment import NOTHING, Environment, WithEnvironment
from etcompile.frontend.given import as_array, refuse_lists, shape_difference
from etcompile.frontend.jaxpr import Aval, Graph, flatten_jaxpr, with_copies
from etcompile.frontend.joined_axes import with_joined_axes
from etcompile.frontend.moved_states import with_states_read
from etcompile.frontend.moving_windows import with_single_slots
from etcompile.frontend.packed_graph import with_parts
from etcompile.frontend.ring_buffers import with_slots
from etcompile.frontend.state_forms import StateForm, join_states, split_states, state_form
from etcompile.frontend.viewed_states import view_of, with_views

__all__ = ["Leaf", "StepModel", "TracedStep", "leaf_names", "step_model"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a parameter, state, input or output tree; ``path`` is dotted, ``owner`` names its class."""

    path: str
    aval: Aval
    owner: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class TracedStep:
    """What a frontend hands over: a closed jaxpr ``(params, states, inputs) -> (outputs, new states)`` and its trees.

    Arrays of the environment follow the inputs.
    """

    name: str
    jaxpr: Any
    params: Any
    states: Any
    inputs: tuple[Any, ...]
    outputs: Any
    owners: dict[str, str]
    environment: Environment = NOTHING


@dataclasses.dataclass(frozen=True, eq=False)
class StepModel:
    """One time step of a model as a graph over real arrays.

    The graph's inputs are the parameter leaves, then the state leaves, then the input leaves, of which the last are those of
    the environment; its outputs are the output leaves, then the new state leaves. A complex state appears as two real ones,
    ``.re`` and ``.im``: a credit that flows through ``real`` or ``abs`` then needs no special case. One that holds several side
    by side appears as these, ``.0``, ``.1`` (:mod:`etcompile.frontend.state_forms`).
    """

    name: str
    graph: Graph
    params: tuple[Leaf, ...]
    states: tuple[Leaf, ...]
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    param_tree: Any
    state_tree: Any
    input_tree: Any
    output_tree: Any
    state_forms: tuple[StateForm, ...]
    environment: Environment = NOTHING

    @property
    def given(self) -> tuple[Leaf, ...]:
        """The inputs that a call gives."""
        return self.inputs[: len(self.inputs) - len(self.environment.shapes())]

    @cached_property
    def input_count(self) -> int:
        """How many inputs a call gives."""
        return len(self.input_tree.children())

    @cached_property
    def param_vars(self) -> tuple[int, ...]:
        return self.graph.inputs[: len(self.params)]

    @cached_property
    def state_vars(self) -> tuple[int, ...]:
        return self.graph.inputs[len(self.params) : len(self.params) + len(self.states)]

    @cached_property
    def input_vars(self) -> tuple[int, ...]:
        return self.graph.inputs[len(self.params) + len(self.states) :]

    @cached_property
    def output_vars(self) -> tuple[Any, ...]:
        return self.graph.outputs[: len(self.outputs)]

    @cached_property
    def new_state_vars(self) -> tuple[Any, ...]:
        return self.graph.outputs[len(self.outputs) :]

    def flatten_params(self, params: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(params)
        if tree != self.param_tree:
            raise InputError(
                "the parameters do not have the structure of the model's.",
                got=str(tree),
                expected=str(self.param_tree),
            )
        for leaf, value in zip(self.params, leaves, strict=True):
            value = value if hasattr(value, "dtype") else as_array(value, f"parameter {leaf.path}")
            if tuple(jnp.shape(value)) != leaf.aval.shape or jnp.result_type(value) != leaf.aval.dtype:
                raise InputError(
                    f"parameter {leaf.path} does not fit {self.name}.",
                    got=f"{jnp.result_type(value)}{list(jnp.shape(value))}",
                    expected=f"{leaf.aval.dtype}{list(leaf.aval.shape)}, as when the model was compiled",
                )
        return leaves

    def flatten_states(self, states: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(states)
        if tree != self.state_tree:
            raise InputError(
                "the states do not have the structure of the model's.",
                got=str(tree),
                expected=str(self.state_tree),
            )
        return split_states(leaves, self.state_forms)

    def unflatten_states(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.state_tree, join_states(leaves, self.state_forms))

    def with_environment(self, inputs: Any, steps: int | None = None) -> Any:
        """Inputs with what the step takes from the environment as it is now; with ``steps``, for each of so many steps."""
        return self._joined(inputs, self.environment.values(steps))

    def with_environment_shapes(self, inputs: Any) -> Any:
        """Shapes of the inputs with those of what the step takes from the environment."""
        return self._joined(inputs, self.environment.shapes())

    def _joined(self, inputs: Any, environment: tuple[Any, ...]) -> Any:
        return WithEnvironment(inputs, environment) if environment else inputs

    def flatten_inputs(self, inputs: Any) -> list[Any]:
        """Leaves of the inputs of one step, joined with its environment; what does not fit is an :class:`InputError`."""
        if not self.environment.inputs:
            return self.flatten_given(inputs)
        return [*self.flatten_given(inputs.given), *inputs.environment]

    def flatten_given(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Leaves of the inputs that a call gives."""
        leaves, tree = jax.tree.flatten(inputs)
        if tree != self.input_tree:
            children = self.input_tree.children()
            if len(children) == len(inputs):
                for k, (given, child) in enumerate(zip(inputs, children, strict=True)):
                    refuse_lists(given, child, "x" if len(inputs) == 1 else f"x{k}", self.name)
            raise InputError(
                f"{self.name} was compiled for inputs of another structure.",
                got=f"{len(inputs)} input(s), {jax.tree.map(lambda _: '*', inputs)}",
                expected=f"{len(children)} input(s), {jax.tree.unflatten(self.input_tree, ['*'] * self.input_tree.num_leaves)}",
                hint="pass the same number and nesting of inputs as in the example given to compile().",
            )
        checked = []
        for leaf, value in zip(self.given, leaves, strict=True):
            array = as_array(value, f"input {leaf.path} of {self.name}")
            if tuple(array.shape) != leaf.aval.shape:
                raise InputError(
                    f"input {leaf.path} of {self.name} has the wrong shape.",
                    got=f"{tuple(array.shape)}",
                    expected=f"{leaf.aval.shape}",
                    hint=shape_difference(tuple(array.shape), leaf.aval.shape),
                )
            if array.dtype != leaf.aval.dtype:
                if not _castable(array.dtype, leaf.aval.dtype):
                    raise InputError(
                        f"input {leaf.path} of {self.name} has the wrong dtype.",
                        got=str(array.dtype),
                        expected=str(leaf.aval.dtype),
                        hint=f"convert it with .astype({leaf.aval.dtype}).",
                    )
                array = array.astype(leaf.aval.dtype)
            checked.append(array)
        return checked


def _castable(given: Any, wanted: Any) -> bool:
    """Whether a cast keeps every value: the same kind of number, or an integer or boolean read as a float of enough bits."""
    return given == wanted or jnp.promote_types(given, wanted) == wanted


def leaf_names(tree: Any, prefix: str = "") -> list[str]:
    """Dotted path of every leaf of ``tree``, in flattening order."""
    names = []
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for path in _without_holders(paths):
        parts = [prefix] if prefix else []
        for key in path:
            if isinstance(key, jax.tree_util.FlattenedIndexKey):
                continue  # a container without names, such as a quantity with a unit
            part = getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))
            if part is not None and part != "mantissa":
                parts.append(str(part))
        names.append(".".join(parts) or "value")
    return names


def _without_holders(paths: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without the attribute ``value`` of what holds nothing else, such as a variable of Flax."""
    held = jax.tree_util.GetAttrKey("value")
    if not any(len(path) > 1 and path[-1] == held for path in paths):
        return paths
    leaves = collections.Counter(path[:k] for path in paths for k in range(len(path)))
    return [
        path[:-1] if len(path) > 1 and path[-1] == held and leaves[path[:-1]] == 1 else path for path in paths
    ]


def step_model(traced: TracedStep) -> StepModel:
    """Flatten a traced step, split its states that are complex or packed, and check that its states keep their type."""
    params, param_tree = jax.tree.flatten(traced.params)
    states, state_tree = jax.tree.flatten(traced.states)
    input_tree = jax.tree.structure(traced.inputs)
    outputs, output_tree = jax.tree.flatten(traced.outputs)
    graph = flatten_jaxpr(traced.jaxpr, len(params))
    state_names = leaf_names(traced.states)
    for k, (name, operand) in enumerate(zip(state_names, graph.outputs[len(outputs) :], strict=True)):
        old, new = graph.avals[graph.inputs[len(params) + k]], graph.aval(operand)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ModelError(
                f"state {name} changes its type in one step.",
                where=_where(graph, operand),
                got=str(new),
                expected=f"{old}, as it came in",
                hint="initialise the state with the shape (batch axis included) and dtype that update() gives it.",
            )
    graph = with_cut_windows(graph, graph.inputs[len(params) : len(params) + len(states)])
    graph, views = _viewed(graph, len(params), len(outputs), len(states))
    graph = with_states_read(graph, len(outputs))
    graph = with_single_slots(graph, graph.inputs[len(params) : len(params) + len(states)])
    graph = with_slots(graph, len(outputs), graph.inputs[len(params) : len(params) + len(states)])
    forms = _forms(graph, len(params), len(outputs), views)
    if any(form.parts > 1 for form in forms):
        graph = with_parts(graph, len(params), len(outputs), forms)
        state_names = [
            part for name, form in zip(state_names, forms, strict=True) for part in form.names(name)
        ]
    graph = with_copies(graph, range(len(outputs), len(graph.outputs)))
    n, s = len(params), len(state_names)
    avals = [graph.avals[v] for v in graph.inputs]
    return StepModel(
        name=traced.name,
        graph=graph,
        params=tuple(Leaf(p, a) for p, a in zip(leaf_names(traced.params), avals[:n], strict=True)),
        states=tuple(
            Leaf(p, a, _owner(traced.owners, p)) for p, a in zip(state_names, avals[n : n + s], strict=True)
        ),
        inputs=tuple(
            Leaf(p, a)
            for p, a in zip(
                [*leaf_names(_named_inputs(traced.inputs)), *_environment_names(traced.environment)],
                avals[n + s :],
                strict=True,
            )
        ),
        outputs=tuple(
            Leaf(p, graph.aval(v))
            for p, v in zip(leaf_names(traced.outputs, "out"), graph.outputs, strict=False)
        ),
        param_tree=param_tree,
        state_tree=state_tree,
        input_tree=input_tree,
        output_tree=output_tree,
        state_forms=tuple(
            form if view is None else dataclasses.replace(form, own=tuple(leaf.shape), view=view)
            for form, view, leaf in zip(forms, views, states, strict=True)
        ),
        environment=traced.environment,
    )


def _forms(
    graph: Graph, first: int, n_outputs: int, views: Sequence[tuple[int, ...] | None]
) -> tuple[StateForm, ...]:
    """How the states from input number ``first`` on stand in the graph."""
    old, new = graph.inputs[first : first + len(views)], graph.outputs[n_outputs:]
    forms = [state_form(graph, o, n, v is not None) for o, n, v in zip(old, new, views, strict=True)]
    return with_joined_axes(graph, first, n_outputs, forms)


def _viewed(
    graph: Graph, first: int, n_outputs: int, count: int
) -> tuple[Graph, list[tuple[int, ...] | None]]:
    """The graph with states in views in which they are packed, and the views."""
    views = [view_of(graph, old) for old in graph.inputs[first : first + count]]
    if any(views):
        packed = _forms(with_views(graph, first, n_outputs, views), first, n_outputs, views)
        views = [view if form.bounds else None for view, form in zip(views, packed, strict=True)]
    return (with_views(graph, first, n_outputs, views) if any(views) else graph), views


def _named_inputs(inputs: tuple[Any, ...]) -> Any:
    return {"x": inputs[0]} if len(inputs) == 1 else {f"x{k}": v for k, v in enumerate(inputs)}


def _environment_names(environment: Environment) -> list[str]:
    return [f"environ.{entry.name}" for entry in environment.inputs for _ in entry.avals]


def _owner(owners: dict[str, str], path: str) -> str:
    best = max((p for p in owners if path == p or path.startswith(p + ".")), key=len, default="")
    return owners.get(best, "")


def _where(graph: Graph, operand: Any) -> str | None:
    for operation in graph.operations:
        if operand in operation.outputs:
            return operation.source
    return None
