"""Plain functions as models: ``fn(params, state, x) -> (state, out)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import ModelError
from etcompile.frontend.environment import recorded, traced_with
from etcompile.frontend.jaxpr import in_transformation, inputs_used, is_traced, run_jaxpr
from etcompile.frontend.step_model import TracedStep, leaf_names
from etcompile.frontend.user_code import user_frame

__all__ = ["FunctionModel", "from_function", "function_model", "own_copy"]


class FunctionModel:
    """A model given as a pure step function with its parameters and its initial state.

    Attributes
    ----------
    fn : callable
        ``fn(params, state, *inputs) -> (new_state, out)``.
    name : str
    param_state, state_state : brainstate states
        Hold the current parameters and the current state, so that brainstate's transformations see them.
    lasting : frozenset of str
        Entries of the state, a dict, that a reset leaves alone.
    source : object
        What the model was made of, where trained weights can be put back into it; else None.
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Any, Any]],
        params: Any,
        state: Any,
        name: str,
        lasting: frozenset[str] = frozenset(),
        source: Any = None,
    ) -> None:
        self.fn = fn
        self.name = name
        self.lasting = lasting
        self.source = source
        self.param_state = brainstate.ParamState(params)
        self.state_state = brainstate.ShortTermState(state)

    @property
    def params(self) -> Any:
        """Current parameters."""
        return self.param_state.value

    @params.setter
    def params(self, value: Any) -> None:
        # Containers of its own: others, such as an nnx.State, are changed in place by whoever gave them.
        self.param_state.value = jax.tree.map(lambda leaf: leaf, value)

    @property
    def state(self) -> Any:
        """Current state; the compiled step advances it."""
        return self.state_state.value

    @state.setter
    def state(self, value: Any) -> None:
        self.state_state.value = value


def from_function(fn: Callable[..., tuple[Any, Any]], params: Any, state: Any) -> FunctionModel:
    """Make a model of a plain function, accepted wherever a module is.

    Parameters
    ----------
    fn : callable
        ``fn(params, state, *inputs) -> (new_state, out)``, pure, with ordinary jax operations.
    params : pytree of arrays
        Every floating-point or complex leaf is trained.
    state : pytree of arrays
        The initial state, in the shapes and dtypes that ``fn`` returns.

        Parameters and state are copied: the arrays given stay the caller's, who may donate them.

        With a ``jax.ShapeDtypeStruct`` in the place of an array, of parameters or state, the model can be compiled and
        looked at (``report()``, ``cost()``), whatever its size, but not run.

    Returns
    -------
    FunctionModel

    Examples
    --------
    >>> import jax.numpy as jnp, etcompile
    >>> def leaky(params, state, x):
    ...     h = 0.9 * state["h"] + x @ params["w"]
    ...     return {"h": h}, h
    >>> model = etcompile.from_function(leaky, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    >>> step = etcompile.compile(model, jnp.ones((2, 3)))
    >>> step.exact
    True
    """
    if not callable(fn):
        swapped = callable(params) or callable(state)
        raise ModelError(
            "from_function needs a function first.",
            got=f"a {type(fn).__name__}",
            expected="from_function(fn, params, state), with fn(params, state, x) -> (state, out)",
            hint="are the arguments swapped? The function comes first." if swapped else None,
        )
    return function_model(fn, params, state)


def function_model(
    fn: Callable[..., tuple[Any, Any]],
    params: Any,
    state: Any,
    lasting: frozenset[str] = frozenset(),
    source: Any = None,
) -> FunctionModel:
    """The model of a function, with copies of parameters and state; ``lasting`` entries of the state outlast a reset."""
    name = getattr(fn, "__name__", "fn")
    return FunctionModel(fn, jax.tree.map(_array, params), jax.tree.map(_array, state), name, lasting, source)


def _array(value: Any) -> Any:
    """An array of the model's own, so that whoever gave it may give its buffer away."""
    return value if isinstance(value, jax.ShapeDtypeStruct) else own_copy(value)


def own_copy(value: Any) -> Any:
    """A copy with a buffer of its own and a dtype that gives way to no other's."""
    if isinstance(value, jax.Array) and not getattr(value, "weak_type", False):  # typed keys have none
        return _plain_copy(value) if _lies_plainly(value) else jnp.copy(value)
    return jnp.array(value, jnp.result_type(value))


def _lies_plainly(value: Any) -> bool:
    """Whether an array lies in this machine's memory, of numbers that numpy copies: no program need be compiled for that."""
    if is_traced(value) or in_transformation() or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return False
    devices = value.devices()
    return (
        len(devices) == 1 and not getattr(value, "committed", True) and next(iter(devices)).platform == "cpu"
    )


def _plain_copy(value: Any) -> Any:
    if value.is_deleted():
        return jnp.copy(value)  # says so
    return jax.device_put(np.array(value), may_alias=False)


def _keys(tree: Any) -> list[str]:
    return [str(key) for key in tree] if isinstance(tree, dict) else []


def trace_function(model: FunctionModel, inputs: tuple[Any, ...], state: Any = None) -> TracedStep:
    """Trace one step to a jaxpr."""
    state = model.state if state is None else state
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (model.params, state, inputs))
    kept: dict[str, Any] = {}

    def flat(*leaves: Any) -> list[Any]:
        params, old, args, around = jax.tree.unflatten(kept["tree"], leaves)
        with brainstate.environ.context(**around):
            result = model.fn(params, old, *args)
        new, out = _new_state_and_output(model.name, old, result)
        kept["out"] = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)), out)
        return [*jax.tree.leaves(out), *jax.tree.leaves(new)]

    def with_entries(given: dict[str, Any]) -> Any:
        leaves, kept["tree"] = jax.tree.flatten((*shapes, given))
        return jax.make_jaxpr(flat)(*leaves)

    try:
        closed, given, asked = traced_with(with_entries)
    except (KeyError, IndexError, AttributeError) as error:
        _refuse_swapped(model, state, error)
        raise
    first = len(jax.tree.leaves(shapes))
    reads = inputs_used(closed)
    environment = recorded(asked, given, lambda k: first + k in reads)
    if given:

        def of_used(*leaves: Any) -> list[Any]:
            around = environment.completed(leaves[first:], given)
            return run_jaxpr(closed, *leaves[:first], *jax.tree.leaves(around))

        closed = jax.make_jaxpr(of_used)(*jax.tree.leaves(shapes), *environment.shapes())
    owners = dict.fromkeys(leaf_names(state), "state")
    return TracedStep(model.name, closed, shapes[0], shapes[1], shapes[2], kept["out"], owners, environment)


def _new_state_and_output(name: str, old: Any, result: Any) -> tuple[Any, Any]:
    """What a step function returned, checked."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ModelError(
            f"{name} must return two values.", got=f"{type(result).__name__}", expected="(new_state, out)"
        )
    new, out = result
    if jax.tree.structure(new) != jax.tree.structure(old) == jax.tree.structure(out):
        raise ModelError(
            f"{name} returns its output where the new state belongs.",
            got="(out, new_state)",
            expected="(new_state, out)",
            hint="are the two swapped? The new state comes first.",
        )
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ModelError(
            f"{name} returns a state of another structure.",
            got=str(jax.tree.structure(new)),
            expected=str(jax.tree.structure(old)),
            hint="return every state, also one that did not change; a state cannot be created during a step.",
        )
    return new, out


def _refuse_swapped(model: FunctionModel, state: Any, error: Exception) -> None:
    """Say it where a function looks among its states for a parameter, or the other way round."""
    names = set(map(str, error.args))
    if names.isdisjoint((*_keys(state), *_keys(model.params))):
        return
    raise ModelError(
        f"{model.name} looks for {error} and finds it among its other argument.",
        where=user_frame(error),
        got=f"params with {_keys(model.params)}, state with {_keys(state)}",
        expected="from_function(fn, params, state)",
        hint="are params and state swapped, in from_function or in the function?",
    ) from error
