"""Traces with constant decay are carried as filtered presynaptic values: the same gradients, less memory, said so."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u
from oracles import relative_error

import etcompile
from etcompile.nn import LeakyRateReadout
from etcompile.passes import CollapseConstantDecay

pytestmark = pytest.mark.usefixtures("by_numpy")

T, B, I, O = 7, 2, 6, 4


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


W, XS, YS = draw(0, I, O), draw(1, T, B, I), draw(2, T, B, O)
DECAYS = jnp.array([0.9, 0.7, 0.9, -0.4])


def squared(out, target):
    return jnp.sum((out - target) ** 2)


def leaky(params, state, x):
    h = 0.9 * state["h"] + x @ params["w"] + params["b"]
    return {"h": h}, jnp.tanh(h)


def few_decays(params, state, x):
    h = DECAYS * state["h"] + (1 - DECAYS) * (x @ params["w"])
    return {"h": h}, jnp.tanh(h)


def synapse_and_membrane(params, state, x):
    """An exponential synapse that drives a membrane without reset: one group, its block constant."""
    g = 0.8 * state["g"] + x @ params["w"]
    v = 0.95 * state["v"] + 0.05 * g
    return {"g": g, "v": v}, jnp.tanh(v)


def delay_line(params, state, x):
    """Two steps of delay before a leaky unit: values of the step before stand for others without a number in front."""
    h = 0.9 * state["h"] + state["b"]
    return {"a": x @ params["w"], "b": state["a"], "h": h}, jnp.tanh(h)


def old_state_read(params, state, x):
    h = 0.9 * state["h"] + x @ params["w"]
    return {"h": h}, jnp.tanh(state["h"])


def oscillators(params, state, x):
    """Rotations, two frequencies: blocks that are neither triangular nor all equal."""
    angle = jnp.where(jnp.arange(O) < 2, 0.3, 0.8)
    a, b = 0.9 * jnp.cos(angle), 0.9 * jnp.sin(angle)
    p = a * state["p"] - b * state["q"] + x @ params["w"]
    q = b * state["p"] + a * state["q"]
    return {"p": p, "q": q}, jnp.tanh(p + q)


def convolved(params, state, x):
    window = jax.lax.conv_general_dilated(
        x[:, :, None], params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    h = 0.8 * state["h"] + window
    return {"h": h}, jnp.sum(jnp.tanh(h), axis=1)


def embedded(params, state, x):
    h = 0.8 * state["h"] + params["w"][jnp.argmax(x, axis=-1)]
    return {"h": h}, jnp.tanh(h)


def readout_behind_a_cell(params, state, x):
    """Only the readout's decay is constant."""
    h = 0.5 * state["h"] + jnp.tanh(x @ params["u"] + state["h"] @ params["v"])
    r = 0.9 * state["r"] + h @ params["w"]
    return {"h": h, "r": r}, r


ZERO = jnp.zeros((B, O))
MODELS = {  # name: step, parameters, states, numbers carried by d_rtrl factorised and not
    "leaky": (leaky, {"w": W, "b": draw(3, O)}, {"h": ZERO}, B * I + 1, B * O * I + B * O),
    "few_decays": (few_decays, {"w": W}, {"h": ZERO}, 3 * B * I, B * O * I),
    "synapse_and_membrane": (synapse_and_membrane, {"w": W}, {"g": ZERO, "v": ZERO}, 2 * B * I, 2 * B * O * I),
    "delay_line": (delay_line, {"w": W}, {"a": ZERO, "b": ZERO, "h": ZERO}, 3 * B * I, 3 * B * O * I),
    "old_state_read": (old_state_read, {"w": W}, {"h": ZERO}, B * I, B * O * I),
    "oscillators": (oscillators, {"w": W}, {"p": ZERO, "q": ZERO}, 4 * B * I, 2 * B * O * I),
    "convolved": (convolved, {"w": draw(4, 3, 1, O)}, {"h": jnp.zeros((B, I, O))}, B * I, B * I * O * 3),
    "embedded": (embedded, {"w": W}, {"h": ZERO}, B * I, B * O * I),
    "readout_behind_a_cell": (
        readout_behind_a_cell,
        {"u": draw(5, I, I), "v": 0.3 * draw(6, I, I), "w": W},
        {"h": jnp.zeros((B, I)), "r": ZERO},
        2 * B * I * I + B * I,
        2 * B * I * I + B * O * I,
    ),
}  # fmt: skip


def compiled(fn, params, state, **options):
    return etcompile.compile(etcompile.from_function(fn, params, state), XS[0], **options)


def both(name, **options):
    fn, params, state, *_ = MODELS[name]
    return (compiled(fn, params, state, optimise=optimise, **options) for optimise in (True, False))


def carried(step):
    return sum(leaf.size for leaf in jax.tree.leaves(step.traces))


def learned(step, params, steps=T):
    """Gradients of every step, with an update of the weights after each."""
    run = jax.jit(
        lambda params, carry, x, y: jax.grad(
            lambda p: (lambda carry, out: (squared(out, y), carry))(*step.apply(p, carry, x)), has_aux=True
        )(params)
    )
    carry, found = step.init_carry(), []
    for x, y in zip(XS[:steps], YS[:steps], strict=True):
        grads, carry = run(params, carry, x, y)
        found.append(grads)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_d_rtrl_with_updates_between_steps(name):
    mine, theirs = both(name)
    assert relative_error(learned(mine, MODELS[name][1]), learned(theirs, MODELS[name][1])) < 1e-10
    assert (carried(mine), carried(theirs)) == MODELS[name][3:]


@pytest.mark.parametrize("name", ["few_decays", "delay_line", "old_state_read", "convolved"])
def test_chunks_with_and_without(name):
    (mine, theirs), chunks = both(name), (3, 1)
    for part in (slice(0, 5), slice(5, T)):
        found, wanted = (
            step.scan_value_and_grad(squared, chunk=chunk)(XS[part], YS[part])
            for step, chunk in zip((mine, theirs), chunks, strict=True)
        )
        assert relative_error(found, wanted) < 1e-10


@etcompile.algorithm("filtered_difference")
def filtered_difference(p):
    """Filters of a trace, their difference, and a correction that changes with time."""
    for r in p.relations:
        e = p.recur(decay=0.9 * p.transition(r.group), inject=0.5 * p.outer(r))
        count = p.recur(decay=0.5, inject=p.number(1.0))
        slow, fast = p.recur(decay=0.9, inject=e), p.recur(decay=0.3, inject=e)
        p.gradient(r, p.contract(p.signal(r.group), (slow - fast) / count))


RULES = [
    ("e_prop", {"kappa": 0.7, "normalize": True}), ("e_prop", {"feedback": "random"}), ("otpe", {}), ("rflo", {"leak": 0.6}),
    (filtered_difference(), {}),
]  # fmt: skip


@pytest.mark.parametrize(("algo", "options"), RULES)
def test_other_rules(algo, options):
    mine, theirs = both("synapse_and_membrane", algo=algo, **options)
    found = mine.scan_value_and_grad(squared, chunk=4)(XS, YS)
    wanted = theirs.scan_value_and_grad(squared, chunk=1)(XS, YS)
    assert relative_error(found, wanted) < 1e-10
    assert carried(mine) < carried(theirs)
    assert not [e for e in mine.program.equations if e.type.kind == "trace"]


def test_a_decay_that_the_rule_does_not_read_needs_no_filter_of_its_own():
    step = next(both("few_decays", algo="otpe"))
    assert carried(step) == B * I
    assert step.report().parameters[0].decays == 1


def test_windows():
    mine, theirs = both("synapse_and_membrane", within="exact")
    assert carried(mine) < carried(theirs)
    found, wanted = (step.scan_value_and_grad(squared, chunk=3)(XS, YS) for step in (mine, theirs))
    assert relative_error(found, wanted) < 1e-10


@pytest.mark.parametrize("tau", [20.0 * u.ms, jnp.array([20.0, 5.0, 20.0, 5.0]) * u.ms])
def test_the_leaky_readout_of_the_library(tau):
    def run(optimise):
        brainstate.random.seed(0)
        with brainstate.environ.context(dt=1.0 * u.ms):
            net = LeakyRateReadout(I, O, tau=tau)
            step = etcompile.compile(net, XS[0], batch_size=B, optimise=optimise)
            found = []
            for x, y in zip(XS, YS, strict=True):
                found.append(step.value_and_grad(squared)(x, y))
                net.weight.value = net.weight.value - 0.05 * found[-1][1]["weight"]
        return step, found

    (mine, found), (theirs, wanted) = run(True), run(False)
    assert relative_error(found, wanted) < 1e-10
    decays = 1 if tau.ndim == 0 else 2
    assert (carried(mine), carried(theirs)) == (decays * B * I, B * O * I)
    line = mine.report().to_dict()["parameters"]["weight"]
    assert (line["decays"], line["trace_bytes"]) == (decays, 8 * decays * B * I)
    assert line["saved_bytes"] == 8 * (B * O * I - decays * B * I)
    assert f"factorised into filtered inputs, {decays} decay" in str(mine.report())
    assert "factorised" not in str(theirs.report())


# ----------------------------------------------------------------------------------------------------------------
# where it does not apply


def decay_is_a_parameter(params, state, x):
    h = params["a"] * state["h"] + x @ params["w"]
    return {"h": h}, h


def decay_of_a_parameter(params, state, x):
    h = jax.nn.sigmoid(params["a"]) * state["h"] + x @ params["w"]
    return {"h": h}, h


def decay_is_an_input(params, state, x):
    h = jax.nn.sigmoid(x[:, :1]) * state["h"] + x @ params["w"]
    return {"h": h}, h


def decay_is_a_state(params, state, x):
    h = state["d"] * state["h"] + x @ params["w"]
    return {"h": h, "d": state["d"]}, h


def nonlinear(params, state, x):
    h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
    return {"h": h}, h


def reset(params, state, x):
    """The reset makes D depend on the state, f stays constant."""
    h = 0.9 * state["h"] * (1 - jax.nn.sigmoid(4 * state["h"])) + x @ params["w"]
    return {"h": h}, jax.nn.sigmoid(4 * h)


def drive_times_a_state(params, state, x):
    h = 0.9 * state["h"] + jnp.tanh(state["h"]) * (x @ params["w"])
    return {"h": h}, h


def a_decay_for_every_unit(params, state, x):
    h = jnp.linspace(0.1, 0.9, O) * state["h"] + x @ params["w"]
    return {"h": h}, h


REFUSED = [
    decay_is_a_parameter, decay_of_a_parameter, decay_is_an_input, decay_is_a_state, nonlinear, reset, drive_times_a_state,
    a_decay_for_every_unit,
]  # fmt: skip


def refused(fn, **options):
    states = {"h": ZERO, "d": jnp.full((B, O), 0.9)} if fn is decay_is_a_state else {"h": ZERO}
    params = {"w": draw(9, 3, O)} | ({"a": jnp.full(O, 0.5)} if "a_parameter" in fn.__name__ else {})
    return etcompile.compile(etcompile.from_function(fn, params, states), XS[0, :, :3], **options)


@pytest.mark.parametrize("fn", REFUSED)
def test_it_leaves_other_traces_alone(fn):
    step = refused(fn)
    weight = next(
        r for r in step.program.header.relations if step.program.header.site(r.site).params == ("w",)
    )
    if fn is not a_decay_for_every_unit:
        assert all(response.decay is None for response in weight.constant)
    assert weight.filtered == 0
    assert [e for e in step.program.equations if e.type.kind == "trace"]
    assert "factorised" not in str(step.report())


def test_a_constant_f_is_enough_for_a_rule_with_a_decay_of_its_own():
    assert carried(refused(reset, algo="rflo", leak=0.8)) == B * 3
    assert carried(refused(reset, algo="rflo")) == B * 3 * O


def test_states_of_higher_precision_keep_their_trace():
    def mixed(params, state, x):
        h = 0.9 * state["h"] + (x.astype(jnp.float32) @ params["w"]).astype(jnp.float64)
        return {"h": h}, h

    step = compiled(mixed, {"w": W.astype(jnp.float32)}, {"h": ZERO})
    assert carried(step) == B * O * I


# ----------------------------------------------------------------------------------------------------------------
# the pass


@pytest.mark.parametrize("name", MODELS)
def test_programs_print_and_parse_back(name):
    program = next(both(name)).program
    assert etcompile.parse_program(str(program)) == program
    assert "constant=" in str(program) and "filtered=" in str(program)


def test_it_proves_its_right_from_the_text_alone():
    text = """
program tiny  model=leaky  exact=yes
  group g0 (h:f32) f32[2,4] pattern=1
  site s0 dot_general w f32[3,4], [2,3] -> [2,4] contracted=[3]  # dot_general model.py:5
  relation r0 s0 -> g0 window=[0:2,0:4] rows=1 constant=0.9:1.0
  D0[t] = transition(g0)            : transition g0 f32[1,1,2,4]
  f0[t] = immediate(r0)             : immediate r0 f32[1,2,4]
  x0[t] = presynaptic(s0)           : presynaptic s0 f32[2,3]
  o0[t] = outer(f0[t], x0[t])       : trace r0 f32[1,2,4,3]
  v0[t] = D0[t] @ e0[t-1]           : trace r0 f32[1,2,4,3]
  e0[t] = v0[t] + o0[t]             : trace r0 f32[1,2,4,3]
  L0[t] = signal(g0)                : state g0 f32[1,2,4]
  G0[t] = contract(L0[t], e0[t-1])  : gradient s0 f32[3,4]
  grad s0 += G0[t]
"""
    program = etcompile.parse_program(text)
    collapse = CollapseConstantDecay()
    found = collapse(program)
    lines = [line.strip() for line in str(found).splitlines()]
    for wanted in (
        "v1[t] = 0.9 * z0[t-1]",
        "z0[t] = v1[t] + x1[t]",
        "u0[t] = gain(r0, 0, 0)",
        "q0[t] = back(L0[t], u0[t])",
    ):
        assert any(line.startswith(wanted) for line in lines), wanted
    assert any(line.startswith("G0[t] = pullback(z0[t-1], q0[t])") for line in lines)
    assert etcompile.parse_program(str(found)) == found
    assert collapse(found) == found
    unknown = etcompile.parse_program(text.replace(" constant=0.9:1.0", ""))
    assert collapse(unknown) == unknown
    fading = etcompile.parse_program(text.replace("constant=0.9:1.0", "constant=?:1.0"))
    assert collapse(fading) == fading


def test_a_trace_that_something_else_reads_stays():
    @etcompile.algorithm("normed")
    def normed(p):
        for r in p.relations:
            e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
            p.gradient(r, p.contract(p.signal(r.group), e / p.norm(e)))

    fn, params, state, *_ = MODELS["leaky"]
    step = compiled(fn, params, state, algo=normed())
    assert all(r.constant and not r.filtered for r in step.program.header.relations)


def test_the_manager_runs_it_before_and_after():
    fn, params, state, *_ = MODELS["oscillators"]
    step = compiled(fn, params, state, manager=etcompile.PassManager(check=True, tolerance=1e-10))
    assert {r.name: r.changed for r in step.passes}["collapse_constant_decay"]


def test_equal_directions_of_several_scales_share_a_filter():
    scale = jnp.array([1.0, 2.0, 0.0, -4.0])

    def scaled(params, state, x):
        h = 0.5 * state["h"] + scale * (x @ params["w"])
        return {"h": h}, h

    step = compiled(scaled, {"w": W}, {"h": ZERO})
    assert carried(step) == B * I
    loss, grads = step.scan_value_and_grad(squared)(XS, YS)
    assert np.all(np.asarray(grads["w"])[:, 2] == 0)
    assert np.all(np.isfinite(loss))
