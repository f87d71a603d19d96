"""Networks in the exchange format NIR, and what they compute, in plain numpy and in loops.

Each case is a graph with the order in which its nodes are computed, written down by hand: what a node reads of one behind it in
this order is what that showed at the step before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["CASES", "DT", "Case", "simulated"]

DT = 2e-3


@dataclass(frozen=True)
class Case:
    """A graph.

    Attributes
    ----------
    graph : nir.NIRGraph
    order : str
        Names of its nodes, those of subgraphs too, in the order in which they are computed.
    edges : list of pairs of str
        Its edges, with subgraphs opened.
    shape : tuple of int
        Of one input.
    names : set of str
        Some of the parameters.
    exact : bool
        Whether D-RTRL is backpropagation through time here.
    options : dict
        For ``from_nir``.
    """

    graph: Any
    order: str
    edges: list[tuple[str, str]]
    shape: tuple[int, ...]
    names: set[str]
    exact: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def nodes(self) -> dict[str, Any]:
        """All nodes by their own names."""
        found = {}
        for name, node in self.graph.nodes.items():
            found.update(node.nodes if hasattr(node, "nodes") else {name: node})
        return found


# -- what they compute --------------------------------------------------------------------------------------------------


def simulated(case: Case, xs: np.ndarray, dt: float = DT, **how: Any) -> np.ndarray:
    """Outputs of all steps for one example, ``xs`` of shape ``(T, *shape)``."""
    nodes, order = case.nodes(), case.order.split()
    shown: dict[str, Any] = {}
    states: dict[str, Any] = {name: {} for name in order}
    outs = []
    for x in xs:
        late = [name for name in order if _is(nodes[name], "Delay") and _fed_later(case, name, order)]
        for name in order:
            node = nodes[name]
            if name == "input":
                shown[name] = x
                continue
            if name in late:
                shown[name] = _delayed(node, states[name], dt, None)
                continue
            given = [
                shown[a] if a in shown else np.zeros(nodes[a].r.shape) for a, b in case.edges if b == name
            ]
            total = given[0]
            for more in given[1:]:
                total = total + more
            shown[name] = EQUATIONS[type(node).__name__](node, states[name], total, dt, how)
        for name in late:
            given = [shown[a] for a, b in case.edges if b == name]
            _put(states[name], sum(given))
        outs.append(shown["output"])
    return np.stack(outs)


def _is(node: Any, kind: str) -> bool:
    return type(node).__name__ == kind


def _fed_later(case: Case, name: str, order: list[str]) -> bool:
    return any(b == name and order.index(a) > order.index(name) for a, b in case.edges)


def _gain(tau: Any, dt: float, how: dict) -> Any:
    return 1.0 - np.exp(-dt / tau) if how.get("method") == "exponential_euler" else dt / tau


def _reset(node: Any, v: Any, how: dict) -> tuple[Any, Any]:
    z = v > node.v_threshold
    after = v - (node.v_threshold - node.v_reset) if how.get("reset") == "subtract" else node.v_reset
    return np.where(z, after, v), z.astype(float)


def _lif(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    v = state.get("v", np.zeros(x.shape))
    v = v + _gain(node.tau, dt, how) * (node.v_leak - v + node.r * x)
    state["v"], z = _reset(node, v, how)
    return z


def _li(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    v = state.get("v", np.zeros(x.shape))
    state["v"] = v + _gain(node.tau, dt, how) * (node.v_leak - v + node.r * x)
    return state["v"]


def _if(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    state["v"], z = _reset(node, state.get("v", np.zeros(x.shape)) + dt * node.r * x, how)
    return z


def _i(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    state["v"] = state.get("v", np.zeros(x.shape)) + dt * node.r * x
    return state["v"]


def _cuba(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    i, v = state.get("i", np.zeros(x.shape)), state.get("v", np.zeros(x.shape))
    new = i + _gain(node.tau_syn, dt, how) * (node.w_in * x - i)
    drive = new if how.get("current") == "new" else i
    v = v + _gain(node.tau_mem, dt, how) * (node.v_leak - v + node.r * drive)
    state["i"], state["v"] = new, v
    if not hasattr(node, "v_threshold"):
        return v
    state["v"], z = _reset(node, v, how)
    return z


def _delayed(node: Any, state: dict, dt: float, x: Any) -> Any:
    """What came in so many steps ago; ``x`` comes in now."""
    past = state.setdefault("past", [])
    steps = np.round(node.delay / dt).astype(int)
    out = np.zeros(steps.shape)
    for k in np.ndindex(steps.shape):
        if steps[k] == 0:
            out[k] = x[k]
        elif steps[k] <= len(past):
            out[k] = past[-steps[k]][k]
    return out


def _put(state: dict, x: Any) -> None:
    state.setdefault("past", []).append(x)


def _delay(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    out = _delayed(node, state, dt, x)
    _put(state, x)
    return out


def _padded(x: np.ndarray, before: int, behind: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, behind)
    return np.pad(x, widths)


def _pair(value: Any, n: int) -> list[int]:
    return [int(v) for v in np.broadcast_to(np.ravel(value), (n,))]


def _conv(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    weight = node.weight
    axes = weight.ndim - 2
    sizes, dilation, stride = weight.shape[2:], _pair(node.dilation, axes), _pair(node.stride, axes)
    for axis in range(axes):
        total = dilation[axis] * (sizes[axis] - 1)
        if node.padding == "same":
            x = _padded(x, total // 2, total - total // 2, axis + 1)
        elif node.padding != "valid":
            n = _pair(node.padding, axes)[axis]
            x = _padded(x, n, n, axis + 1)
    places = [(x.shape[a + 1] - dilation[a] * (sizes[a] - 1) - 1) // stride[a] + 1 for a in range(axes)]
    out = np.zeros((weight.shape[0], *places))
    share = weight.shape[0] // int(node.groups)
    for o, *at in np.ndindex(out.shape):
        for c, *k in np.ndindex(weight.shape[1:]):
            channel = (o // share) * weight.shape[1] + c
            place = tuple(p * s + j * d for p, s, j, d in zip(at, stride, k, dilation, strict=True))
            out[(o, *at)] += weight[(o, c, *k)] * x[(channel, *place)]
        if node.bias is not None:
            out[(o, *at)] += node.bias[o]
    return out


def _pool(mean: bool) -> Callable:
    def pool(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
        (h, w), (sh, sw), (ph, pw) = (_pair(v, 2) for v in (node.kernel_size, node.stride, node.padding))
        x = _padded(_padded(x, ph, ph, 1), pw, pw, 2)
        out = np.zeros((x.shape[0], (x.shape[1] - h) // sh + 1, (x.shape[2] - w) // sw + 1))
        for c, i, j in np.ndindex(out.shape):
            out[c, i, j] = np.sum(x[c, i * sh : i * sh + h, j * sw : j * sw + w]) / (h * w if mean else 1)
        return out

    return pool


def _flatten(node: Any, state: dict, x: Any, dt: float, how: dict) -> Any:
    end = node.end_dim % x.ndim
    return x.reshape(*x.shape[: node.start_dim], -1, *x.shape[end + 1 :])


EQUATIONS: dict[str, Callable] = {
    "Affine": lambda node, state, x, dt, how: np.einsum("...ij,...j->...i", node.weight, x) + node.bias,
    "Linear": lambda node, state, x, dt, how: np.einsum("...ij,...j->...i", node.weight, x),
    "Scale": lambda node, state, x, dt, how: node.scale * x,
    "Threshold": lambda node, state, x, dt, how: (x > node.threshold).astype(float),
    "Input": lambda node, state, x, dt, how: x,
    "Output": lambda node, state, x, dt, how: x,
    "Flatten": _flatten,
    "SumPool2d": _pool(mean=False),
    "AvgPool2d": _pool(mean=True),
    "Conv1d": _conv,
    "Conv2d": _conv,
    "LIF": _lif,
    "LI": _li,
    "IF": _if,
    "I": _i,
    "CubaLI": _cuba,
    "CubaLIF": _cuba,
    "Delay": _delay,
}


# -- graphs -------------------------------------------------------------------------------------------------------------


class _Draw:
    """Numbers for nodes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def weights(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape)

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        return self.rng.uniform(low, high, size=shape)

    def neuron(self, *shape: int, fires: bool = True) -> dict[str, np.ndarray]:
        found = {
            "tau": self.between(5e-3, 2e-2, *shape),
            "r": self.between(1.0, 3.0, *shape),
            "v_leak": self.between(-0.1, 0.2, *shape),
        }
        if fires:
            found |= {
                "v_threshold": self.between(0.1, 0.4, *shape),
                "v_reset": self.between(-0.2, 0.05, *shape),
            }
        return found

    def cuba(self, *shape: int, fires: bool = True) -> dict[str, np.ndarray]:
        found = self.neuron(*shape, fires=fires)
        found["tau_mem"] = found.pop("tau")
        return found | {"tau_syn": self.between(3e-3, 9e-3, *shape), "w_in": self.between(0.5, 1.5, *shape)}


def _chain(
    nir: Any, nodes: dict[str, Any], shape: tuple[int, ...], out: tuple[int, ...], **case: Any
) -> Case:
    """Nodes one behind the other between an input and an output."""
    names = ["input", *nodes, "output"]
    edges = [*itertools.pairwise(names)]
    # Shapes are what the nodes say: nir knows those of grouped convolutions otherwise than torch.
    every = {"input": nir.Input(np.array(shape)), **nodes, "output": nir.Output(np.array(out))}
    graph = nir.NIRGraph(every, edges, type_check=False)
    return Case(graph, " ".join(names), edges, shape, **case)


def feedforward(nir: Any) -> Case:
    d = _Draw(0)
    nodes = {
        "affine": nir.Affine(d.weights(4, 3), d.weights(4)),
        "lif": nir.LIF(**d.neuron(4)),
    }
    return _chain(nir, nodes, (3,), (4,), names={"affine.weight", "affine.bias"}, exact=True)


def current_based(nir: Any) -> Case:
    d = _Draw(1)
    nodes = {
        "linear": nir.Linear(2.0 * d.weights(4, 3)),
        "cubalif": nir.CubaLIF(**d.cuba(4)),
        "scale": nir.Scale(d.weights(4)),
        "cubali": nir.CubaLI(**d.cuba(4, fires=False)),
    }
    trained = ("weight", "scale", "cubalif.tau_mem", "cubali.w_in")
    return _chain(
        nir,
        nodes,
        (3,),
        (4,),
        names={"linear.weight", *trained[2:]},
        exact=True,
        options={"trained": trained},
    )


def recurrent(nir: Any) -> Case:
    """A recurrent layer as snnTorch and Spyx write it, in a subgraph with names that have dots."""
    d = _Draw(2)
    inner = [
        ("cell.in", "cell.lif"),
        ("cell.lif", "cell.rec"),
        ("cell.rec", "cell.lif"),
        ("cell.lif", "cell.out"),
    ]
    size = np.array([4])
    cell = nir.NIRGraph(
        {
            "cell.lif": nir.LIF(**d.neuron(4)),
            "cell.rec": nir.Affine(d.weights(4, 4), 0.1 * d.weights(4)),
            "cell.in": nir.Input(size),
            "cell.out": nir.Output(size),
        },
        inner,
    )
    nodes = {
        "input": nir.Input(np.array([3])),
        "0": nir.Linear(d.weights(4, 3)),
        "cell": cell,
        "readout": nir.Affine(d.weights(2, 4), d.weights(2)),
        "li": nir.LI(**d.neuron(2, fires=False)),
        "output": nir.Output(np.array([2])),
    }
    edges = [("input", "0"), ("0", "cell"), ("cell", "readout"), ("readout", "li"), ("li", "output")]
    return Case(
        nir.NIRGraph(nodes, edges),
        "input 0 cell.in cell.rec cell.lif cell.out readout li output",
        [
            ("0", "cell.in"),
            ("input", "0"),
            ("cell.out", "readout"),
            *inner,
            ("readout", "li"),
            ("li", "output"),
        ],
        (3,),
        {"0.weight", "cell.cell.rec.weight", "readout.bias"},
    )


def convolutional(nir: Any) -> Case:
    d = _Draw(3)
    nodes = {
        "conv": nir.Conv2d((5, 4), d.weights(4, 1, 3, 2), (1, 2), (1, 0), (1, 2), 2, d.weights(4)),
        "if": nir.IF(60.0 * d.between(0.5, 1.0, 4, 5, 1), np.full((4, 5, 1), 0.2)),
        "pool": nir.SumPool2d(np.array([2, 1]), np.array([2, 1]), np.array([1, 0])),
        "flatten": nir.Flatten({"input": np.array([4, 3, 1])}, 0),
        "affine": nir.Affine(d.weights(3, 12), d.weights(3)),
        "i": nir.I(d.between(1.0, 9.0, 3)),
    }
    return _chain(nir, nodes, (2, 5, 4), (3,), names={"conv.weight", "conv.bias", "affine.weight"})


def one_dimensional(nir: Any) -> Case:
    d = _Draw(4)
    nodes = {
        "conv": nir.Conv1d(6, d.weights(2, 2, 4), 1, "same", 1, 1, d.weights(2)),
        "lif": nir.LIF(**{name: np.full(1, v.mean()) for name, v in d.neuron(2, 6).items()}),
        "flatten": nir.Flatten({"input": np.array([2, 6])}, 0, -1),
    }
    return _chain(nir, nodes, (2, 6), (12,), names={"conv.weight"}, exact=True)


def delays(nir: Any) -> Case:
    """Delays of 0, 1 and 3 steps on the way, and of 2 in the loop."""
    d = _Draw(5)
    nodes = {
        "linear": nir.Linear(d.weights(4, 3)),
        "late": nir.Delay(DT * np.array([0.0, 1.0, 3.0, 1.0])),
        "lif": nir.LIF(**d.neuron(4)),
    }
    held = {"back": nir.Delay(np.full(4, 2 * DT)), "rec": nir.Linear(d.weights(4, 4))}
    case = _chain(nir, nodes, (3,), (4,), names={"linear.weight", "rec.weight"})
    edges = [*case.edges, ("lif", "back"), ("back", "rec"), ("rec", "lif")]
    graph = nir.NIRGraph({**case.graph.nodes, **held}, edges, type_check=False)
    return Case(graph, "input linear late back rec lif output", edges, (3,), case.names)


def feedback(nir: Any) -> Case:
    """Two layers with connections back to the first, matrices of more axes, and averages."""
    d = _Draw(6)
    nodes = {
        "w1": nir.Linear(d.weights(2, 4, 3)),
        "lif1": nir.LIF(**d.neuron(2, 4)),
        "w2": nir.Affine(d.weights(2, 4, 4), d.weights(2, 4)),
        "li2": nir.LI(**d.neuron(2, 4, fires=False)),
        "threshold": nir.Threshold(np.full((2, 4), 0.1)),
    }
    order = "input w1 w3 lif1 w2 li2 threshold output"
    case = _chain(nir, nodes, (2, 3), (2, 4), names={"w1.weight", "w2.bias", "w3.weight"})
    edges = [*case.edges, ("li2", "w3"), ("w3", "lif1"), ("lif1", "lif1")]
    graph = nir.NIRGraph({**case.graph.nodes, "w3": nir.Linear(d.weights(2, 4, 4))}, edges, type_check=False)
    return Case(graph, order, edges, (2, 3), case.names)


def averages(nir: Any) -> Case:
    d = _Draw(7)
    nodes = {
        "conv": nir.Conv2d(None, d.weights(2, 1, 2, 2), 1, "valid", 1, 1, None),
        "lif": nir.LIF(**d.neuron(2, 3, 4)),
        "pool": nir.AvgPool2d(np.array([2, 2]), np.array([1, 2]), np.array([0, 1])),
    }
    return _chain(nir, nodes, (1, 4, 5), (2, 2, 3), names={"conv.weight"}, exact=True)


CASES = {
    "nir-feedforward": feedforward,
    "nir-current-based": current_based,
    "nir-recurrent": recurrent,
    "nir-convolutional": convolutional,
    "nir-one-dimensional": one_dimensional,
    "nir-delays": delays,
    "nir-feedback": feedback,
    "nir-averages": averages,
}
