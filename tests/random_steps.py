"""Random step functions out of operations that people bring: a second family of random models.

Where `random_models` draws cells whose cuts are known beforehand, this family draws anything: linear solves, packed and
complex states, states without axes, buffers written at a running index, inner loops, `custom_vmap`, other dtypes, random
keys, losses that read states. Nothing is known of a model but the model itself, so its laws are those that hold of all:
the first step is autodiff's, an exact program is backpropagation's, what is not exact is listed.

A :class:`Recipe` is plain data. A step keeps a pool of values with one element per unit, shape ``(*batch, UNITS)``; every
operation takes two of them and adds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_models import Parameters

UNITS, INPUTS, OUTPUTS, SLOTS = 4, 3, 2, 3


@dataclasses.dataclass(frozen=True)
class Operation:
    """`name` on two values of the pool, picked by number."""

    name: str
    first: int
    second: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A step: how h and the other states move, what happens between, what is read.

    ``mix`` is how h takes up its drive; ``extra`` names the states beside h; ``dtype`` is that of states and weights, with
    weights in float32 where it has 16 bits.
    """

    operations: tuple[Operation, ...]
    extra: tuple[str, ...]
    mix: str
    reads: tuple[int, ...]
    loss: str
    batch: int | None
    dtype: str
    seed: int
    number: int


MIXES = ("leaky", "gated", "tanh", "learned", "product")
LOSSES = ("outputs", "outputs", "outputs", "state", "weight")
EXTRA = (
    "packed",
    "scalar",
    "buffer",
    "complex",
    "key",
    "typed_key",
    "second",
    "delay",
    "matrix",
    "count",
    "stacked",
)

Array = jax.Array
OPERATIONS: dict[str, Callable[..., Array]] = {}


def operation(fn: Callable) -> Callable:
    """Add ``(p, name, a, b) -> value`` to the operations, under its own name."""
    OPERATIONS[fn.__name__] = fn
    return fn


# --- element by element ----------------------------------------------------------------------------------------------------


@operation
def tanh(p, name, a, b):
    return jnp.tanh(a)


@operation
def product(p, name, a, b):
    return a * jnp.cos(b)


@operation
def gain(p, name, a, b):
    return a * p(f"{name}.gain", UNITS) + b


@operation
def one_gain_for_all(p, name, a, b):
    return a * p(f"{name}.gain")


@operation
def chosen(p, name, a, b):
    return jnp.where(a > 0, b, 0.3 * a)


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return spike(v), t / (1 + jnp.abs(v)) ** 2


@operation
def surrogate(p, name, a, b):
    return spike(a) + 0.1 * b


@operation
def hard_spike(p, name, a, b):
    return (a > 0).astype(a.dtype) + 0.2 * b


@jax.custom_vjp
def scaled_pair(v, w):
    return 2 * v, v * w


scaled_pair.defvjp(
    lambda v, w: (scaled_pair(v, w), (v, w)), lambda r, c: (3 * c[0] + r[1] * c[1], r[0] * c[1])
)


@operation
def two_results_with_a_vjp(p, name, a, b):
    first, second = scaled_pair(a, b)
    return first - second


@jax.custom_batching.custom_vmap
def shifted(v):
    return jnp.sin(v) + 0.1


@shifted.def_vmap
def _(size, batched, v):
    return jnp.sin(v) + 0.1, True


@jax.custom_jvp
def with_both_rules(v):
    return shifted(v)  # JAX differentiates no custom_vmap backwards by itself


@with_both_rules.defjvp
def _(primals, tangents):
    return with_both_rules(*primals), jnp.cos(primals[0]) * tangents[0]


@operation
def with_vmap_of_its_own(p, name, a, b):
    return with_both_rules(a) * b + 0.1 * shifted(lax.stop_gradient(b))


@operation
def behind_a_barrier(p, name, a, b):
    a, total = lax.optimization_barrier((a, jnp.sum(b)))
    return a * jnp.tanh(lax.stop_gradient(total))


@operation
def rematerialised(p, name, a, b):
    return jax.checkpoint(lambda v: jnp.sin(v) * v)(a)


@operation
def in_16_bits(p, name, a, b):
    return jnp.tanh(a).astype(jnp.bfloat16).astype(a.dtype) + b


@operation
def vmapped(p, name, a, b):
    return jax.vmap(lambda v, w: v * jnp.tanh(w))(a, b)


@operation
def branches(p, name, a, b):
    return lax.cond(jnp.sum(lax.stop_gradient(b)) > 0, jnp.tanh, lambda v: 0.5 * v, a)


@operation
def rounds(p, name, a, b):
    return lax.fori_loop(0, 4, lambda k, v: v + 0.2 * (jnp.tanh(b) - v), a)


@operation
def scan_with_outputs(p, name, a, b):
    def one(v, k):
        v = 0.8 * v + 0.1 * b * k
        return v, jnp.sin(v)

    last, seen = lax.scan(one, a, jnp.arange(3, dtype=a.dtype))
    return last + jnp.mean(seen, 0)


@operation
def switched(p, name, a, b):
    k, gain = jnp.argmax(lax.stop_gradient(b).reshape(-1)) % 3, p(f"{name}.gain", UNITS)
    return lax.switch(k, [jnp.sin, lambda v: v * gain, jnp.zeros_like], a)


@operation
def scanned_together(p, name, a, b):
    pairs = jnp.stack([a, b, 0.5 * a])
    return lax.associative_scan(lambda u, v: 0.5 * u + v, pairs)[-1]


@operation
def bump(p, name, a, b):
    return lax.reduce_precision(jnp.exp(-(a**2)), 8, 20) + jnp.log1p(b**2)


@operation
def blurred(p, name, a, b):
    kernel = jnp.array([0.5, 0.3])
    return (
        jnp.stack([jnp.convolve(v, kernel, mode="same") for v in a.reshape(-1, UNITS)]).reshape(a.shape) * b
    )


@operation
def while_on_no_weight(p, name, a, b):
    count = lax.while_loop(lambda c: c < 3.0, lambda c: c + 1.0, jnp.zeros((), a.dtype))
    return a * count * 0.2


# --- units mixed -----------------------------------------------------------------------------------------------------------


@operation
def matmul(p, name, a, b):
    return a @ p(f"{name}.w", UNITS, UNITS) + 0.1 * b


@operation
def half_of_a_matmul(p, name, a, b):
    u, v = jnp.split(a @ p(f"{name}.w", UNITS, 2 * UNITS), 2, -1)
    return jax.nn.sigmoid(u) * b + v


@operation
def einsum_in_another_type(p, name, a, b):
    w = p(f"{name}.w", UNITS, UNITS).astype(a.dtype)
    return jnp.einsum("...i,ij->...j", a, w, preferred_element_type=jnp.float32).astype(a.dtype)


@operation
def solve(p, name, a, b):
    matrix = 2 * jnp.eye(UNITS, dtype=a.dtype) + 0.2 * p(f"{name}.w", UNITS, UNITS).astype(a.dtype)
    if a.dtype.itemsize < 4:  # lapack has no 16-bit solver
        return (a.astype(jnp.float32) @ jnp.linalg.inv(matrix.astype(jnp.float32))).astype(a.dtype)
    return jnp.linalg.solve(matrix, a[..., None])[..., 0]


@operation
def softmax(p, name, a, b):
    return jax.nn.softmax(a) + b


@operation
def cumulative(p, name, a, b):
    return jnp.cumsum(0.4 * a, -1) + b


@operation
def rolled(p, name, a, b):
    return a + 0.3 * jnp.roll(b, 1, -1)


@operation
def sorted_units(p, name, a, b):
    return jnp.sort(a, -1) + 0.5 * b


@operation
def in_frequency(p, name, a, b):
    wide = a.astype(jnp.float32) if a.dtype.itemsize < 4 else a
    return jnp.real(jnp.fft.ifft(jnp.fft.fft(wide) * jnp.array([1.0, 0.5, 0.2, 0.5]))).astype(a.dtype) + b


@operation
def largest(p, name, a, b):
    values, _ = lax.top_k(a, 2)
    return jnp.sum(values, -1, keepdims=True) * b


@operation
def taken_in_order(p, name, a, b):
    return jnp.take_along_axis(a, jnp.argsort(lax.stop_gradient(b), -1), -1)


@operation
def log_sum(p, name, a, b):
    return a - jax.nn.logsumexp(b, -1, keepdims=True)


@operation
def written_at_an_index(p, name, a, b):
    k = jnp.argmax(lax.stop_gradient(b[..., 0])) % UNITS
    return a.at[..., k].set(b[..., 1])


@operation
def two_by_two(p, name, a, b):
    w = p(f"{name}.w", 2, 2).astype(a.dtype)
    return jnp.einsum("...kj,ij->...ki", a.reshape(*a.shape[:-1], 2, 2), w).reshape(a.shape) + b


@operation
def layer_norm(p, name, a, b):
    centred = a - jnp.mean(a, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.3) * p(f"{name}.gain", UNITS) + b


@operation
def permuted(p, name, a, b):
    return a[..., np.array([2, 0, 3, 1])] + b


@operation
def taken_at_an_index(p, name, a, b):
    k = jnp.argmax(lax.stop_gradient(b[..., 0])) % UNITS
    return b + lax.dynamic_slice_in_dim(a, k, 1, -1)


@operation
def sparse(p, name, a, b):
    rows, columns = np.array([0, 1, 1, 2, 3]), np.array([1, 0, 2, 3, 3])
    w = p(f"{name}.w", 5).astype(a.dtype)
    return b.at[..., rows].add(a[..., columns] * w)


@operation
def convolution(p, name, a, b):
    w = p(f"{name}.w", 1, 1, 3).astype(a.dtype)
    flat = a.reshape(-1, 1, UNITS)
    return lax.conv_general_dilated(flat, w, (1,), "SAME").reshape(a.shape) + b


@operation
def rotated(p, name, a, b):
    angle = p(f"{name}.angle", UNITS // 2).astype(a.dtype)
    u, v = a[..., : UNITS // 2], a[..., UNITS // 2 :]
    return jnp.concatenate(
        [u * jnp.cos(angle) - v * jnp.sin(angle), u * jnp.sin(angle) + v * jnp.cos(angle)], -1
    )


@operation
def loop_with_a_weight(p, name, a, b):
    w = p(f"{name}.w", UNITS, UNITS).astype(a.dtype)
    return lax.fori_loop(0, 3, lambda k, v: v + 0.3 * (jnp.tanh(v @ w) + b - v), a)


@operation
def stopped(p, name, a, b):
    return lax.stop_gradient(jnp.tanh(a)) * 0.3 + b


@operation
def rows_by_columns(p, name, a, b):
    """What `order="F"` makes of a reshape: one primitive that moves axes as well."""
    lead = a.ndim - 1
    v = a.reshape(*a.shape[:-1], 2, UNITS // 2)
    return lax.reshape(v, a.shape, (*range(lead), lead + 1, lead)) + 0.2 * b


@operation
def put_together(p, name, a, b):
    """Arrays of several shapes in one primitive."""
    first, pair = jax.device_put((a, jnp.stack([a, b])))
    return first - 0.3 * pair[1]


@operation
def plain_numbers(p, name, a, b):
    """Numbers and truth values of Python as operands."""
    return jnp.where(True, jnp.dot(a, 0.6), 2.0) + jnp.dot(0.3, b)


@operation
def downhill(p, name, a, b):
    """A step down an energy: derivatives inside of the step."""
    gain = p(f"{name}.gain", UNITS).astype(a.dtype)
    return a - 0.2 * jax.grad(lambda v: jnp.sum(jnp.cos(v) * gain))(a) + 0.1 * b


@operation
def straight_through(p, name, a, b):
    return a + lax.stop_gradient(jnp.round(4 * a) / 4 - a) + 0.1 * b


@operation
def looked_up(p, name, a, b):
    """A table of trained values, interpolated."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)  # jnp.interp has no 16 bits
    table = p(f"{name}.table", 5).astype(dtype)
    return jnp.interp(a.astype(dtype), jnp.linspace(-1, 1, 5, dtype=dtype), table).astype(a.dtype) + 0.3 * b


# --- a whole step ------------------------------------------------------------------------------------------------------------


def recipe(number: int) -> Recipe:
    """Recipe number `number`; every number gives another, and always the same."""
    rng = np.random.default_rng(number)

    def one_of(choices):
        return choices[int(rng.integers(len(choices)))]

    def pick() -> int:
        return int(rng.integers(10))

    names = sorted(OPERATIONS)
    operations = tuple(Operation(one_of(names), pick(), pick()) for _ in range(rng.integers(1, 5)))
    extra = tuple(np.array(EXTRA)[rng.permutation(len(EXTRA))[: rng.integers(3)]].tolist())
    return Recipe(
        operations,
        extra,
        one_of(MIXES),
        (pick(), pick()),
        one_of(LOSSES),
        one_of((None, 1, 2)),
        one_of(("float64",) * 6 + ("float32", "bfloat16")),
        int(rng.integers(1000)),
        number,
    )


def body(recipe: Recipe, p: Parameters, old: dict, x: Array) -> tuple[dict, Array]:
    """The step: ``(new states, result)``."""
    dtype = jnp.dtype(recipe.dtype)
    raw = p

    def p(*args):
        return raw(*args).astype(dtype)

    h = old["h"]
    pool = [jnp.tanh(x @ p("w_in", INPUTS, UNITS)), h]
    new = {}
    for name in recipe.extra:
        new.update(STATES[name].step(p, old, pool[0], pool))
    for k, op in enumerate(recipe.operations):
        a, b = pool[op.first % len(pool)], pool[op.second % len(pool)]
        pool.append(OPERATIONS[op.name](p, f"o{k}", a, b).astype(dtype))
    new["h"] = mixed(recipe.mix, p, h, pool[-1])
    read = jnp.concatenate([new["h"], *[pool[k % len(pool)] for k in recipe.reads]], -1)
    return new, jnp.tanh(read) @ p("readout", read.shape[-1], OUTPUTS)


def mixed(mix: str, p: Callable, h: Array, drive: Array) -> Array:
    if mix == "gated":
        z = jax.nn.sigmoid(drive)
        return z * h + (1 - z) * jnp.sin(drive)
    if mix == "tanh":
        return jnp.tanh(0.8 * h + drive)
    if mix == "learned":
        return jax.nn.sigmoid(p("decay", UNITS)) * h + 0.5 * drive
    if mix == "product":
        return 0.5 * h + 0.3 * h * jnp.tanh(drive) + 0.2 * drive
    return 0.7 * h + 0.5 * drive


@dataclasses.dataclass(frozen=True)
class State:
    """States beside h: ``start(head, dtype, rng)`` and ``step(p, old, input, pool)``, which may add to the pool."""

    start: Callable
    step: Callable


def _packed(p, old, x, pool):
    v, a = jnp.split(old["packed"], 2, -1)
    a = 0.8 * a + 0.2 * v
    v = 0.6 * v + x - 0.3 * a
    pool.append(jnp.tanh(v))
    return {"packed": jnp.concatenate([v, a], -1)}


def _scalar(p, old, x, pool):
    s = 0.9 * old["scalar"] + 0.1 * jnp.mean(x)
    pool.append(x * s)
    return {"scalar": s}


def _buffer(p, old, x, pool):
    k = old["at"] % SLOTS
    buffer = lax.dynamic_update_index_in_dim(old["buffer"], x, k, 0)
    pool.append(jnp.mean(buffer, 0))
    return {"buffer": buffer, "at": old["at"] + 1}


def _complex(p, old, x, pool):
    z = (
        old["complex"]
        * jnp.exp(1j * p("phase", UNITS).astype(jnp.float32)).astype(old["complex"].dtype)
        * 0.9
    )
    z = z + x.astype(z.dtype)
    pool.append((jnp.real(z) - 0.5 * jnp.abs(z) ** 2 * 0.1).astype(x.dtype))
    return {"complex": z}


def _key(p, old, x, pool):
    key, use = jax.random.split(old["key"])
    pool.append(x + 0.1 * jax.random.normal(use, x.shape, x.dtype))
    return {"key": key}


def _typed_key(p, old, x, pool):
    key, use = jax.random.split(old["typed_key"])
    pool.append(jnp.where(jax.random.bernoulli(use, 0.8, x.shape), x, 0))
    return {"typed_key": key}


def _count(p, old, x, pool):
    pool.append(jnp.where(old["count"] % 2 == 0, x, 0.5 * x) * p("count.gain"))
    return {"count": old["count"] + 1}


def _stacked(p, old, x, pool):
    g, v = old["stacked"]
    g = 0.7 * g + x * p("stacked.gain", UNITS)
    pool.append(v := 0.8 * v + jnp.tanh(g))
    return {"stacked": jnp.stack([g, v])}


def _second(p, old, x, pool):
    g = 0.5 * old["second"] + jnp.tanh(x * p("second.gain", UNITS)) + 0.1 * old["h"]
    pool.append(g)
    return {"second": g}


def _delay(p, old, x, pool):
    pool.append(old["delay"][-1])
    return {"delay": jnp.concatenate([x[None], old["delay"][:-1]], 0)}


def _matrix(p, old, x, pool):
    m = 0.8 * old["matrix"] + 0.2 * x[..., :, None] * x[..., None, :]
    pool.append(jnp.einsum("...ij,...j->...i", m, x))
    return {"matrix": m}


def _noise(shape):
    return lambda name, head, dtype, rng: {name: jnp.asarray(0.5 * rng.normal(size=(*head, *shape)), dtype)}


def _first(shape):
    return lambda name, head, dtype, rng: {
        name: jnp.asarray(0.5 * rng.normal(size=(*shape, *head, UNITS)), dtype)
    }


def _complex_start(name, head, dtype, rng):
    wide = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return {
        name: jnp.asarray(
            0.3 * (rng.normal(size=(*head, UNITS)) + 1j * rng.normal(size=(*head, UNITS))), wide
        )
    }


STATES = {
    "packed": State(_noise((2 * UNITS,)), _packed),
    "scalar": State(lambda name, head, dtype, rng: {name: jnp.asarray(0.4, dtype)}, _scalar),
    "buffer": State(
        lambda *a: {**_first((SLOTS,))(*a), "at": jnp.asarray(0, jnp.int32)},
        _buffer,
    ),
    "complex": State(_complex_start, _complex),
    "key": State(lambda name, head, dtype, rng: {name: jax.random.PRNGKey(3)}, _key),
    "typed_key": State(lambda name, head, dtype, rng: {name: jax.random.key(4)}, _typed_key),
    "count": State(lambda name, head, dtype, rng: {name: jnp.asarray(0, jnp.int32)}, _count),
    "stacked": State(_first((2,)), _stacked),
    "second": State(_noise((UNITS,)), _second),
    "delay": State(_first((SLOTS,)), _delay),
    "matrix": State(_noise((UNITS, UNITS)), _matrix),
}


@dataclasses.dataclass(frozen=True, eq=False)
class RandomStep:
    """A recipe with numbers."""

    recipe: Recipe
    params: dict
    state: dict
    xs: Array
    targets: Array

    @property
    def tolerance(self) -> float:
        """Rounding of the narrowest type that a value passes through, some operations long."""
        names = {o.name for o in self.recipe.operations}
        if self.recipe.dtype == "bfloat16" or "in_16_bits" in names:
            return 0.1
        single = (
            {"einsum_in_another_type", "bump"} & names
            or self.recipe.dtype == "float32"
            or "complex" in self.recipe.extra
        )
        return 1e-3 if single else 1e-10

    def step(self, params, state, x):
        return body(self.recipe, Parameters(params), state, x)

    def loss(self, params, state, out, target):
        """The loss of a step as a function of all that it may read: weights, the states after the step, the result."""
        loss = jnp.sum((out - target).astype(jnp.float32 if out.dtype.itemsize < 4 else out.dtype) ** 2)
        if self.recipe.loss == "state":
            loss = loss + 0.3 * jnp.sum(jnp.sin(state["h"])).astype(loss.dtype)
        if self.recipe.loss == "weight":
            loss = loss + 0.1 * jnp.sum(params["w_in"] ** 2).astype(loss.dtype)
        return loss


class _Drawn(Parameters):
    """Parameters in numpy, so that a step can be traced to find which it asks for."""

    def __call__(self, name: str, *shape: int):
        with jax.ensure_compile_time_eval():
            return np.asarray(super().__call__(name, *shape))


def build(recipe: Recipe, length: int = 5) -> RandomStep:
    dtype, rng = jnp.dtype(recipe.dtype), np.random.default_rng(recipe.seed + 50)
    head = () if recipe.batch is None else (recipe.batch,)
    state = {"h": jnp.asarray(0.6 * rng.normal(size=(*head, UNITS)), dtype)}
    for name in recipe.extra:
        state.update(STATES[name].start(name, head, dtype, rng))
    xs = jnp.asarray(rng.normal(size=(length, *head, INPUTS)), dtype)
    targets = jnp.asarray(rng.normal(size=(length, *head, OUTPUTS)), dtype)
    draws = _Drawn(None, recipe.seed)
    jax.eval_shape(lambda state, x: body(recipe, draws, state, x), state, xs[0])
    weights = jnp.float32 if dtype.itemsize < 4 else dtype
    params = {name: jnp.asarray(np.asarray(v), weights) for name, v in draws.drawn.items()}
    return RandomStep(recipe, params, state, xs, targets)
