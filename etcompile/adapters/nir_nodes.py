"""What one time step of each NIR node is: ``step(node, p, state, x, how) -> (state, out)``.

``p`` holds the node's arrays, ``state`` its states, and ``x`` the sum of what its edges bring, with the batch axis, if there is
one, in front. The equations are those of NIR (Pedersen et al. 2024, Neuromorphic intermediate representation: a unified
instruction set for interoperable brain-inspired computing, Nature Communications 15, 8122), in steps of ``dt``. Types of nodes
go by their names, so that nir need not be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import ModelError

__all__ = [
    "NODES",
    "Discretisation",
    "NodeKind",
    "as_read",
    "fast_sigmoid",
    "fields_of",
    "is_register",
    "kind_of",
    "read_line",
    "steps_of",
]

State = dict[str, Any]


@dataclass(frozen=True)
class Discretisation:
    """How time goes in steps, and what a spike and a reset are.

    Attributes
    ----------
    dt : float
        Seconds, or whatever time constants are in.
    exponential : bool
        Exponential Euler: each equation is solved exactly while what it reads of others is held; else forward Euler.
    spike : callable
        ``spike(v - threshold)``: 1 above zero and 0 elsewhere, with a derivative of its own.
    subtract : bool
        A spike takes ``threshold - v_reset`` off the potential, and does not put it to ``v_reset``.
    new_current : bool
        The potential of a node with a synaptic current reads the new current, and not that at the start of the step.
    batched : bool
        Whether arrays have a batch axis in front.
    """

    dt: float
    exponential: bool
    spike: Callable[[Any], Any]
    subtract: bool
    new_current: bool
    batched: bool

    def gain(self, tau: Any) -> Any:
        """What a step moves a leaky value towards its target: dt/τ, or 1 - exp(-dt/τ)."""
        return -jnp.expm1(-self.dt / tau) if self.exponential else self.dt / tau


@dataclass(frozen=True)
class NodeKind:
    """A type of node.

    Attributes
    ----------
    step : callable
    arrays : tuple of str
        Fields that hold numbers which can be trained.
    states : tuple of str
        Each has the shape of the node's input.
    shown : str or None
        The state that is the node's output; None where the output, such as a spike, is in no state.
    times : tuple of str
        Those of the arrays that are time constants.
    element_wise : bool
        Arrays have the shape of the input, or one element.
    """

    step: Callable[..., tuple[State, Any]]
    arrays: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    shown: str | None = None
    times: tuple[str, ...] = ()
    element_wise: bool = False


@jax.custom_jvp
def fast_sigmoid(x: jax.Array) -> jax.Array:
    """1 above zero and 0 elsewhere, with the derivative 1 / (1 + 25 |x|)² (Zenke and Ganguli 2018, SuperSpike)."""
    return (x > 0).astype(x.dtype)


@fast_sigmoid.defjvp
def _fast_sigmoid_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    return fast_sigmoid(x), dx / (1.0 + 25.0 * jnp.abs(x)) ** 2


# -- weights ------------------------------------------------------------------------------------------------------------


def _linear(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """W x, for each of the leading axes of W by itself."""
    weight = p["weight"]
    if weight.ndim == 2:
        return state, x @ weight.T
    lead = weight.ndim - 2
    own = tuple(range(how.batched, how.batched + lead)), tuple(range(lead))
    y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), own))
    return state, jnp.moveaxis(y, -2, 0) if how.batched else y


def _affine(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """W x + b."""
    state, y = _linear(node, p, state, x, how)
    return state, y + p["bias"]


def _convolution(axes: int) -> Callable[..., tuple[State, Any]]:
    letters = "HW"[-axes:]

    def step(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
        """Correlation, as torch has it: channels in front, weights of shape (out, in / groups, ...)."""
        y = jax.lax.conv_general_dilated(
            x if how.batched else x[None],
            p["weight"],
            _per_axis(node.stride, axes),
            _padding(node, axes),
            rhs_dilation=_per_axis(node.dilation, axes),
            dimension_numbers=("NC" + letters, "OI" + letters, "NC" + letters),
            feature_group_count=int(node.groups),
        )
        if "bias" in p:
            y = y + p["bias"].reshape(-1, *[1] * axes)
        return state, y if how.batched else y[0]

    return step


def _padding(node: Any, axes: int) -> str | list[tuple[int, int]]:
    """Zeros before and behind each axis. "same" keeps the size at stride 1, as torch has it: what is odd is at the end."""
    if not isinstance(node.padding, str):
        return [(n, n) for n in _per_axis(node.padding, axes)]
    if node.padding == "valid":
        return "VALID"
    sizes = np.shape(node.weight)[2:]
    total = [d * (n - 1) for d, n in zip(_per_axis(node.dilation, axes), sizes, strict=True)]
    return [(n // 2, n - n // 2) for n in total]


def _scale(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """Element by element."""
    return state, p["scale"] * x


# -- shapes -------------------------------------------------------------------------------------------------------------


def _flatten(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """The axes from start_dim to end_dim become one; the batch axis is none of them."""
    batch, shape = x.shape[: how.batched], x.shape[how.batched :]
    start, end = (int(d) % len(shape) for d in (node.start_dim, node.end_dim))
    middle = int(np.prod(shape[start : end + 1]))
    return state, x.reshape(*batch, *shape[:start], middle, *shape[end + 1 :])


def _sum_pool(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """Sums over windows of the last two axes; what is padded is zero."""
    lead = [1] * (x.ndim - 2)
    padding = [(0, 0)] * (x.ndim - 2) + [(n, n) for n in _per_axis(node.padding, 2)]
    window = (*lead, *_per_axis(node.kernel_size, 2))
    strides = (*lead, *_per_axis(node.stride, 2))
    return state, jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, window, strides, padding)


def _average_pool(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """Means over windows, zeros that were padded among them, as torch has it."""
    state, total = _sum_pool(node, p, state, x, how)
    return state, total / np.prod(_per_axis(node.kernel_size, 2))


def _same_value(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    return state, x


def _per_axis(value: Any, axes: int) -> list[int]:
    """A number for each axis, of one for all or of as many."""
    return [int(v) for v in np.broadcast_to(np.asarray(value).reshape(-1), (axes,))]


# -- neurons ------------------------------------------------------------------------------------------------------------


def _leak(v: Any, drive: Any, tau: Any, p: Mapping, how: Discretisation) -> Any:
    """τ dv/dt = v_leak - v + R I."""
    return v + how.gain(tau) * (p["v_leak"] - v + p["r"] * drive)


def _fire(v: Any, p: Mapping, how: Discretisation) -> tuple[Any, Any]:
    """The potential after the reset, and the spike."""
    spike = how.spike(v - p["v_threshold"]).astype(v.dtype)
    if how.subtract:
        return v - spike * (p["v_threshold"] - p["v_reset"]), spike
    return spike * p["v_reset"] + (1.0 - spike) * v, spike


def _li(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    v = _leak(state["v"], x, p["tau"], p, how)
    return {"v": v}, v


def _lif(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    v, spike = _fire(_leak(state["v"], x, p["tau"], p, how), p, how)
    return {"v": v}, spike


def _integrator(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """dv/dt = R I."""
    v = state["v"] + how.dt * p["r"] * x
    return {"v": v}, v


def _if(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    v, spike = _fire(_integrator(node, p, state, x, how)[1], p, how)
    return {"v": v}, spike


def _synapse(p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[Any, Any]:
    """τ_syn di/dt = -i + w_in S, and the potential that it drives."""
    i = state["i"] + how.gain(p["tau_syn"]) * (p["w_in"] * x - state["i"])
    v = _leak(state["v"], i if how.new_current else state["i"], p["tau_mem"], p, how)
    return i, v


def _cuba_li(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    i, v = _synapse(p, state, x, how)
    return {"i": i, "v": v}, v


def _cuba_lif(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    i, v = _synapse(p, state, x, how)
    v, spike = _fire(v, p, how)
    return {"i": i, "v": v}, spike


def _threshold(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    return state, how.spike(x - p["threshold"]).astype(x.dtype)


# -- delays -------------------------------------------------------------------------------------------------------------


def _delay(node: Any, p: Mapping, state: State, x: Any, how: Discretisation) -> tuple[State, Any]:
    """What came in so long ago: a shift register, each place of it a state, and each element read at its own place."""
    steps = steps_of(node, how.dt)
    line = state.get("line", [])
    out = read_line(steps, line)
    if not steps.all():
        out = x if out is None else jnp.where(steps == 0, x, out)
    return ({"line": [x, *line[:-1]]} if line else state), out


def read_line(steps: np.ndarray, line: list[Any]) -> Any:
    """What comes out of the line at the start of a step; None where it has no places."""
    out = None
    for place, held in enumerate(line, 1):
        if (steps == place).all():
            return held
        if (steps == place).any():
            out = jnp.where(steps == place, held, 0.0 if out is None else out)
    return out


def steps_of(node: Any, dt: float) -> np.ndarray:
    """The delay of each element in whole steps."""
    return np.rint(np.asarray(node.delay, float) / dt).astype(int)


def is_register(node: Any, dt: float) -> bool:
    """Whether what a node shows depends on its input of earlier steps alone.

    Raises
    ------
    ModelError
        Where it does for some of its elements and not for others.
    """
    if kind_of(node).step is not _delay:
        return False
    steps = steps_of(node, dt)
    if steps.any() and not steps.all():
        raise ModelError(
            "a delay in a loop is below half a time step for some of its elements, and not for others.",
            got=f"delays from {np.min(node.delay):g} to {np.max(node.delay):g} with dt={dt:g}",
            expected="delays of a step or more for all, or of none",
            hint="a smaller dt resolves them.",
        )
    return bool(steps.all())


_WEIGHT, _BIASED = ("weight",), ("weight", "bias")
_RESET = ("r", "v_threshold", "v_reset")
_SYNAPSE = ("tau_syn", "tau_mem", "r", "v_leak", "w_in")

NODES = {
    "Input": NodeKind(_same_value),
    "Output": NodeKind(_same_value),
    "Linear": NodeKind(_linear, _WEIGHT),
    "Affine": NodeKind(_affine, _BIASED),
    "Conv1d": NodeKind(_convolution(1), _BIASED),
    "Conv2d": NodeKind(_convolution(2), _BIASED),
    "Scale": NodeKind(_scale, ("scale",), element_wise=True),
    "Flatten": NodeKind(_flatten),
    "SumPool2d": NodeKind(_sum_pool),
    "AvgPool2d": NodeKind(_average_pool),
    "LI": NodeKind(_li, ("tau", "r", "v_leak"), ("v",), "v", ("tau",), True),
    "LIF": NodeKind(_lif, ("tau", "v_leak", *_RESET), ("v",), None, ("tau",), True),
    "I": NodeKind(_integrator, ("r",), ("v",), "v", (), True),
    "IF": NodeKind(_if, _RESET, ("v",), None, (), True),
    "CubaLI": NodeKind(_cuba_li, _SYNAPSE, ("i", "v"), "v", ("tau_syn", "tau_mem"), True),
    "CubaLIF": NodeKind(
        _cuba_lif, (*_SYNAPSE, "v_threshold", "v_reset"), ("i", "v"), None, ("tau_syn", "tau_mem"), True
    ),
    "Threshold": NodeKind(_threshold, ("threshold",), element_wise=True),
    "Delay": NodeKind(_delay, element_wise=True),
}


def kind_of(node: Any) -> NodeKind:
    """The row of a node."""
    return NODES[type(node).__name__]


def fields_of(node: Any) -> list[str]:
    """Arrays that a node has; a convolution may have no bias."""
    return [name for name in kind_of(node).arrays if getattr(node, name, None) is not None]


def as_read(node: Any, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arrays of a neuron, those of one element as numbers, whatever axes they have."""
    if not kind_of(node).element_wise:
        return arrays
    return {name: a.reshape(()) if a.size == 1 else a for name, a in arrays.items()}
