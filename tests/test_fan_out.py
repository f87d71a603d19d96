"""One element of a weight's result reaches many positions: linear attention and its kin against backpropagation through time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_evaluation import op_by_op
from numpy_gradients import grad
from oracles import relative_error, summed_losses
from references import autodiff, fresh, model_of, step_of, time_slice
from zoo import by_name

import etcompile
from etcompile import Schedule, parse_program
from etcompile.amounts import bytes_text

pytestmark = pytest.mark.usefixtures("by_numpy")
TOLERANCE = 1e-10
AXES = "hkv"


# --- random models ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gate:
    """A factor of the new state that varies along some of its axes."""

    axes: str
    activation: str
    bias: bool
    by: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """S = decay * S + the product of the gates, all of them parts of one projection or each with its own.

    ``second`` is a state of fewer axes beside S; ``shared`` one of a number for each h, of which S reads the "old" or the "new".
    """

    sizes: dict
    batch: int | None
    decay: Gate
    gates: tuple[Gate, ...]
    fused: bool
    curved: bool
    second: bool
    shared: str
    seed: int


ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "none": lambda v: v, "softplus": jax.nn.softplus}


def drawn(seed: int) -> Recipe:
    rng = np.random.default_rng(seed)

    def gate(choices):
        return Gate(
            rng.choice(choices),
            rng.choice(list(ACTIVATIONS)),
            bool(rng.integers(2)),
            rng.choice(["index", "einsum"]),
        )

    gates = [
        gate(["hk", "k", "hkv"]),
        gate(["hv", "v"]),
        *(gate(["h", "hv", "k"]) for _ in range(rng.integers(2))),
    ]
    sizes = {axis: int(rng.integers(1, 4)) for axis in AXES}
    batch = [None, 1, 2][rng.integers(3)]
    fused, curved, second = (bool(v) for v in rng.integers(2, size=3))
    return Recipe(
        sizes,
        batch,
        gate(["h", "hk", "hkv", "v"]),
        tuple(gates),
        fused,
        curved,
        second,
        ["", "", "old", "new"][rng.integers(4)],
        seed,
    )


def build(recipe: Recipe):
    """The step, its parameters and states, inputs and targets."""
    rng = np.random.default_rng(recipe.seed + 1000)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    head = () if recipe.batch is None else (recipe.batch,)
    full = tuple(recipe.sizes[a] for a in AXES)
    gates = (recipe.decay, *recipe.gates)
    shapes = [tuple(recipe.sizes[a] for a in g.axes) for g in gates]
    widths = [int(np.prod(s)) for s in shapes]
    params = {"gain": draw(*full), "out": draw(int(np.prod(full)), 2)}
    if recipe.fused:
        params["w"] = draw(3, sum(widths))
    for n, (g, width) in enumerate(zip(gates, widths, strict=True)):
        params |= {} if recipe.fused else {f"w{n}": draw(3, width)}
        params |= {f"b{n}": draw(width)} if g.bias else {}
    params |= {"wm": draw(3, recipe.sizes["h"])} if recipe.shared else {}

    def whole(g: Gate, y):
        if g.by == "index":
            return y[(..., *(slice(None) if a in g.axes else None for a in AXES))]
        rest = "".join(a for a in AXES if a not in g.axes)
        ones = jnp.ones([recipe.sizes[a] for a in rest])
        return jnp.einsum(f"...{g.axes},{rest}->...{AXES}", y, ones)

    def step(params, state, x):
        if recipe.fused:
            parts = jnp.split(x @ params["w"], np.cumsum(widths)[:-1], -1)
        else:
            parts = [x @ params[f"w{n}"] for n in range(len(gates))]
        factors = []
        for n, (g, y, shape) in enumerate(zip(gates, parts, shapes, strict=True)):
            y = ACTIVATIONS[g.activation](y + params[f"b{n}"] if g.bias else y)
            factors.append(whole(g, y.reshape(*head, *shape)))
        old = jnp.tanh(state["S"]) if recipe.curved else state["S"]
        S = 0.5 * factors[0] * old + factors[1] * factors[2] * params["gain"]
        for factor in factors[3:]:
            S = S * factor
        new, kept = {}, jnp.full(recipe.sizes["h"], 0.7)
        if recipe.shared:
            new["m"] = jnp.tanh(0.8 * state["m"] + x @ params["wm"])
            kept = jax.nn.sigmoid((new if recipe.shared == "new" else state)["m"])
            S = S * kept[..., None, None]
        read = new["S"] = S
        if recipe.second:
            drive = factors[1][..., 0] if recipe.shared else factors[1].sum(-1)
            new["z"] = state["z"] * kept[..., None] + drive * 0.1 + parts[0][..., :1, None]
            read = read + jnp.tanh(new["z"])[..., None]
        return new, jnp.sin(read.reshape(*head, -1)) @ params["out"]

    state = {"S": draw(*head, *full)}
    if recipe.second:
        state["z"] = draw(*head, *full[:2])
    if recipe.shared:
        state["m"] = draw(*head, full[0])
    return step, params, state, draw(5, *head, 3), draw(5, *head, 2)


def square(out, target):
    return jnp.sum((out - target) ** 2)


def bptt(fn, params, state, xs, targets):
    return grad(summed_losses(fn, state, xs, targets, square), params)


@pytest.mark.parametrize("block", range(5))
def test_random_models_equal_bptt(block, pytestconfig):
    for number in range(max(1, pytestconfig.getoption("--random-models") // 100)):
        recipe = drawn(100_000 * block + number)
        fn, params, state, xs, targets = build(recipe)
        step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
        assert step.exact, (recipe, step.report())
        assert parse_program(str(step.program)) == step.program
        wanted = bptt(fn, params, state, xs, targets)
        for chunk in (1, 3):
            step.reset()
            _, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, targets)
            assert relative_error(grads, wanted) < TOLERANCE, (chunk, recipe)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_elements_reach_the_positions_that_the_jacobian_says():
    case = by_name("gated_linear_attention")
    built, step = fresh(case), step_of(case)
    x, one = built.xs[0], built.step
    assert one is not None

    def new_state(k):
        params = built.params | {"k": k}
        return one(params, built.state, x, cut=lambda v: v, put=lambda name, v: v)[0]["S"]

    by_weight = op_by_op(jax.jacobian(new_state), built.params["k"])
    column = np.count_nonzero(
        np.any(np.asarray(by_weight) != 0, axis=-2)[0], axis=tuple(range(by_weight.ndim - 3))
    )
    (relation,) = [r for r in step.program.header.relations if "k" in step.program.header.site(r.site).params]
    assert set(column.tolist()) == set(relation.fan) == {3}
    assert step.report().to_dict()["parameters"]["k"]["positions"] == 3
    assert "trace of g0 (3 positions each)" in str(step.report())
    assert "(3 positions each)" in step.graph.nodes["k"]["how"]


def test_parts_of_one_projection_are_relations_of_their_own():
    header = step_of(by_name("one_projection")).program.header
    of_weight = [r for r in header.relations if header.site(r.site).params == ("w",)]
    assert [r.span[1] for r in of_weight] == [(4, 8), (8, 14), (14, 16)]
    assert [r.fan for r in of_weight] == [(3,), (2,), (6,)]
    line = step_of(by_name("one_projection")).report().to_dict()["parameters"]["w"]
    assert line["part"] == "elements 0:4 of axis 1 of its result within the step only"


def test_between_layers_and_between_rows_alone_is_cut():
    two = step_of(by_name("two_layers_of_linear_attention")).report()
    assert {cut.group for cut in two.cuts} == {"g1"}
    assert all("S1" in cut.origins for cut in two.cuts)
    delta = step_of(by_name("delta_net")).report()
    assert [(c.primitive, c.origins) for c in delta.cuts] == [
        ("reduce_sum", ("k",)), ("dot_general", ("k",)), ("broadcast_in_dim", ("S",)),
    ]  # fmt: skip


def test_windows_and_whole_paths_follow_what_is_cut():
    case = by_name("delta_net")
    built = fresh(case)
    step = etcompile.compile(model_of(built), time_slice(built.xs, 0), algo="d_rtrl", within="exact")
    whole = len(built.xs)
    _, grads = step.scan_value_and_grad(built.loss_fn, chunk=whole)(built.xs, *built.targets)
    assert relative_error(grads, autodiff(case).total) < TOLERANCE


def test_without_kept_traces_nothing_is_carried():
    case = by_name("gated_linear_attention")
    built = fresh(case)
    schedule = Schedule(keep_traces=False)
    step = etcompile.compile(model_of(built), time_slice(built.xs, 0), schedule=schedule)
    _, grads = step.scan_value_and_grad(built.loss_fn, chunk=3)(built.xs, *built.targets)
    assert relative_error(grads, autodiff(case).total) < TOLERANCE
    assert step.report().trace_bytes == 0
    kept = step_of(case).report()
    assert "Schedule(keep_traces=False)" in str(kept)
    # What a chunk holds of a step does not depend on whether traces are kept, and both reports say it.
    assert kept.bytes_of_a_step == step.report().bytes_of_a_step > 0
    for report in (kept, step.report()):
        assert f"a step holds {bytes_text(report.bytes_of_a_step)}" in str(report)


# --- on the way from y to the state -----------------------------------------------------------------------------------


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + v * v),))


@jax.custom_jvp
def clipped(v):
    return jnp.clip(v, -1, 1)


clipped.defjvp(lambda v, t: (clipped(v[0]), 0.5 * t[0]))


def looped(v):
    return jax.lax.fori_loop(0, 200, lambda _, u: u - 0.01 * jnp.sin(u) * u, v)


@pytest.mark.parametrize(
    ("through", "dtype"),
    [
        (spike, jnp.float64),
        (clipped, jnp.float64),
        (looped, jnp.float64),
        (lambda v: jnp.where(v > 0, v, 0.1 * v), jnp.float32),
    ],
)
def test_on_the_way(through, dtype):
    def fn(params, state, x):
        k = through(x @ params["k"])
        S = 0.9 * state["S"] + k[..., None] * (x @ params["v"])[..., None, :]
        z = 0.9 * state["z"] + jnp.roll(k, 1, -1).astype(dtype)
        return {"S": S, "z": z}, S.reshape(2, -1) @ params["out"] + jnp.sum(z, -1, keepdims=True)

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params = {"k": draw(3, 2), "v": draw(3, 4), "out": draw(8, 2)}
    state = {"S": draw(2, 2, 4), "z": draw(2, 2).astype(dtype)}
    xs, targets = draw(4, 2, 3), draw(4, 2, 2)
    step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
    assert step.exact
    _, grads = step.scan_value_and_grad(square, chunk=3)(xs, targets)
    tolerance = TOLERANCE if dtype == jnp.float64 else 1e-6
    assert relative_error(grads, bptt(fn, params, state, xs, targets)) < tolerance


# --- states that others share -----------------------------------------------------------------------------------------


def test_a_shared_state_is_in_the_group_of_those_that_read_it():
    step = step_of(by_name("mlstm_with_running_maximum"))
    (group,) = step.program.header.groups
    assert [path for path, _ in group.states] == ["C", "m", "n"]
    assert group.pattern == ((True, True, False), (False, True, False), (False, True, True))


def test_what_feeds_a_shared_state_by_a_sum_is_not_in_its_group():
    def fn(params, state, x):
        g = 0.9 * state["g"] + jnp.sum(state["h"], -1, keepdims=True)
        h = jnp.tanh(0.5 * state["h"] + x @ params["w"]) - state["g"]
        return {"g": g, "h": h}, h

    model = etcompile.from_function(
        fn, {"w": jnp.ones((3, 4))}, {"g": jnp.zeros((2, 1)), "h": jnp.zeros((2, 4))}
    )
    step = etcompile.compile(model, jnp.ones((2, 3)))
    assert not step.exact
    assert any("g" in cut.origins for cut in step.report().cuts)
