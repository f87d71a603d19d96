"""Ring buffers written and read at running indices: backpropagation through time, or a cut that is listed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy_evaluation import op_by_op
from oracles import relative_error, summed_losses

import etcompile
from etcompile import parse_program

pytestmark = pytest.mark.usefixtures("by_numpy")
TOLERANCE = 1e-10
B, I, N, K, T = 2, 3, 4, 4, 7


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def square(out, target):
    return jnp.sum((out - target) ** 2)


def bptt(fn, params, state, xs, ys):
    return op_by_op(jax.grad(summed_losses(fn, state, xs, ys, square)), params)


def worst_of(step, fn, params, state, xs, ys, chunks):
    wanted, worst = bptt(fn, params, state, xs, ys), 0.0
    for chunk in chunks:
        step.reset()
        _, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, ys)
        worst = max(worst, float(relative_error(grads, wanted)))
    return worst


# --- random models ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A leaky unit with a buffer; what is written, where, and who reads it.

    ``by``: an index for all, one for each unit, or one for each unit of each example. ``axis``: where the slots stand.
    """

    slots: int
    units: int
    batch: int | None
    axis: int
    by: str
    step: int
    mode: str
    writes: tuple[str, ...]
    early: bool
    to: str
    seed: int


def drawn(seed: int) -> Recipe:
    rng = np.random.default_rng(seed)
    pick = lambda *of: of[rng.integers(len(of))]  # noqa: E731
    batch = pick(None, 1, 2)
    return Recipe(
        slots=int(rng.integers(1, 6)),
        units=int(rng.integers(1, 4)),
        batch=batch,
        axis=pick(0, -1, -2),
        by=pick("all", "all", "unit", "example"),
        step=pick(1, 1, 2),
        mode=pick("wrap", "wrap", "drop", "clip"),
        writes=tuple(pick("set", "add", "clear", "multiply") for _ in range(rng.integers(1, 4))),
        early=bool(rng.integers(2)),
        to=pick("output", "state", "echo", "both", "units"),
        seed=seed,
    )


def build(r: Recipe):
    head = () if r.batch is None else (r.batch,)
    small = (*head, r.units)
    rank = len(small) + 1
    axis = r.axis % rank
    rng = np.random.default_rng(r.seed + 1000)
    delays = jnp.asarray(rng.integers(0, r.slots, size=small if r.by == "example" else r.units))
    shape = (*small[:axis], r.slots, *small[axis:])

    def at(i):
        """Indices for a value of the shape of one slot."""
        where = i if r.by == "all" else jnp.broadcast_to(i - delays, small)
        where = where % r.slots if r.mode == "wrap" else where - 2
        if r.by == "all":
            return (*(slice(None),) * axis, where)
        grids = list(np.meshgrid(*map(np.arange, small), indexing="ij"))
        return (*grids[:axis], where, *grids[axis:])

    mode = None if r.mode == "wrap" else r.mode

    def step(params, state, x):
        i, buffer = state["i"], state["buffer"]

        def taken(buffer, k):
            if r.mode == "drop":
                return buffer.at[at(k)].get(mode="fill", fill_value=0.25)
            return buffer.at[at(k)].get(mode=mode)

        y, late = x @ params["w"] + params["b"], taken(buffer, i - 1)
        h = params["a"] * state["h"] + y
        if r.to in ("state", "both"):
            h = h - 0.3 * late
        if r.to == "units":
            h = h + late @ params["u"]
        z = jnp.tanh(h) + (0.4 * params["a"] * late if r.to in ("echo", "both") else 0)
        for k, how in enumerate(r.writes):
            place = buffer.at[at(i + k)]
            buffer = {
                "set": lambda p: p.set(z, mode=mode),
                "add": lambda p: p.add(0.5 * z * y, mode=mode),
                "clear": lambda p: p.set(0.0, mode=mode),
                "multiply": lambda p: p.multiply(0.5 + z, mode=mode, unique_indices=True),
            }[how](place)
        read = late if r.early else taken(buffer, i - 2)
        return {"h": h, "buffer": buffer, "i": i + r.step}, (jnp.sin(read) + h) @ params["out"]

    params = {
        "w": (I, r.units),
        "b": (r.units,),
        "a": (r.units,),
        "u": (r.units, r.units),
        "out": (r.units, 2),
    }
    params = {name: jnp.asarray(0.6 * rng.normal(size=s)) for name, s in params.items()}
    state = {"h": jnp.asarray(rng.normal(size=small)), "buffer": jnp.asarray(rng.normal(size=shape))}
    return step, params, state | {"i": jnp.zeros((), jnp.int32)}, head


@pytest.mark.parametrize("block", range(4))
def test_random_models_equal_bptt_or_list_a_cut(block, pytestconfig):
    for number in range(max(3, pytestconfig.getoption("--random-models") // 50)):
        r = drawn(100_000 * block + number)
        fn, params, state, head = build(r)
        steps = 1 if number % 4 == 3 else T
        xs, ys = draw(r.seed, steps, *head, I), draw(r.seed + 1, steps, *head, 2)
        step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
        assert parse_program(str(step.program)) == step.program
        worst = worst_of(step, fn, params, state, xs, ys, sorted({1, min(3, steps)}))
        assert worst < TOLERANCE or not step.exact, (worst, r)
        written_out = r.to in ("output", "state", "echo", "both") and "multiply" not in r.writes
        assert step.exact or not written_out, (r, str(step.report()))


# --- one by one -------------------------------------------------------------------------------------------------------

DELAYS = np.array([1, 3, 2, 0])
PARAMS = {"w": draw(0, I, N), "a": 0.5 * draw(1, N), "u": draw(2, N, N), "t": jnp.asarray(0.37)}
STATE = {"h": draw(3, B, N), "buffer": draw(4, K, B, N), "i": jnp.zeros((), jnp.int32)}


def axonal(p, i, buffer, h, y):
    """Spikes arrive at others after a delay of each neuron."""
    h = 0.9 * h + y
    buffer = buffer.at[i % K].set(jnp.tanh(h))
    return h, buffer, buffer[(i - DELAYS) % K, :, np.arange(N)].T


def currents(p, i, buffer, h, y):
    """A weight in front of a delay."""
    buffer = buffer.at[(i + 2) % K].add(y)
    h = 0.9 * h + buffer[i % K]
    return h, buffer.at[i % K].set(0.0), jnp.tanh(h)


def attention(p, i, buffer, h, y):
    """A cache of bounded length that is read as a whole."""
    buffer = lax.dynamic_update_index_in_dim(buffer, y, i % K, 0)
    return h, buffer, jnp.einsum("kb,kbn->bn", jax.nn.softmax(buffer.sum(-1), 0), buffer)


def index_of_a_parameter(p, i, buffer, h, y):
    """Where it is written depends on a parameter, by whole numbers: no derivative, as in backpropagation."""
    buffer = buffer.at[(i + jnp.floor(p["t"] * 10).astype(jnp.int32)) % K].add(y)
    return 0.9 * h + buffer[i % K], buffer, jnp.tanh(h)


def repeated_places(p, i, buffer, h, y):
    """Several units are added to one place of a row."""
    buffer = buffer.at[(i + DELAYS) % K, :, np.array([0, 0, 1, 2])].add(y.T)
    return 0.9 * h + buffer[i % K], buffer, jnp.tanh(h)


def another_ones_delay(p, i, buffer, h, y):
    late = buffer[(i - DELAYS) % K, :, np.array([1, 2, 3, 0])].T
    h = 0.9 * h + y - 0.3 * late
    return h, buffer.at[i % K].set(jnp.tanh(h)), h


def window_that_moves(p, i, buffer, h, y):
    h = 0.5 * h + lax.dynamic_slice_in_dim(buffer, i % (K - 1), 2, 0).sum(0)
    return h, buffer.at[i % K].set(y), h


def unit_chosen_by_data(p, i, buffer, h, y):
    return h, buffer.at[:, :, i % N].set(y.sum(-1)[None]), buffer[0]


def window_that_is_written(p, i, buffer, h, y):
    buffer = lax.dynamic_update_slice_in_dim(buffer, jnp.stack([y, jnp.tanh(h)]), i % (K - 1), 0)
    return 0.9 * h + buffer[i % K], buffer, jnp.tanh(h)


def response_of_several_slots(p, i, buffer, h, y):
    """A spike is added to three slots at once, as a kernel has it."""
    kernel = jnp.array([0.5, 0.3, 0.1])[:, None, None]
    buffer = buffer.at[(i + jnp.arange(3)) % K].add(kernel * (y - h))
    h = 0.9 * h + buffer[i % K]
    return h, buffer.at[i % K].set(0.0), jnp.tanh(h)


def slots_changed_where_they_are(p, i, buffer, h, y):
    """Scaled, bounded and lessened at a running index."""
    buffer = buffer.at[i % K].set(jnp.tanh(h + y))
    buffer = buffer.at[(i + 1) % K].multiply(0.5)
    buffer = buffer.at[(i + 2) % K].min(0.3).at[(i + 2) % K].max(-0.3)
    buffer = buffer.at[(i + 1) % K].subtract(0.2 * y)
    return 0.9 * h + y, buffer, jnp.tanh(buffer.sum(0))


EXACT = (
    axonal, currents, attention, index_of_a_parameter, repeated_places, window_that_moves, window_that_is_written,
    response_of_several_slots, slots_changed_where_they_are,
)  # fmt: skip
CUT = (another_ones_delay, unit_chosen_by_data)


@pytest.mark.parametrize("body", [*EXACT, *CUT], ids=lambda body: body.__name__)
def test_buffers_are_exact_or_listed(body):
    def fn(params, state, x):
        h, buffer, out = body(params, state["i"], state["buffer"], state["h"], x @ params["w"])
        return {"h": h, "buffer": buffer, "i": state["i"] + 1}, out @ params["u"]

    xs, ys = draw(5, T, B, I), draw(6, T, B, N)
    step = etcompile.compile(etcompile.from_function(fn, PARAMS, STATE), xs[0])
    worst = worst_of(step, fn, PARAMS, STATE, xs, ys, (1, 3))
    assert step.exact == (worst < TOLERANCE) == (body in EXACT) == (not step.report().cuts), worst
    last = step.init_carry().states
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, STATE)


@pytest.mark.parametrize("what", ["read", "written", "read by each"])
def test_windows_that_vmap_makes(what):
    """Gathers and scatters with windows, of examples that are mapped; an index for all of them, or one for each."""
    of_each = jnp.arange(B)

    def fn(params, state, x):
        i, buffer = state["i"], state["buffer"]
        y = x @ params["w"] - params["a"] * state["h"]

        def read(slots, k):
            return lax.dynamic_slice_in_dim(slots, (i + k) % (K - 1), 2, 0).sum(0)

        def write(slots, y):
            return lax.dynamic_update_slice_in_dim(slots, jnp.stack([y, jnp.tanh(y)]), i % (K - 1), 0)

        if what == "written":
            buffer = jax.vmap(write)(buffer, y)
            late = buffer[:, i % K]
        else:
            late = jax.vmap(read, (0, 0 if what == "read by each" else None))(
                buffer, of_each if what == "read by each" else 1
            )
            buffer = buffer.at[:, i % K].set(y)
        h = 0.5 * state["h"] + late
        return {"h": h, "buffer": buffer, "i": i + 1}, h @ params["u"]

    state = {"h": STATE["h"], "buffer": draw(4, B, K, N), "i": jnp.zeros((), jnp.int32)}
    xs, ys = draw(5, T, B, I), draw(6, T, B, N)
    step = etcompile.compile(etcompile.from_function(fn, PARAMS, state), xs[0])
    assert step.exact
    assert worst_of(step, fn, PARAMS, state, xs, ys, (1, 3)) < TOLERANCE


def test_reading_changes_no_bit():
    """Slots are chosen, and not summed: minus zero and what is not finite stay what they are."""

    def fn(params, state, x):
        late = state["buffer"][(state["i"] - 2) % 3]
        h = state["h"] + 0 * late
        return {
            "h": h,
            "buffer": state["buffer"].at[state["i"] % 3].set(x * params["g"]),
            "i": state["i"] + 1,
        }, late

    state = {"h": jnp.zeros(3), "buffer": jnp.zeros((3, 3)), "i": jnp.zeros((), jnp.int32)}
    xs = jnp.asarray([[-0.0, np.inf, 1e300], [np.nan, -0.0, 1.0], [2.0, 3.0, -0.0], [0.0, 0.0, 0.0]])
    step = etcompile.compile(etcompile.from_function(fn, {"g": jnp.ones(3)}, state), xs[0])
    found, wanted = [], []
    for x in xs:
        found.append(np.asarray(step(x)))
        state, out = fn({"g": jnp.ones(3)}, state, x)
        wanted.append(np.asarray(out))
    assert np.stack(found).tobytes() == np.stack(wanted).tobytes()


def test_more_slots_than_parts_stay_in_one_array():
    """A long delay stays in one array, with feedback or without."""
    slots = 40
    buffer = jnp.zeros((slots, 2))

    def fn(params, state, x, back):
        late = state["buffer"][(state["i"] - 3) % slots]
        h = 0.9 * state["h"] + x @ params["w"] + (back * late if back else 0)
        return {
            "h": h,
            "buffer": state["buffer"].at[state["i"] % slots].set(jnp.tanh(h)),
            "i": state["i"] + 1,
        }, late

    params = {"w": draw(8, I, 2)}
    state = {"h": jnp.zeros(2), "buffer": buffer, "i": jnp.zeros((), jnp.int32)}
    one_way = etcompile.compile(
        etcompile.from_function(lambda p, s, x: fn(p, s, x, 0), params, state), draw(9, I)
    )
    assert one_way.exact
    (group,) = one_way.program.header.groups
    assert len(group.states) == 2
    fed_back = lambda p, s, x: fn(p, s, x, 0.2)  # noqa: E731
    both = etcompile.compile(etcompile.from_function(fed_back, params, state), draw(9, I))
    assert both.exact
    assert [path for path, _ in both.program.header.groups[0].states] == ["buffer", "h"]


def test_a_buffer_in_16_bits_in_chunks():
    def fn(params, state, x):
        buffer = lax.dynamic_update_index_in_dim(state["buffer"], x @ params["w"], state["i"] % 3, 0)
        return {"buffer": buffer, "i": state["i"] + 1}, buffer.mean(0)

    wanted = None
    for dtype in (jnp.float64, jnp.bfloat16):
        state = {"buffer": jnp.zeros((3, 1, N), dtype), "i": jnp.zeros((), jnp.int32)}
        xs, ys = draw(5, T, 1, I).astype(dtype), draw(6, T, 1, N).astype(dtype)
        model = etcompile.from_function(fn, {"w": draw(0, I, N).astype(dtype)}, state)
        grads = etcompile.compile(model, xs[0]).scan_value_and_grad(square, chunk=3)(xs, ys)[1]
        wanted = grads if wanted is None else wanted
        assert relative_error(jax.tree.map(lambda g: g.astype(jnp.float64), grads), wanted) < 0.05
