"""The cosine of each rule's gradient to the true one, layer by layer, in stacks of element-wise layers; and what is carried."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cross_layer import filtered, filtered_bytes, trace_bytes
from stacks import KINDS, Stack
from tasks import Batch, Copy, DelayedMatch, JapaneseVowels, Task, accuracy
from training import CLIP, loss

import etcompile

__all__ = [
    "DEPTHS",
    "FULL",
    "LABELS",
    "QUICK",
    "TASKS",
    "TRAINED",
    "WIDER",
    "Cell",
    "Protocol",
    "Training",
    "load",
    "measure",
    "save",
    "train",
]

Array = Any
Gradient = Callable[[Mapping[str, Array], Array, Array], Mapping[str, Array]]

Found = TypeVar("Found", bound="Cell | Training")

DEPTHS = (2, 4, 8)
#: The depth of stacks that are trained by each rule's gradient.
TRAINED = 4
WINDOWS = (1, 5, 20)
RANKS = (1, 2)
#: Units of a layer for which memory is told beside that of the stacks measured.
WIDER = (64, 256)
#: As in the page of rules, but all of 39 steps, so that one compiled step serves all; lines that a task lacks stay silent.
TASKS: Mapping[str, Task] = {
    t.name: t for t in (Copy(16, longest=37), DelayedMatch(16, delay=27), JapaneseVowels(16))
}
LABELS = (
    "d_rtrl",
    "otpe",
    *(f"window {w}" for w in WINDOWS),
    "filtered",
    *(f"rank {r}" for r in RANKS),
)


@dataclass(frozen=True)
class Protocol:
    """How much is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    #: By backpropagation through time, before gradients are compared.
    updates: int = 100
    rate: float = 1e-2
    #: By the gradient of each rule, before accuracies are compared.
    trained: int = 300
    units: int = 16
    #: Batches whose gradients are summed before they are compared.
    batches: int = 1


FULL = Protocol()
QUICK = dataclasses.replace(FULL, seeds=(0,), updates=3, trained=3, units=4, batches=1)


@dataclass(frozen=True)
class Cell:
    """What came out for a stack on a task.

    ``layers`` holds a list for each seed, from the bottom; ``carried`` what is carried of a batch from step to step beside the
    states, ``held`` what a window holds besides, both in bytes; ``alike`` how long a window is that holds as much as a rule
    carries beside the traces of d_rtrl, by the units of a layer; ``losses`` are those before and after training.
    """

    kind: str
    depth: int
    task: str
    updates: int
    units: int
    batch: int
    losses: list[list[float]] = field(default_factory=list)
    activity: list[list[float]] = field(default_factory=list)
    layers: dict[str, list[list[float]]] = field(default_factory=dict)
    whole: dict[str, list[float]] = field(default_factory=dict)
    carried: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    alike: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """Test accuracies, one for each seed, of a stack on a task after so many updates by each rule's gradient."""

    kind: str
    depth: int
    task: str
    updates: int
    accuracies: dict[str, list[float]] = field(default_factory=dict)


def measure(
    kind: str, depth: int, tasks: Sequence[str], protocol: Protocol, tell: Callable[[str], None]
) -> Iterator[Cell]:
    """The cells of a stack, one for each task; ``tell`` is called with every gradient."""
    stack = _stack(kind, depth, protocol)
    examples = TASKS[tasks[0]].batch_size
    true = jax.jit(jax.value_and_grad(functools.partial(_loss, stack)))
    methods, carried, held = _methods(stack, examples)
    alike = {str(n): _alike(dataclasses.replace(stack, units=n)) for n in (protocol.units, *WIDER)}
    names = stack.names[:-1]
    for name in tasks:
        size = (protocol.updates, protocol.units, examples)
        cell = Cell(kind, depth, name, *size, carried=carried, held=held, alike=alike)
        for seed in protocol.seeds:
            weights, losses = _trained(stack, TASKS[name], seed, protocol, true)
            cell.losses.append(losses)
            rng = np.random.default_rng(2000 + seed)
            batches = list(_batches(TASKS[name].train(rng, protocol.batches), stack))
            cell.activity.append(list(stack.activity(weights, batches[0][0])))
            wanted = _summed(lambda *given: true(*given)[1], weights, batches)
            for label, gradient in methods.items():
                found = _summed(gradient, weights, batches)
                cell.layers.setdefault(label, []).append([_cosine(found, wanted, [n]) for n in names])
                cell.whole.setdefault(label, []).append(_cosine(found, wanted, names))
                tell(f"{kind} {depth} {name} {label}")
        yield cell


def train(
    kind: str, depth: int, tasks: Sequence[str], protocol: Protocol, tell: Callable[[str], None]
) -> Iterator[Training]:
    """The trainings of a stack, one for each task; ``tell`` is called with every run."""
    stack = _stack(kind, depth, protocol)
    examples = TASKS[tasks[0]].batch_size
    true = jax.jit(jax.grad(functools.partial(_loss, stack)))
    step, windows = _compiled(stack, examples), _compiled(stack, examples, within="exact")
    methods: dict[str, Gradient] = {
        "d_rtrl": _by_rule(step),
        **{f"window {size}": _by_rule(windows, chunk=size) for size in WINDOWS[1:]},
        "bptt": true,
    }
    for name in tasks:
        found = Training(kind, depth, name, protocol.trained)
        for seed in protocol.seeds:
            test = TASKS[name].test(np.random.default_rng(seed))
            (xs,), (ys,) = (
                _padded(test.inputs[None], stack.inputs),
                _padded(test.targets[None], stack.outputs),
            )
            for label, gradient in methods.items():
                weights = _learnt(stack, TASKS[name], seed, protocol.trained, protocol.rate, gradient)
                right = accuracy(np.asarray(jax.jit(stack.outputs_of)(weights, xs)), np.asarray(ys))
                found.accuracies.setdefault(label, []).append(right)
                tell(f"{kind} {depth} {name} trained by {label}")
        yield found


def _stack(kind: str, depth: int, protocol: Protocol) -> Stack:
    inputs, outputs = (max(getattr(t, n) for t in TASKS.values()) for n in ("inputs", "outputs"))
    return Stack(KINDS[kind], depth, protocol.units, inputs, outputs)


def _loss(stack: Stack, weights: Mapping[str, Array], xs: Array, ys: Array) -> Array:
    return stack.losses(weights, xs, ys, loss)


def _methods(stack: Stack, examples: int) -> tuple[dict[str, Gradient], dict[str, int], dict[str, int]]:
    """How each gradient is made, what is carried for it, and what a window holds."""
    methods: dict[str, Gradient] = {}
    carried: dict[str, int] = {}
    held: dict[str, int] = {}
    for algo in ("d_rtrl", "otpe"):
        step = _compiled(stack, examples, algo=algo)
        methods[algo], carried[algo] = _by_rule(step), step.report().trace_bytes
    windows = _compiled(stack, examples, within="exact")
    for size in WINDOWS:
        label = f"window {size}"
        methods[label] = _by_rule(windows, chunk=size)
        carried[label] = windows.report().trace_bytes
        held[label] = size * bytes_held(stack, examples)
    methods["filtered"] = jax.jit(functools.partial(filtered, stack))
    for rank in RANKS:
        methods[f"rank {rank}"] = _by_rule(_compiled(stack, examples, algo="rank_rtrl", rank=rank))
    return methods, carried | _carried(stack, examples), held


def _carried(stack: Stack, examples: int) -> dict[str, int]:
    """What is carried for the influence on layers above, by ``filtered`` and by ``rank_rtrl``."""
    columns = stack.units * stack.kind.drives
    states = stack.depth * stack.units * stack.kind.states
    one = 4 * examples * sum(columns * (states + stack.reads(k) + 1) for k in range(stack.depth))
    return {"filtered": filtered_bytes(stack, examples), **{f"rank {r}": r * one for r in RANKS}}


def bytes_held(stack: Stack, examples: int) -> int:
    """What backpropagation keeps of one more step."""

    def kept(steps: int) -> int:
        xs, ys = (
            jax.ShapeDtypeStruct((steps, examples, n), jnp.float32) for n in (stack.inputs, stack.outputs)
        )
        weights = stack.start(0)
        back = jax.eval_shape(
            lambda w, x, y: jax.vjp(lambda w: stack.losses(w, x, y, loss), w)[1], weights, xs, ys
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    return (kept(12) - kept(2)) // 10


def _alike(stack: Stack) -> dict[str, float]:
    """How many steps of a window hold as much as each approximation carries beside the traces of d_rtrl."""
    traces, step = trace_bytes(stack, 1), bytes_held(stack, 1)
    return {label: (size - traces) / step for label, size in _carried(stack, 1).items()}


def _compiled(stack: Stack, examples: int, **options: Any) -> etcompile.Step:
    model = etcompile.from_function(stack.step, stack.start(0), stack.zeros(examples))
    return etcompile.compile(model, jnp.zeros((examples, stack.inputs)), **options)


def _by_rule(step: etcompile.Step, **options: Any) -> Gradient:
    run = step.scan_value_and_grad(loss, **options)

    def gradient(weights: Mapping[str, Array], xs: Array, ys: Array) -> Mapping[str, Array]:
        step.reset()
        step.params = dict(weights)
        return run(xs, ys)[1]

    return gradient


def _trained(
    stack: Stack, task: Task, seed: int, protocol: Protocol, true: Callable[..., Any]
) -> tuple[dict[str, Array], list[float]]:
    """Weights after some updates by backpropagation, and the mean losses of the first and the last tenth of them."""
    losses = []

    def gradient(weights: Mapping[str, Array], xs: Array, ys: Array) -> Any:
        value, grads = true(weights, xs, ys)
        losses.append(float(value))
        return grads

    weights = _learnt(stack, task, seed, protocol.updates, protocol.rate, gradient)
    tenth = max(1, len(losses) // 10)
    return weights, [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))]


def _learnt(
    stack: Stack, task: Task, seed: int, updates: int, rate: float, gradient: Gradient
) -> dict[str, Array]:
    """The weights of a seed after so many updates, the same data whatever makes the gradient."""
    weights = stack.start(seed)
    moments: Any = _optimiser(rate).init(weights)
    drawn = task.train(np.random.default_rng(1000 + seed), updates)
    for xs, ys in _batches(drawn, stack):
        weights, moments = _updated(rate, gradient(weights, xs, ys), moments, weights)
    return weights


@functools.partial(jax.jit, static_argnums=0)
def _updated(rate: float, grads: Any, moments: Any, weights: Any) -> Any:
    changes, moments = _optimiser(rate).update(grads, moments, weights)
    return optax.apply_updates(weights, changes), moments


def _optimiser(rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate))


def _batches(drawn: Batch, stack: Stack) -> Iterator[tuple[Array, Array]]:
    """Each batch, with lines that stay silent where the stack has more of them than the task."""
    return zip(_padded(drawn.inputs, stack.inputs), _padded(drawn.targets, stack.outputs), strict=True)


def _padded(values: np.ndarray, lines: int) -> Array:
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, lines - values.shape[-1])])


def _summed(
    gradient: Gradient, weights: Mapping[str, Array], batches: Sequence[tuple[Array, Array]]
) -> dict[str, np.ndarray]:
    found = [gradient(weights, xs, ys) for xs, ys in batches]
    return {n: np.sum([np.asarray(g[n], np.float64) for g in found], axis=0) for n in found[0]}


def _cosine(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    ours, true = (np.concatenate([np.ravel(v[n]) for n in names]) for v in (a, b))
    return float(ours @ true / max(np.linalg.norm(ours) * np.linalg.norm(true), 1e-30))


# -- files ------------------------------------------------------------------------------------------------------------


def save(found: Cell | Training, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(found), indent=1) + "\n"
    (folder / f"{_PREFIX[type(found)]}-{found.kind}-{found.depth}-{found.task}.json").write_text(
        text, encoding="utf-8"
    )


_PREFIX: Mapping[type, str] = {Cell: "cosines", Training: "training"}


def load(folder: Path, what: type[Found]) -> dict[tuple[str, int, str], Found]:
    """All that was found of a sort, cells or trainings, by kind, depth and task."""
    files = sorted(folder.glob(f"{_PREFIX[what]}-*.json"))
    found = [what(**json.loads(p.read_text(encoding="utf-8"))) for p in files]
    return {(c.kind, c.depth, c.task): c for c in found}
