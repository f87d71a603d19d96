"""``exact`` is False if and only if the report says where credit ends, for every rule and whatever ends it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import etcompile
from etcompile import AlgorithmError, PassError, PassManager, algorithm
from etcompile.passes import ExactWithin

LENGTH, INPUTS, UNITS = 7, 3, 4
_rng = np.random.default_rng(0)
W, V = jnp.asarray(_rng.normal(size=(INPUTS, UNITS))), jnp.asarray(_rng.normal(size=(INPUTS, UNITS)))
U = jnp.asarray(0.5 * _rng.normal(size=(UNITS, UNITS)))
ZERO = jnp.zeros(UNITS)
ROWS = jnp.zeros((3, UNITS))


def leaky(p, s, x):
    h = jnp.tanh(0.9 * s["h"] + x @ p["w"])
    return {"h": h}, h


def tanh_cell(p, s, x):
    h = jnp.tanh(x @ p["w"] + s["h"] @ p["u"])
    return {"h": h}, h


def two_layers(p, s, x):
    a = jnp.tanh(0.5 * s["a"] + x @ p["w"])
    b = jnp.tanh(0.5 * s["b"] + a @ p["u"])
    return {"a": a, "b": b}, b


def summed(p, s, x):
    h = jnp.cumsum(0.9 * s["h"] + x @ p["w"])
    return {"h": h}, h


def normalised(p, s, x):
    h = 0.9 * s["h"] + jax.nn.softmax(x @ p["w"])
    return {"h": h}, h


def packed(p, s, x):
    v = 0.9 * s["h"][0] + x @ p["w"] - 0.3 * s["h"][1]
    return {"h": jnp.stack([v, 0.8 * s["h"][1] + 0.2 * v, v])}, jnp.tanh(v)


def ring(p, s, x):
    b = s["b"].at[s["i"] % 3].set(x @ p["w"])
    return {"b": b, "i": s["i"] + 1}, jnp.tanh(b.sum(0))


def register(p, s, x):
    b = jnp.concatenate([(x @ p["w"])[None], s["b"][:-1]])
    return {"b": b, "h": 0.9 * s["h"] + s["b"][-1]}, s["h"]


def rolled(p, s, x):
    h = jnp.roll(0.9 * s["h"], 1) + x @ p["w"]
    return {"h": h}, h


def looped(p, s, x):
    """The credit of w passes a while loop, which has a forward derivative only."""
    v = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.9 * c[1] + s["b"]), (0, s["v"]))[1]
    h = 0.9 * s["h"] + x @ p["v"]
    return {"b": x @ p["w"], "v": v, "h": h}, h + v


def skipped(p, s, x):
    """The result reads the old state, past the new one."""
    return {"h": 0.9 * s["h"] + x @ p["w"]}, jnp.tanh(s["h"])


H, W_ONLY = {"h": ZERO}, {"w": W}
MODELS = {
    leaky: (W_ONLY, H),
    skipped: (W_ONLY, H),
    tanh_cell: ({"w": W, "u": U}, H),
    two_layers: ({"w": W, "u": U}, {"a": ZERO, "b": ZERO}),
    summed: (W_ONLY, H),
    normalised: (W_ONLY, H),
    packed: (W_ONLY, {"h": ROWS}),
    ring: (W_ONLY, {"b": ROWS, "i": jnp.zeros((), jnp.int32)}),
    register: (W_ONLY, {"b": ROWS, "h": ZERO}),
    rolled: (W_ONLY, H),
    looped: ({"w": W, "v": V}, {"b": ZERO, "v": ZERO, "h": ZERO}),
}
EXACT = {ring, leaky, skipped, packed, register}


def square(out, target):
    return jnp.sum((out - target) ** 2)


def compiled(fn, params=None, state=None, **options):
    if params is None:
        params, state = MODELS[fn]
    return etcompile.compile(etcompile.from_function(fn, params, state), jnp.ones(INPUTS), **options)


def largest_gap(fn, step, chunk=1):
    """The largest relative difference of the summed gradient from backpropagation, in forward mode where need be."""
    params, state = MODELS[fn]
    rng = np.random.default_rng(1)
    xs, targets = (
        jnp.asarray(rng.normal(size=(LENGTH, INPUTS))),
        jnp.asarray(rng.normal(size=(LENGTH, UNITS))),
    )
    _, found = step.scan_value_and_grad(square, chunk=chunk)(xs, targets)

    def total(params):
        def body(state, item):
            state, out = fn(params, state, item[0])
            return state, square(out, item[1])

        return lax.scan(body, state, (xs, targets))[1].sum()

    wanted = jax.jit(jax.jacfwd(total))(params)
    return max(float(jnp.abs(found[k] - wanted[k]).max() / jnp.abs(wanted[k]).max()) for k in params)


def said(step):
    """What the report says of where credit ends."""
    report = step.report()
    assert str(report).count("\n    c") >= len(report.cuts)
    assert all(cut.source != "?" or cut.primitive == "exclude" for cut in report.cuts)
    assert all(cut.meaning in str(report) for cut in report.cuts) and report.leaves_out in str(report)
    return [cut.meaning for cut in report.cuts] + [report.leaves_out] * bool(report.leaves_out)


def check(fn, step, chunk=1):
    gap = largest_gap(fn, step, chunk)
    assert step.exact == (not said(step))
    assert (gap < 1e-10) == step.exact, gap


@pytest.mark.parametrize("fn", MODELS, ids=lambda fn: fn.__name__)
def test_d_rtrl_is_exact_if_and_only_if_the_report_names_no_loss(fn):
    step = compiled(fn)
    assert step.exact == (fn in EXACT)
    check(fn, step)


@pytest.mark.parametrize(
    "algo", ["pp_prop", "e_prop", "ottt", "otpe", "rflo", "ostl", "uoro", "kf_rtrl", "rank_rtrl", "osttp"]
)
def test_a_rule_that_is_not_exact_on_two_layers_names_what_it_loses(algo):
    check(two_layers, compiled(two_layers, algo=algo))


def test_snap_names_what_its_pattern_drops():
    check(tanh_cell, compiled(tanh_cell, algo="snap"))


@pytest.mark.parametrize("fn", [tanh_cell, ring], ids=lambda fn: fn.__name__)
def test_rules_that_follow_every_path_are_exact_where_local_ones_cut(fn):
    check(fn, compiled(fn, algo="rtrl"))
    assert compiled(fn, algo="rtrl").exact


def test_e_prop_without_a_filter_is_exact():
    for fn in (leaky, skipped):
        check(fn, compiled(fn, algo="e_prop", kappa=0.0))
        check(fn, compiled(fn, algo="compose"))


def test_ostl_is_exact_on_one_layer_and_names_what_it_loses_on_two():
    check(tanh_cell, compiled(tanh_cell, algo="ostl"))
    assert "one layer to another" in compiled(two_layers, algo="ostl").report().leaves_out
    assert compiled(tanh_cell, algo="ostl", recurrent=False).report().cuts


def test_bptt_over_a_whole_sequence_is_exact_and_says_so():
    step = compiled(tanh_cell, algo="bptt")
    check(tanh_cell, step, chunk=None)
    assert "over what each call of scan_value_and_grad is given" in step.report().verdict
    short = compiled(tanh_cell, algo="bptt", window=3)
    assert not short.exact and "start of each window" in short.report().leaves_out


def test_a_chunk_that_cuts_what_would_be_exact_is_said():
    step = compiled(tanh_cell, algo="bptt")
    with pytest.warns(
        etcompile.EtcompileWarning, match=r"chunk=2 cuts these .* approximates backpropagation"
    ):
        assert largest_gap(tanh_cell, step, chunk=2) > 1e-6


def test_windows_say_that_they_are_exact_inside():
    step = compiled(tanh_cell, within="exact")
    assert not step.exact and "inside of each window" in step.report().verdict
    whole = compiled(leaky, within="exact")
    check(leaky, whole, chunk=3)


def test_a_state_left_out_is_named_for_every_rule_and_only_where_it_would_be_hidden():
    for algo in ("d_rtrl", "rtrl", "ostl", "bptt"):
        step = compiled(two_layers, algo=algo, exclude="a")
        assert not step.exact and any("exclude" in line for line in said(step))
    counter = ({"w": W}, {"h": ZERO, "i": jnp.zeros(())})

    def counting(p, s, x):
        h = 0.9 * s["h"] + x @ p["w"]
        return {"h": h, "i": s["i"] + 1.0}, h

    step = compiled(counting, *counter, exclude="i")
    assert step.exact and not said(step)


def test_a_while_loop_on_the_way_is_a_cut_for_every_rule():
    for algo in ("d_rtrl", "rtrl"):
        report = compiled(looped, algo=algo).report()
        (cut,) = [c for c in report.cuts if c.primitive == "while"]
        assert set(cut.origins) == {"b", "v"} and cut.source.startswith("test_exactness.py:")
        assert not report.exact
        assert "while loop at test_exactness.py" in next(s.reason for s in report.states if s.path == "b")


def test_a_scan_that_is_not_followed_is_a_cut():
    def long(p, s, x):
        y = x @ p["w"]
        body = lambda c, k: (jnp.sort(0.99 * c + 0.01 * y), None)  # noqa: E731
        return {"h": lax.scan(body, s["h"], None, length=3000)[0]}, s["h"]

    step = compiled(long, W_ONLY, H)
    assert not step.exact and said(step)


def test_a_rule_without_memory_of_a_model_says_so_and_names_those_with_one():
    for algo in ("d_rtrl", "rflo"):
        report = compiled(tanh_cell, algo=algo).report()
        assert report.forgotten == ("g0 (h)",)
        assert f"{algo} keeps nothing of g0 (h)" in str(report) and "rtrl, ostl, snap" in str(report)
    for fn, algo in ((leaky, "d_rtrl"), (tanh_cell, "pp_prop"), (tanh_cell, "snap"), (tanh_cell, "bptt")):
        assert compiled(fn, algo=algo).report().forgotten == ()


def test_weights_without_a_differentiable_path_to_an_output_are_named_with_what_ends_it():
    def spiking(p, s, x):
        v = 0.9 * s["v"] + x @ p["w"]
        return {"v": v}, (v > 1).astype(v.dtype) @ p["u"]

    def stopped(p, s, x):
        v = 0.9 * s["v"] + x @ p["w"]
        return {"v": v}, lax.stop_gradient(v @ p["u"])

    def unread(p, s, x):
        return {"v": 0.9 * s["v"] + x @ p["w"], "h": jnp.tanh(s["h"] + x[:2] @ p["u"][:2])}, s["h"]

    state = {"v": ZERO}
    for fn, where, w_ends, u_ends in (
        (spiking, state, "gt (test_exactness.py:", ""),
        (
            stopped,
            state,
            "stop_gradient (test_exactness.py:",
            "any output or hidden state: credit ends at stop_gradient",
        ),
        (unread, {**state, **H}, "nothing on the way to one reads it", ""),
    ):
        report = compiled(fn, {"w": W, "u": U}, where).report()
        lines = report.to_dict()["parameters"]
        assert "no differentiable path from it to any output" in lines["w"]["silent"]
        assert w_ends in lines["w"]["silent"] and lines["w"]["silent"] in str(report)
        assert u_ends in lines["u"]["silent"] and bool(lines["u"]["silent"]) == bool(u_ends)
        assert next(s for s in report.states if s.path == "v").silent
        assert report.exact  # nothing is lost: backpropagation gives zero as well


def test_an_alive_weight_is_not_called_silent():
    for fn in MODELS:
        if fn is not looped:
            assert not any(p.silent for p in compiled(fn).report().parameters)


@pytest.mark.parametrize("algo", ["rflo", "osttp", "three_factor", "e_prop"])
def test_rules_that_change_the_gradient_say_that_it_is_not_that_of_the_loss(algo):
    options = {"feedback": "random"} if algo == "e_prop" else {}
    step = compiled(leaky, algo=algo, **options)
    assert not step.exact
    assert "not the gradient of the loss: " in str(step.report())


def test_a_false_claim_to_be_exact_is_caught_by_running_backpropagation():
    @algorithm("test_forgets", exact="always")
    def forgets(p):
        """Keeps no trace."""

    @algorithm("test_remembers", exact="always")
    def remembers(p):
        for r in p.relations:
            D = p.transition(r.group)
            e = p.recur(decay=D, inject=p.outer(r))
            p.gradient(r, p.contract(p.signal(r.group) @ D, e.prev), within="one_step")

    manager = PassManager(check=True, tolerance=1e-9)
    with pytest.raises(PassError, match=r"test_forgets.* claims to be exact, but differs .* w by"):
        compiled(leaky, algo="test_forgets", manager=manager)
    assert compiled(leaky, algo="test_remembers", manager=manager).exact
    assert compiled(tanh_cell, algo="rtrl", manager=manager).exact
    assert not compiled(
        tanh_cell, algo="test_remembers", manager=manager
    ).exact  # the cut counts, whatever is claimed


@dataclasses.dataclass(frozen=True)
class WrongWindows:
    """A pass that says that it keeps a rule exact in windows, and takes away in its traces what it should add."""

    name: str = "wrong_windows"
    preserves: str = "approximates"
    keeps_exact: bool = True

    def __call__(self, program):
        program = ExactWithin()(program)
        turned = [
            dataclasses.replace(e, op="sub") if e.op == "add" and e.name in program.carried else e
            for e in program.equations
        ]
        return dataclasses.replace(program, equations=tuple(turned))


def test_claims_of_programs_for_windows_are_compared_with_backpropagation_too():
    @algorithm("test_short_windows", exact="always")
    def short(p):
        p.window(2)

    manager = PassManager(check=True, tolerance=1e-9)
    with pytest.raises(PassError, match=r"test_short_windows.* claims to be exact, but differs .* w by"):
        compiled(leaky, algo="test_short_windows", manager=manager)
    with pytest.raises(
        PassError, match=r"wrong_windows \(after rtrl\): it claims to be exact, but differs .* w by"
    ):
        compiled(leaky, algo=["rtrl", WrongWindows()], manager=manager)
    assert compiled(leaky, algo="bptt", manager=manager).exact
    assert not compiled(leaky, algo="bptt", window=2, manager=manager).exact
    assert compiled(leaky, within="exact", manager=manager).exact
    assert compiled(tanh_cell, algo="rtrl", within="exact", manager=manager).exact


def test_a_rule_that_claims_nothing_and_says_nothing_is_named():
    @algorithm("test_mute")
    def mute(p):
        pass

    step = compiled(leaky, algo="test_mute")
    assert not step.exact and "does not say what it leaves out" in str(step.report())


def test_rules_mixed_by_weight_list_the_cuts_of_the_local_one():
    step = compiled(tanh_cell, algo={"w": "rtrl", "u": "d_rtrl"})
    assert not step.exact and said(step)
    with pytest.raises(AlgorithmError):
        compiled(tanh_cell, algo={"w": "rtrl", "q": "d_rtrl"})
