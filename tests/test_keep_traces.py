"""Sequences of their own: traces that start at zero and are given up, so that none has to be stored."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error, summed_losses
from references import autodiff, compiled, fresh
from zoo import by_name

import etcompile
from etcompile.lowering.schedules import chunk_sizes

T, B = 6, 4
SEQUENCES = etcompile.Schedule(keep_traces=False)
REPLAYED = etcompile.Schedule(keep_traces=False, how="replay")


@jax.custom_vjp
def own_product(w, x):
    """A product with a derivative rule of its own: nothing tells how it acts on a weight, short of its Jacobian."""
    return x @ w


own_product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, c: (kept[1].T @ c, c @ kept[0].T))


def step_function(params, state, x):
    h = 0.8 * state["h"] + jnp.tanh(own_product(params["w"], x) + params["b"])
    return {"h": h}, h @ params["o"]


def loss(out, target):
    return jnp.sum((out - target) ** 2)


def model_of(units):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "w": jax.random.normal(keys[0], (units, units)) / units**0.5,
        "b": jnp.zeros(units),
        "o": jax.random.normal(keys[1], (units, 3)),
    }
    return etcompile.from_function(step_function, params, {"h": jnp.zeros((B, units))}), params


def data_of(units):
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (T, B, units)), jax.random.normal(keys[1], (T, B, 3))


def by_bptt(params, state, xs, targets):
    """Gradient over the sequence, and the state at its end."""

    def total(params):
        def body(state, item):
            state, out = step_function(params, state, item[0])
            return state, loss(out, item[1])

        end, losses = jax.lax.scan(body, state, (xs, targets))
        return losses.sum(), end

    return jax.grad(total, has_aux=True)(params)


@pytest.mark.parametrize("units", [5, 512])
def test_a_sequence_of_its_own_is_backpropagation_through_it(units):
    model, params = model_of(units)
    xs, targets = data_of(units)
    step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
    state = {"h": jnp.zeros((B, units))}
    for length in (T, 1, T - 1):  # states go on, traces do not
        _, found = step.scan_value_and_grad(loss)(xs[:length], targets[:length])
        expected, state = by_bptt(params, state, xs[:length], targets[:length])
        assert relative_error(found, expected) < 1e-10
    assert step.traces == {}
    assert step.report().traces == {}


def test_pieces_of_a_sequence_are_chunked_as_asked():
    xs, targets = data_of(5)
    found = []
    for chunk in ("auto", 1, 4):
        model, _ = model_of(5)
        step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
        found.append(step.scan_value_and_grad(loss, chunk=chunk)(xs, targets)[1])
        step.reset()
        found.append(step.scan_value_and_grad(loss, chunk=chunk)(xs, targets, progress=True)[1])
    for other in found[1:]:
        assert relative_error(other, found[0]) < 1e-10


def test_what_cannot_be_stored_is_said_by_compile():
    model, _ = model_of(512)
    xs, _ = data_of(512)
    with pytest.raises(etcompile.UnsupportedError, match=r"the trace of w .* cannot be stored") as error:
        etcompile.compile(model, xs[0])
    assert "test_keep_traces.py:" in str(error.value)
    assert "keep_traces=False" in str(error.value)
    with pytest.raises(etcompile.UnsupportedError, match="cannot be stored"):
        etcompile.compile(model, xs[0], algo="pp_prop", schedule=SEQUENCES)
    with pytest.raises(etcompile.UnsupportedError, match="cannot be stored"):
        etcompile.compile(model, xs[0], within="exact", schedule=SEQUENCES)


def test_shorter_chunks_than_the_sequence_would_store_it():
    model, _ = model_of(512)
    xs, targets = data_of(512)
    step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
    for chunk in (1, T - 1):
        with pytest.raises(etcompile.UnsupportedError, match="cannot be stored"):
            step.scan_value_and_grad(loss, chunk=chunk)(xs, targets)
    assert not np.any(step.executor.live.states()["h"])


def test_nothing_learns_step_by_step():
    model, params = model_of(5)
    xs, targets = data_of(5)
    step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
    with pytest.raises(etcompile.OptionError, match="value_and_grad of one step needs the traces"):
        step.value_and_grad(loss)
    with pytest.raises(etcompile.OptionError, match="learn needs the traces"):
        step.learn(loss, None)
    carry = step.init_carry()
    with pytest.raises(etcompile.OptionError, match="the gradient of one step needs the traces"):
        jax.grad(lambda p: loss(step.apply(p, carry, xs[0])[1], targets[0]))(params)
    expected = step_function(params, {"h": jnp.zeros((B, 5))}, xs[0])[1]
    assert relative_error(step(xs[0]), expected) < 1e-10


def test_random_numbers_go_on_from_sequence_to_sequence():
    model, _ = model_of(5)
    xs, targets = data_of(5)
    step = etcompile.compile(model, xs[0], algo="uoro", schedule=SEQUENCES)
    _, first = step.scan_value_and_grad(loss)(xs, targets)
    step.reset()
    _, second = step.scan_value_and_grad(loss)(xs, targets)
    assert np.abs(first["w"] - second["w"]).max() > 1e-3


def test_keep_traces_is_true_or_false():
    with pytest.raises(etcompile.OptionError, match="keep_traces must be True or False"):
        etcompile.Schedule(keep_traces=1)


def test_one_chunk_may_take_what_its_traces_would():
    model, _ = model_of(5)
    step = etcompile.compile(model, data_of(5)[0][0], schedule=SEQUENCES)
    (chunked,) = [s for s in step.executor.compiled.functions.schedules if s.name == "chunks"]
    kept = etcompile.compile(model_of(5)[0], data_of(5)[0][0]).report().trace_bytes
    most = 10 * chunked.bytes_of_a_step
    for memory, steps, size in ((most, 10, 10), (most - 2 * kept, 10, 10), (most - 2 * kept - 1, 10, 5)):
        schedule = etcompile.Schedule(keep_traces=False, memory=max(1, memory))
        assert chunked.size(schedule, steps, None) == size


# --- long sequences: blocks from last to first ------------------------------------------------------------------------


def in_blocks(name, algo, how, chunk, loss=None):
    """Losses, gradients and the states at the end of a sequence of the zoo; and its step."""
    built = fresh(by_name(name))
    step = compiled(built, algo, schedule=etcompile.Schedule(keep_traces=False, how=how))
    found = step.scan_value_and_grad(loss or built.loss_fn, chunk=chunk)(built.xs, *built.targets)
    return (found, step.executor.live.states()), step


@pytest.fixture
def cached(monkeypatch):
    """Gives a number of steps to blocks of which the first pass over a sequence is kept, as where a cache holds so few."""

    def of(steps):
        of_steps = property(lambda sizes: (1 << 20) // steps)
        monkeypatch.setattr(chunk_sizes.ChunkSizes, "bytes_of_a_step", of_steps)
        monkeypatch.setattr(chunk_sizes, "shared_cache", lambda: 2 << 20)
        for name in ("_FEW_CACHES", "_LEAST", "_PER_GRADIENT"):
            monkeypatch.setattr(chunk_sizes, name, 0)

    return of


@pytest.mark.parametrize(
    ("name", "algo", "block"),
    [
        ("two_layers_of_linear_attention", "d_rtrl", 3), ("mamba", "d_rtrl", 2), ("gru_gru", "d_rtrl", 3),
        ("lstm_no_batch", "d_rtrl", 1), ("lif_exponential", "d_rtrl", 3), ("lru_complex_parameters", "d_rtrl", 3),
        ("alif_exponential", "e_prop", 2), ("gru_no_batch", "pp_prop", 3),
    ],
)  # fmt: skip
def test_blocks_are_one_chunk(name, algo, block):
    """The credit between blocks is that between steps: what is cut between layers is cut, what is filtered goes on."""
    steps = len(jax.tree.leaves(by_name(name)().xs)[0])
    assert steps % 3
    wanted, _ = in_blocks(name, algo, "chunks", steps)
    found, step = in_blocks(name, algo, "replay", block)
    assert relative_error(found, wanted) < 1e-10
    if step.exact:
        assert relative_error(found[0][1], autodiff(by_name(name)).total) < 1e-10


def delayed(params, state, x):
    """Units of more slots than are written out: their traces are found step by step alone."""
    i, buffer = state["i"], state["buffer"]
    v = (
        0.9 * state["v"]
        + x @ params["w"]
        + params["g"] * jnp.tanh(buffer[:, jnp.arange(3), (i - DELAYS) % 40])
    )
    return {"v": v, "buffer": buffer.at[..., i % 40].set(jnp.tanh(v)), "i": i + 1}, v


DELAYS = jnp.array([1, 17, 39])


@pytest.mark.parametrize(("steps", "block"), [(45, 7), (1, 7)])
def test_delays_in_blocks_are_backpropagation(steps, block):
    keys = jax.random.split(jax.random.key(2), 4)
    params = {"w": jax.random.normal(keys[0], (2, 3)), "g": jnp.array([0.5, -0.4, 0.3])}
    state = {"v": jnp.zeros((B, 3)), "buffer": jnp.zeros((B, 3, 40)), "i": jnp.zeros((), jnp.int32)}
    xs, targets = jax.random.normal(keys[1], (steps, B, 2)), jax.random.normal(keys[2], (steps, B, 3))
    step = etcompile.compile(etcompile.from_function(delayed, params, state), xs[0], schedule=REPLAYED)
    _, grads = step.scan_value_and_grad(loss, chunk=block)(xs, targets)
    wanted = jax.jit(jax.grad(summed_losses(delayed, state, xs, targets, loss)))(params)
    assert relative_error(grads, wanted) < 1e-10


@pytest.mark.parametrize("units", [5, 512])
def test_what_does_not_fit_as_one_chunk_is_replayed(units):
    """Also where no trace could be stored: the sequence was one chunk then, whatever it took."""
    xs, targets = data_of(units)
    found = []
    for memory in (1 << 30, 1):
        schedule = etcompile.Schedule(keep_traces=False, memory=memory)
        step = etcompile.compile(model_of(units)[0], xs[0], schedule=schedule)
        plan = step.executor.functions.plan
        assert plan(schedule, T, T).how.name == "chunks"
        found.append((plan(schedule, T).how.name, step.scan_value_and_grad(loss)(xs, targets)))
    assert [how for how, _ in found] == ["chunks", "replay"]
    assert relative_error(found[1][1], found[0][1]) < 1e-10


@pytest.mark.parametrize(("name", "how"), [("gru_no_batch", "chunks"), ("lstm_no_batch", "replay")])
def test_no_step_runs_twice_where_traces_take_fewer_products(name, how):
    """Of a GRU those of the reset gate have none; an LSTM's have two rows."""
    step = compiled(fresh(by_name(name)), "d_rtrl", schedule=SEQUENCES)
    schedule = etcompile.Schedule(keep_traces=False, memory=1 << 16)
    assert step.executor.functions.plan(schedule, 1024).how.name == how


def test_blocks_are_of_as_many_steps_as_take_little_memory():
    """Where block starts take more than is allowed, traces go from chunk to chunk, whose memory does not grow."""
    model, _ = model_of(5)
    step = etcompile.compile(model, data_of(5)[0][0], schedule=SEQUENCES)
    plan, each = step.executor.functions.plan, step.report().bytes_of_a_step
    assert plan(SEQUENCES, 4096).how.name == "chunks"
    cases = (
        (4096, 200, "replay", 64),
        (4099, 200, "replay", 64),
        (1 << 18, 400, "replay", 128),
        (1 << 18, 100, "chunks", 64),
    )
    for steps, memory, how, size in cases:
        schedule = etcompile.Schedule(keep_traces=False, memory=memory * each)
        found = plan(schedule, steps)
        assert (found.how.name, found.size) == (how, size)


def test_what_a_loss_writes_goes_from_block_to_block(cached):
    steps = len(jax.tree.leaves(by_name("gru_no_batch")().xs)[0])
    wanted, found = (
        in_blocks("gru_no_batch", "d_rtrl", how, chunk, loss_that_counts())[0]
        for how, chunk in (("chunks", steps), ("replay", 3))
    )
    assert relative_error(found, wanted) < 1e-10
    cached(3)
    found, _ = in_blocks("gru_no_batch", "d_rtrl", "chunks", steps, loss_that_counts())
    assert relative_error(found, wanted) < 1e-10


@pytest.mark.parametrize(
    ("name", "algo", "block"),
    [
        ("gru_gru", "d_rtrl", 3), ("lstm_no_batch", "d_rtrl", 1), ("lru_complex_parameters", "d_rtrl", 3),
        ("alif_exponential", "e_prop", 2), ("gru_no_batch", "pp_prop", 3),
    ],
)  # fmt: skip
def test_one_chunk_in_blocks_is_one_chunk(name, algo, block, cached):
    """The first pass over all steps is kept; what is filtered is filtered on the way to each block."""
    steps = len(jax.tree.leaves(by_name(name)().xs)[0])
    wanted, step = in_blocks(name, algo, "chunks", steps)
    (how,) = step.executor.functions.schedules
    assert how.sizes.block(steps) == steps
    cached(block)
    found, step = in_blocks(name, algo, "chunks", steps)
    assert how.sizes.block(steps) == block
    assert relative_error(found, wanted) < 1e-10


def loss_that_counts():
    count = brainstate.ShortTermState(jnp.ones(()))

    def counted(out, target):
        count.value = 0.5 * count.value + 1
        return count.value * jnp.mean((out - target) ** 2)

    return counted


def test_what_a_step_does_beside_its_results_is_done_once():
    seen = []

    def told(params, state, x):
        jax.debug.callback(lambda: seen.append("step"))
        return step_function(params, state, x)

    model, params = model_of(5)
    model = etcompile.from_function(told, params, {"h": jnp.zeros((B, 5))})
    xs, targets = data_of(5)
    step = etcompile.compile(model, xs[0], schedule=etcompile.Schedule(keep_traces=False, memory=1))
    assert "each step would run twice" in str(step.report()).replace("\n", " ")
    assert not etcompile.compile(model, xs[0]).report().held_back  # traces are kept
    quiet = etcompile.compile(model_of(5)[0], xs[0], schedule=SEQUENCES)
    assert not quiet.report().held_back
    jax.block_until_ready(step.scan_value_and_grad(loss)(xs, targets))
    jax.effects_barrier()
    assert len(seen) == T
    with pytest.raises(etcompile.UnsupportedError, match="runs each step twice"):
        etcompile.compile(model, xs[0], schedule=REPLAYED).scan_value_and_grad(loss)(xs, targets)


def test_a_loss_that_says_something_says_it_in_order():
    seen = []

    def told(out, target):
        jax.debug.callback(lambda t: seen.append(float(t)), target[0, 0], ordered=True)
        return loss(out, target)

    xs, targets = data_of(5)
    step = etcompile.compile(model_of(5)[0], xs[0], schedule=REPLAYED)
    jax.block_until_ready(step.scan_value_and_grad(told, chunk=2)(xs, targets))
    jax.effects_barrier()
    assert seen == [float(t) for t in targets[:, 0, 0]]


def test_what_runs_for_a_loss_that_says_something_is_what_the_cost_is_of():
    def told(out, target):
        jax.debug.callback(lambda: None)
        return loss(out, target)

    model, xs = model_of(5)[0], data_of(5)[0]
    each = etcompile.compile(model, xs[0]).report().bytes_of_a_step
    schedule = etcompile.Schedule(keep_traces=False, memory=200 * each)
    step = etcompile.compile(model, xs[0], schedule=schedule)
    plan = step.executor.functions.plan
    assert plan(schedule, 4096).how.name == "replay"
    assert plan(schedule, 4096, ordered=True).how.name == "chunks"
    costs = [step.cost(steps=4096, loss_fn=of, targets=(jnp.zeros((B, 3)),)) for of in (loss, told)]
    assert [cost.chunk for cost in costs] == [64, 128]


def test_replay_is_for_sequences_that_leave_no_traces():
    xs, targets = data_of(5)
    step = etcompile.compile(model_of(5)[0], xs[0], schedule=etcompile.Schedule(how="replay"))
    with pytest.raises(etcompile.UnsupportedError, match="leave no traces"):
        step.scan_value_and_grad(loss)(xs, targets)
