"""Rules that follow every path of a layer, on every model of the zoo, and the structure that they stand on."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error, time_slice
from references import autodiff, compiled, fresh, zoo_cases
from zoo import CASES, by_name

import etcompile
from etcompile.lowering.snap import snap_pattern

pytestmark = pytest.mark.usefixtures("by_numpy")


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_rtrl_equals_bptt(case):
    wanted, built = autodiff(case), fresh(case)
    step = compiled(built, "rtrl")
    assert step.exact
    losses, grads = step.scan_value_and_grad(built.loss_fn)(built.xs, *built.targets)
    assert relative_error(losses, wanted.losses) < built.tolerance
    assert relative_error(grads, wanted.total) < built.tolerance


SPREAD = [
    "gru_no_batch", "lstm_gru", "lif_exponential", "gif", "two_spiking_layers_and_a_leaky_readout", "brainevent_csr_recurrent",
    "brainevent_per_receiver_recurrent", "brainevent_per_sender_recurrent", "custom_vjp_recurrent", "cond_recurrent",
    "layer_norm_recurrent", "mean_field_inhibition", "gates_reshape", "selective_state_space", "second_layer_reads_the_old_first",
    "batched_weights_per_head", "embedding", "embedding_before_a_weight", "conv2d_recurrent", "conv1d_grouped",
    "conv1d_depthwise_recurrent", "sparse_segment_sum_recurrent", "masked_weight", "low_rank_adapter", "weight_tied_in_two_places",
    "indrnn_no_batch", "scalar_parameters", "lru", "states_of_rank_three", "states_of_two_precisions", "one_weight_of_two_results",
]  # fmt: skip


@pytest.mark.parametrize("case", zoo_cases(map(by_name, SPREAD)))
def test_a_large_pattern_is_rtrl(case):
    wanted, built = autodiff(case), fresh(case)
    _, grads = compiled(built, "snap", n=12).scan_value_and_grad(built.loss_fn)(built.xs, *built.targets)
    assert relative_error(grads, wanted.total) < built.tolerance


SYMMETRIC = [
    ("ostl", {}), ("snap", {}), ("uoro", {}), ("kf_rtrl", {}), ("rank_rtrl", {}), ("pp_prop", {}), ("pp_prop", {"rank": 5}), ("ottt", {}), ("otpe", {}),
    ("otpe", {"approximate": True}), ("bptt", {}), ("e_prop", {"kappa": 0.0}), ("compose", {"trace": "factored"}),
]  # fmt: skip


@pytest.mark.parametrize("case", zoo_cases(map(by_name, SPREAD[1::3])))
def test_symmetric_unfiltered_rules_equal_autodiff_at_the_first_step(case):
    for algo, options in SYMMETRIC:
        built = fresh(case)
        x, target = time_slice(built.xs, 0), time_slice(built.targets, 0)
        _, grads = compiled(built, algo, **options).value_and_grad(built.loss_fn)(x, *target)
        assert relative_error(grads, autodiff(case).first) < built.tolerance, algo


def masked(params, state, x):
    h = jnp.tanh(x @ params["W"] + state["h"] @ (params["U"] * MASK))
    return {"h": h}, h


MASK = np.eye(12, k=1) + np.eye(12)


def test_a_sparse_network_has_a_small_pattern_and_few_products():
    rng = np.random.default_rng(0)
    params = {"W": jnp.asarray(rng.normal(size=(3, 12))), "U": jnp.asarray(rng.normal(size=(12, 12)))}
    model = etcompile.from_function(masked, params, {"h": jnp.zeros((2, 12))})
    shapes = {}
    for n in (1, 2, 12):
        step = etcompile.compile(model, jnp.ones((2, 3)), algo="snap", n=n)
        shapes[n] = {name: v.shape for name, v in step.traces.items()}
        lowered = step.executor.compiled.causal.model
        effect = next(e for e in lowered.analysis.effects if e.layer == "network")
        pattern = snap_pattern(lowered, effect, n)
        assert pattern.colors.max() + 1 <= 2  # two columns meet in a row at most
        assert len(pattern.unit) == {1: 12, 2: 12 + 11, 12: 12 * 13 // 2}[n]
    assert {v[1] for v in shapes[1].values()} == {12}


def test_layers_are_found():
    built = by_name("gru_gru")()
    program = compiled(built, "ostl").program
    assert [layer.groups for layer in program.header.layers] == [("g0",), ("g1",)]
    assert not program.exact
    single = compiled(by_name("lstm")(), "ostl").program
    assert single.exact and len(single.header.layers) == 1


def test_populations_that_feed_each_other_are_one_layer():
    def balanced(params, state, x):
        e, i = state["e"], state["i"]
        new_e = jnp.tanh(x @ params["w"] + 0.5 * e - i @ params["ie"])
        new_i = jnp.tanh(0.3 * i + e @ params["ei"])
        return {"e": new_e, "i": new_i}, new_e

    rng = np.random.default_rng(1)
    params = {
        k: jnp.asarray(rng.normal(size=s)) for k, s in {"w": (3, 4), "ie": (2, 4), "ei": (4, 2)}.items()
    }
    model = etcompile.from_function(balanced, params, {"e": jnp.zeros((2, 4)), "i": jnp.zeros((2, 2))})
    step = etcompile.compile(model, jnp.ones((2, 3)), algo="ostl")
    assert step.program.header.layers[0].groups == ("g0", "g1")
    assert step.exact


@pytest.mark.parametrize(
    ("algo", "options"), [("uoro", {}), ("kf_rtrl", {}), ("kf_rtrl", {"rank": 2})], ids=str
)
def test_random_estimates_are_unbiased(algo, options):
    """The mean over many draws lies within its own error of RTRL, in every coordinate, and the error is small."""
    rng = np.random.default_rng(3)
    shapes = {"U": (4, 4), "W": (3, 4), "b": (4,), "V": (4, 2)}
    params = {k: jnp.asarray(0.7 * rng.normal(size=s)) for k, s in shapes.items()}
    xs, ys = jnp.asarray(rng.normal(size=(5, 2, 3))), jnp.asarray(rng.normal(size=(5, 2, 2)))

    def rate(params, state, x):
        h = jnp.tanh(state["h"] @ params["U"] + x @ params["W"] + params["b"])
        return {"h": h}, h @ params["V"]

    def loss(out, y):
        return jnp.sum((out - y) ** 2)

    def gradients(name, draws, **options):
        model = etcompile.from_function(rate, params, {"h": jnp.asarray(rng.normal(size=(2, 4)))})
        model.state = {"h": jnp.full((2, 4), 0.3)}
        step = etcompile.compile(model, xs[0], algo=name, **options)
        carry = step.init_carry()

        def total(params, clock):
            traces = {**carry.traces, "clock": clock} if "clock" in carry.traces else carry.traces
            now, sums = etcompile.Carry(model.state, traces), 0.0
            for x, y in zip(xs, ys, strict=True):
                now, out = step.apply(params, now, x)
                sums = sums + loss(out, y)
            return sums

        clocks = jnp.arange(draws, dtype=jnp.uint32) * 100
        return jax.jit(jax.vmap(jax.grad(total), in_axes=(None, 0)))(params, clocks)

    wanted = jax.tree.map(lambda g: g[0], gradients("rtrl", 1))
    found = gradients(algo, 4000, **options)
    for name, true in wanted.items():
        mean, spread = found[name].mean(0), found[name].std(0)
        error = spread / np.sqrt(4000)
        assert jnp.all(jnp.abs(mean - true) <= 4.5 * error + 1e-9), name
        # Tight enough to tell a bias of a tenth of the gradient.
        assert float(jnp.linalg.norm(error)) < 0.1 * float(jnp.linalg.norm(true)) + 1e-9, name


def test_many_columns_inside_of_brainstate_transforms():
    """More columns than are taken at once, through a surrogate gradient, inside of jit and for_loop."""

    @jax.custom_jvp
    def spike(v):
        return (v > 0).astype(v.dtype)

    @spike.defjvp
    def _(primals, tangents):
        return spike(primals[0]), tangents[0] / (1 + jnp.abs(primals[0])) ** 2

    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(30, 20))), "u": jnp.asarray(0.3 * rng.normal(size=(20, 20)))}

    def lif(params, state, x):
        v = 0.8 * state["v"] + x @ params["w"] + spike(state["v"] - 0.5) @ params["u"]
        return {"v": v}, spike(v - 0.5)

    model = etcompile.from_function(lif, params, {"v": jnp.asarray(rng.normal(size=(2, 20)))})
    xs = jnp.asarray(rng.normal(size=(3, 2, 30)))
    step = etcompile.compile(model, xs[0], algo="rtrl")
    run = step.value_and_grad(lambda out: jnp.sum(out**2))
    wanted = [run(x)[1]["w"] for x in xs]
    step.reset()
    found = brainstate.transform.jit(lambda v: brainstate.transform.for_loop(lambda x: run(x)[1]["w"], v))(xs)
    assert relative_error(found, jnp.stack(wanted)) < 1e-10


def test_a_reset_leaves_the_count_of_random_draws_alone():
    step = compiled(by_name("indrnn")(), "uoro")
    xs = by_name("indrnn")().xs
    step.scan(xs)
    drawn = int(step.traces["clock"])
    step.reset()
    assert int(step.traces["clock"]) == drawn == len(xs)
    assert all(
        not jnp.any(v) for name, v in step.traces.items() if name != "clock" for v in jax.tree.leaves(v)
    )


@pytest.mark.parametrize("algo", ["rtrl", "snap", "ostl"])
def test_operations_with_a_derivative_of_their_own_are_linearised_where_they_are_read(algo):
    """JAX maps a custom derivative along with the columns that pass it, also where it does not depend on them."""

    def fn(params, h, x):
        h = params["a"] * h + jnp.tanh(jnp.sinc(x @ params["w"] + h @ params["r"]))
        return h, jnp.sinc(h)

    rng = np.random.default_rng(4)
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in {"w": (3, 5), "r": (5, 5), "a": (5,)}.items()}
    xs, ys = jnp.asarray(rng.normal(size=(4, 2, 3))), jnp.asarray(rng.normal(size=(4, 2, 5)))

    def loss(out, y):
        return jnp.sum((out - y) ** 2)

    def unrolled(params):
        h, total = jnp.zeros((2, 5)), 0.0
        for x, y in zip(xs, ys, strict=True):
            h, out = fn(params, h, x)
            total += loss(out, y)
        return total

    step = etcompile.compile(etcompile.from_function(fn, params, jnp.zeros((2, 5))), xs[0], algo=algo)
    _, grads = step.scan_value_and_grad(loss, chunk=1)(xs, ys)
    if algo == "rtrl":
        for path, wanted in jax.grad(unrolled)(params).items():
            assert relative_error(grads[path], wanted) < 1e-10
