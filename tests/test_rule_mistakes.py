"""Mistakes in a rule, or in what it is given, are said."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import etcompile
from etcompile.errors import AlgorithmError, EtcompileWarning, OptionError, PassError, ProgramError


@pytest.fixture(autouse=True)
def _rules_of_this_test_only(monkeypatch):
    etcompile.algorithm_names()  # loads those that ship
    monkeypatch.setattr(etcompile.registry, "_RULES", dict(etcompile.registry._RULES))


def leaky(params, state, x):
    h = 0.9 * state["h"] + x @ params["w"] + params["b"]
    return {"h": h}, h


def model():
    return etcompile.from_function(leaky, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, {"h": jnp.zeros((1, 2))})


X = jnp.ones((1, 3))


def compiled(algo, **options):
    return etcompile.compile(model(), X, algo=algo, **options)


def loss(out, y=0.0):
    return jnp.sum((out - y) ** 2)


# --- arguments that a rule ignores ------------------------------------------------------------------------------------

CALLS = {
    "call, target": lambda s: s(X, target=X),
    "call, modulator": lambda s: s(X, modulator=1.0),
    "apply": lambda s: s.apply(s.param_states["params"].value, s.init_carry(), X, modulator=1.0),
    "many steps": lambda s: s(etcompile.MultiStepData(X[None]), modulator=1.0),
    "value_and_grad": lambda s: s.value_and_grad(loss)(X, modulator=1.0),
    "scan_value_and_grad": lambda s: s.scan_value_and_grad(loss)(X[None], modulator=1.0),
    "learn": lambda s: s.learn(loss, optax.sgd(0.1))(X[None], modulator=1.0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_argument_that_the_rule_ignores_is_refused(call):
    step = compiled("d_rtrl")
    with pytest.raises(OptionError, match=r"d_rtrl reads no (target|modulator)") as caught:
        call(step)
    assert "osttp" in str(caught.value) or "three_factor" in str(caught.value)
    assert not any(jnp.any(v) for v in jax.tree.leaves((step.traces, step.init_carry().states)))


def test_windows_read_no_modulator():
    with pytest.raises(OptionError, match="no modulator"):
        compiled("bptt").scan_value_and_grad(loss)(X[None], modulator=1.0)


# --- registering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("d_rtrl", ()), ("mine", ("es_d_rtrl",))], ids=["name", "alias"])
def test_the_name_of_a_rule_that_ships_is_taken(names):
    name, aliases = names
    with pytest.raises(AlgorithmError, match="comes with etcompile"):

        @etcompile.algorithm(name, aliases=aliases)
        def mine(p): ...

    assert "mine" not in etcompile.algorithm_names()
    assert compiled(name if name == "d_rtrl" else "pp_prop").program.name in ("d_rtrl", "pp_prop")


def test_algorithm_without_parentheses():
    with pytest.raises(OptionError, match=r'@etcompile\.algorithm\("mine"\)'):

        @etcompile.algorithm
        def mine(p): ...


# --- writing ----------------------------------------------------------------------------------------------------------


def write(p, r):
    return p.contract(p.signal(r.group), p.recur(decay=p.transition(r.group), inject=p.outer(r)))


def test_a_forgotten_gradient_is_warned_of():
    @etcompile.algorithm("first_only")
    def first_only(p):
        for r in p.relations[:1]:
            p.gradient(r, write(p, r))

    @etcompile.algorithm("none_at_all")
    def none_at_all(p):
        for r in p.relations:
            write(p, r)

    with pytest.warns(
        EtcompileWarning, match=r"first_only declares no gradient for r1: \S+ in g0.*p\.gradient"
    ):
        compiled("first_only")
    with pytest.warns(EtcompileWarning, match=r"none_at_all declares no gradient for r0"):
        compiled("none_at_all")


def test_no_warning_for_rules_that_ship_and_for_mixtures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = etcompile.registry._RULES  # other tests may have added theirs
        for algo in [name for name, rule in rules.items() if etcompile.registry._ships(rule)]:
            compiled(algo)
        compiled({"w": "d_rtrl", "b": "pp_prop"})


def test_a_rule_that_returns_something_is_refused():
    @etcompile.algorithm("returns")
    def returns(p):
        return [p.gradient(r, write(p, r)) for r in p.relations]

    @etcompile.algorithm("yields")
    def yields(p):
        for r in p.relations:
            yield p.gradient(r, write(p, r))

    with pytest.raises(AlgorithmError, match="the rule returns returns something"):
        compiled("returns")
    with pytest.raises(AlgorithmError, match="generator"):
        compiled("yields")
    with pytest.raises(AlgorithmError, match="the rule returns returns something"):
        compiled({"w": "returns", "*": "d_rtrl"})


def test_errors_inside_a_rule_name_the_rule_its_line_and_the_relation():
    def wrong_types(p):
        for r in p.relations:
            p.contract(p.transition(r.group), p.outer(r))

    def own_mistake(p):
        for r in p.relations:
            if r.name == "r1":
                raise KeyError("mine")
            p.gradient(r, write(p, r))

    first = wrong_types.__code__.co_firstlineno
    with pytest.raises(ProgramError) as caught:
        compiled(etcompile.algorithm("wrong_types")(wrong_types))
    assert f"test_rule_mistakes.py:{first + 2}: rule wrong_types, at relation r0 (" in str(caught.value)
    first = own_mistake.__code__.co_firstlineno
    with pytest.raises(PassError) as caught:
        compiled(etcompile.algorithm("own_mistake")(own_mistake))
    text = str(caught.value)
    assert f"test_rule_mistakes.py:{first + 3}: " in text and "pass own_mistake" in text
    assert re.search(r"at relation r1 \(\w+ in g0\): KeyError: 'mine'", text)


def test_a_bad_option_of_a_rule_stays_what_it_is():
    with pytest.raises(OptionError, match=r"^decay must lie in"):
        compiled("pp_prop", decay=2.0)


def test_the_modulator_of_a_rule_that_reads_one_still_works():
    step = compiled("three_factor")
    value, grads = step.value_and_grad(loss)(X, modulator=1.0)
    assert jnp.isfinite(value) and all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
