"""Bad input: every mistake ends in an exception of ours that says where, and leaves states and traces alone."""

from __future__ import annotations

from pathlib import Path

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import etcompile
from etcompile.errors import (
    AlgorithmError,
    CarryError,
    EtcompileError,
    InputError,
    ModelError,
    OptionError,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)))
Y = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2, 2)))


def squared(out, target):
    return jnp.mean((out - target) ** 2)


def line(mark: str) -> str:
    """``file:line`` of the line of this file that ends in the comment ``# <- mark``."""
    for number, text in enumerate(Path(__file__).read_text().splitlines(), 1):
        if text.rstrip().endswith(f"# <- {mark}"):
            return f"test_errors.py:{number}"
    raise AssertionError(mark)


class Model(brainstate.nn.Module):
    """A leaky recurrent layer with a readout; its subclasses each make one mistake."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.full((3, 4), 0.3))
        self.a = brainstate.ParamState(jnp.full(4, 0.5))
        self.v = brainstate.ParamState(jnp.full((4, 2), 0.2))
        self.h = brainstate.HiddenState(jnp.full((2, 4), 0.1))

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size or 1, 4)))

    def update(self, x):
        self.h.value = jnp.tanh(self.a.value * self.h.value + x @ self.w.value)  # <- product
        return self.h.value @ self.v.value


class NoHiddenState(Model):
    def update(self, x):
        return jnp.tanh(x @ self.w.value) @ self.v.value


class UntouchedState(Model):
    """A state that no parameter reaches is not hidden."""

    def update(self, x):
        self.h.value = 0.5 * self.h.value + x[:, :1]
        return jnp.tanh(x @ self.w.value + self.h.value) @ self.v.value


class NoParameter(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.h = brainstate.HiddenState(jnp.full((2, 3), 0.1))

    def update(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + x)
        return self.h.value


class IntegerParameter(NoParameter):
    def __init__(self):
        super().__init__()
        self.n = brainstate.ParamState(jnp.arange(3))

    def update(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + x * self.n.value)
        return self.h.value


class WritesParameter(Model):
    def update(self, x):
        out = super().update(x)
        self.a.value = self.a.value * 0.9  # <- writes
        return out


class CreatesState(Model):
    def update(self, x):
        out = super().update(x)
        self.extra = brainstate.HiddenState(self.h.value * 2)  # <- creates
        return out


class ReplacesState(Model):
    """The attribute exists, but every step puts a new state there."""

    def update(self, x):
        self.h = brainstate.HiddenState(jnp.tanh(self.a.value * self.h.value + x @ self.w.value))
        return self.h.value @ self.v.value


class ChangesShape(Model):
    def update(self, x):
        out = super().update(x)
        self.h.value = self.h.value[:1]  # <- shape
        return out


class ChangesDtype(Model):
    def update(self, x):
        out = super().update(x)
        self.h.value = self.h.value.astype(jnp.float32)  # <- dtype
        return out


class WhileOverParameter(Model):
    def update(self, x):
        def body(carry):
            n, h = carry
            return n + 1, jnp.tanh(self.a.value * h + x @ self.w.value)

        _, self.h.value = jax.lax.while_loop(lambda c: c[0] < 3, body, (0, self.h.value))  # <- while
        return self.h.value @ self.v.value


class WhileBesideTheState(Model):
    """The state has its trace; the loop is between a parameter and the output."""

    def update(self, x):
        out = super().update(x)
        start = (0, x @ self.w.value)
        _, y = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.9 * c[1]), start)  # <- beside
        return out + y[:, :2]


class Fails(Model):
    def update(self, x):
        super().update(x)
        raise RuntimeError("the user's own mistake")  # <- raises


class Two(Model):
    def update(self, x, gate):
        return super().update(x * gate)


def snapshot(model) -> dict:
    found = {".".join(map(str, path)): state.value for path, state in model.states().items()}
    assert not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(found))
    return jax.tree.map(np.asarray, found)


def same(a, b) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and bool((np.asarray(x) == np.asarray(y)).all()) for x, y in leaves)  # fmt: skip


def refused(kind, call, *, where=None, says=(), model=None) -> EtcompileError:
    """``call`` raises ``kind``, its message holds ``says`` and the source line, and ``model`` stays as it was."""
    before = None if model is None else snapshot(model)
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for text in (says,) if isinstance(says, str) else says:
        assert text in message
    if where is not None:
        assert where in message
    if model is not None:
        assert same(snapshot(model), before)
    return caught.value


# --- compile() --------------------------------------------------------------------------------------------------------

BAD_MODELS = {
    "no_hidden_state": (NoHiddenState, ModelError, None, "no hidden state"),
    "state_that_no_parameter_reaches": (UntouchedState, ModelError, None, ("no hidden state", "h: no trained parameter")),
    "no_parameter": (NoParameter, ModelError, None, "no trainable parameter"),
    "integer_parameter": (IntegerParameter, ModelError, None, "no trainable parameter"),
    "writes_a_parameter": (WritesParameter, ModelError, "writes", "parameter a"),
    "creates_a_state": (CreatesState, ModelError, "creates", "extra"),
    "replaces_a_state": (ReplacesState, ModelError, None, "h"),
    "changes_the_shape_of_a_state": (ChangesShape, ModelError, "shape", ("state h", "f64[1,4]", "f64[2,4]")),
    "changes_the_dtype_of_a_state": (ChangesDtype, ModelError, "dtype", ("state h", "f32[2,4]", "f64[2,4]")),
    "parameter_inside_while": (WhileOverParameter, EtcompileError, "while", "while"),
    "parameter_through_while_to_the_output": (WhileBesideTheState, EtcompileError, "beside", "while"),
    "raises_by_itself": (Fails, EtcompileError, "raises", "the user's own mistake"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_cannot_be_compiled(name):
    make, kind, mark, says = BAD_MODELS[name]
    model = make()
    attributes = set(vars(model))
    refused(
        kind,
        lambda: etcompile.compile(model, X[0]),
        where=None if mark is None else line(mark),
        says=says,
        model=model,
    )
    assert set(vars(model)) == attributes


@pytest.mark.parametrize("name", ["no_hidden_state", "writes_a_parameter", "creates_a_state"])
def test_a_refused_model_keeps_its_states_when_a_batch_size_was_given(name):
    model = BAD_MODELS[name][0]()
    refused(EtcompileError, lambda: etcompile.compile(model, X[0, :1], batch_size=1), model=model)


def test_a_model_that_failed_compiles_once_it_is_mended():
    model = CreatesState()
    refused(ModelError, lambda: etcompile.compile(model, X[0]))
    model.extra = brainstate.HiddenState(jnp.zeros((2, 4)))
    model.update = lambda x: Model.update(model, x)
    assert etcompile.compile(model, X[0])(X[0]).shape == (2, 2)


def test_not_a_model():
    for thing in (3, None, "model", lambda x: x, Model):
        refused(ModelError, lambda thing=thing: etcompile.compile(thing, X[0]), says="needs a model")


def test_states_not_initialised():
    class Late(Model):
        def __init__(self):
            super().__init__()
            del self.h

    refused(ModelError, lambda: etcompile.compile(Late(), X[0]), says="init_all_states")
    assert etcompile.compile(Late(), X[0], batch_size=2)(X[0]).shape == (2, 2)


def test_example_input_missing():
    model = Model()
    refused(EtcompileError, lambda: etcompile.compile(model), says=("example", "compile(model"), model=model)
    model = Two()
    refused(EtcompileError, lambda: etcompile.compile(model, X[0]), says="gate", model=model)


@pytest.mark.parametrize(
    "x", [jnp.ones((2, 5)), jnp.ones((7, 3)), jnp.ones((2, 3, 4, 5))], ids=["features", "batch", "rank"]
)
def test_example_that_the_model_cannot_take(x):
    model = Model()
    refused(InputError, lambda: etcompile.compile(model, x), where=line("product"), says=str(list(x.shape)), model=model)  # fmt: skip


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "2"])
def test_bad_batch_size(batch_size):
    model = Model()
    refused(InputError, lambda: etcompile.compile(model, X[0], batch_size=batch_size), says="batch_size", model=model)  # fmt: skip
    step = etcompile.compile(model, X[0])
    refused(InputError, lambda: step.reset(batch_size=batch_size), says="batch_size", model=model)


def test_unknown_rule_names_the_nearest():
    model = Model()
    refused(AlgorithmError, lambda: etcompile.compile(model, X[0], algo="d_rtlr"), says=("'d_rtlr'", "did you mean 'd_rtrl'"), model=model)  # fmt: skip
    refused(AlgorithmError, lambda: etcompile.compile(model, X[0], algo=[]), says="empty", model=model)
    refused(EtcompileError, lambda: etcompile.compile(model, X[0], algo=3), says="3", model=model)
    refused(OptionError, lambda: etcompile.compile(model, X[0], algo=["d_rtrl", "no pass"]), says="no pass", model=model)  # fmt: skip


def test_unknown_option():
    model = Model()
    refused(OptionError, lambda: etcompile.compile(model, X[0], kappa=0.5), says=("d_rtrl", "'kappa'"), model=model)  # fmt: skip

    @etcompile.algorithm("test_errors_rule")
    def rule(p, kappa=0.5):
        pass

    refused(OptionError, lambda: rule(kapa=0.5), says="did you mean 'kappa'")
    refused(OptionError, lambda: etcompile.compile(model, X[0], algo=rule(), kappa=0.1), says="kappa", model=model)  # fmt: skip


def test_exclude_that_matches_nothing():
    model = Model()
    refused(OptionError, lambda: etcompile.compile(model, X[0], exclude="hidden"), says=("'hidden'", "h"), model=model)  # fmt: skip
    refused(ModelError, lambda: etcompile.compile(model, X[0], exclude="h"), says="exclude", model=model)


# --- calls of a compiled step -----------------------------------------------------------------------------------------


@pytest.fixture
def running():
    """A step in the middle of a sequence: its traces are not zero."""
    model = Model()
    step = etcompile.compile(model, X[0])
    step(X[0])
    assert any(np.abs(v).max() > 0 for v in jax.tree.leaves(step.traces))
    return model, step


def unharmed(running, kind, call, says=()):
    """``call`` is refused; afterwards the step goes on as if nothing had been called."""
    model, step = running
    traces = step.traces
    params = {k: s.value for k, s in step.param_states.items()}
    error = refused(kind, call, says=says, model=model)
    assert same(step.traces, traces)
    carry = etcompile.Carry({"h": model.h.value}, traces)
    loss, grads = jax.value_and_grad(lambda p: squared(step.apply(p, carry, X[1])[1], Y[1]))(params)
    got_loss, got = step.value_and_grad(squared)(X[1], Y[1])
    np.testing.assert_allclose(got_loss, loss, rtol=1e-12)
    for path in grads:
        np.testing.assert_allclose(got[path], grads[path], rtol=1e-10, atol=1e-14)
    return error


def drivers(step, x, y):
    """Every way to run one step on a bad input."""
    one = [
        lambda: step(x),
        lambda: step.value_and_grad(squared)(x, y),
        lambda: step.apply({k: s.value for k, s in step.param_states.items()}, step.init_carry(), x),
    ]
    if jnp.ndim(x):
        xs, ys = jnp.stack([x, x]), jnp.stack([y, y])
        one += [
            lambda: step.scan(xs),
            lambda: step.scan_value_and_grad(squared)(xs, ys),
            lambda: step.learn(squared, optax.sgd(0.1))(xs, ys),
        ]
    return one


BAD_INPUTS = {
    "feature_size": jnp.ones((2, 4)),
    "batch_size": jnp.ones((3, 3)),
    "rank_too_low": jnp.ones(3),
    "rank_too_high": jnp.ones((1, 2, 3)),
    "scalar": jnp.ones(()),
    "dtype": jnp.ones((2, 3), jnp.complex128),
}


@pytest.mark.parametrize("how", range(6))
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_input_of_the_wrong_form(running, name, how):
    x = BAD_INPUTS[name]
    calls = drivers(running[1], x, Y[0])
    if how >= len(calls):
        pytest.skip("a scalar has no time axis")
    error = unharmed(running, InputError, calls[how])
    assert error.got is not None
    assert error.expected is not None


def test_wrong_number_or_nesting_of_inputs(running):
    model, step = running
    for call in (lambda: step(X[0], X[0]), lambda: step(), lambda: step((X[0], X[0]))):
        unharmed(running, InputError, call, says="Model")
    two = Two()
    step = etcompile.compile(two, X[0], X[0])
    refused(InputError, lambda: step.scan(X), says="2 inputs", model=two)
    refused(InputError, lambda: step.scan((X, X[:3])), says="length", model=two)


def test_integers_and_smaller_floats_are_read_as_floats(running):
    _, step = running
    assert step(np.ones((2, 3), np.int32)).dtype == jnp.float64
    assert step(np.ones((2, 3), np.float32)).dtype == jnp.float64


def test_a_float_is_not_silently_narrowed():
    model = Model()
    for state in model.states().values():
        state.value = state.value.astype(jnp.float32)
    step = etcompile.compile(model, X[0].astype(jnp.float32))
    refused(InputError, lambda: step(X[0]), says=("float64", "float32"), model=model)


@pytest.mark.parametrize("driver", ["scan_value_and_grad", "learn"])
def test_xs_and_targets_of_different_length(running, driver):
    _, step = running
    run = step.scan_value_and_grad(squared) if driver == "scan_value_and_grad" else step.learn(squared, optax.sgd(0.1))  # fmt: skip
    unharmed(running, InputError, lambda: run(X, Y[:4]), says=("5 steps", "4 steps"))
    unharmed(running, InputError, lambda: run(X, jnp.ones(())), says="time axis")


@pytest.mark.parametrize("driver", ["scan", "scan_value_and_grad", "learn"])
def test_no_steps(running, driver):
    _, step = running
    run = {
        "scan": lambda: step.scan(X[:0]),
        "scan_value_and_grad": lambda: step.scan_value_and_grad(squared)(X[:0], Y[:0]),
        "learn": lambda: step.learn(squared, optax.sgd(0.1))(X[:0], Y[:0]),
    }[driver]
    unharmed(running, InputError, run, says=("empty", "T = 0"))


BAD_LOSSES = {
    "per_sample": (lambda out, y: jnp.mean((out - y) ** 2, -1), "(2,)"),
    "one_element": (lambda out, y: jnp.mean((out - y) ** 2).reshape(1), "(1,)"),
    "none": (lambda out, y: None, None),
    "tuple": (lambda out, y: (jnp.mean(out), jnp.mean(y)), None),
    "integer": (lambda out, y: jnp.sum(out > y), "int"),
    "complex": (lambda out, y: jnp.sum(out - y) + 0j, "complex"),
}


@pytest.mark.parametrize("driver", ["value_and_grad", "scan_value_and_grad", "learn"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_loss_that_is_not_a_number(running, name, driver):
    _, step = running
    loss, got = BAD_LOSSES[name]
    call = {
        "value_and_grad": lambda: step.value_and_grad(loss)(X[0], Y[0]),
        "scan_value_and_grad": lambda: step.scan_value_and_grad(loss)(X, Y),
        "learn": lambda: step.learn(loss, optax.sgd(0.1))(X, Y),
    }[driver]
    error = unharmed(running, InputError, call, says="loss")
    if got:
        assert got in (error.got or "")


@pytest.mark.parametrize("driver", ["value_and_grad", "scan_value_and_grad", "learn"])
def test_a_loss_that_raises_leaves_everything_usable(running, driver):
    _, step = running

    def loss(out, y):
        raise KeyError("the user's own")

    call = {
        "value_and_grad": lambda: step.value_and_grad(loss)(X[0], Y[0]),
        "scan_value_and_grad": lambda: step.scan_value_and_grad(loss)(X, Y),
        "learn": lambda: step.learn(loss, optax.sgd(0.1))(X, Y),
    }[driver]
    unharmed(running, KeyError, call, says="the user's own")


def test_a_loss_that_does_not_fit_its_targets(running):
    _, step = running
    unharmed(running, InputError, lambda: step.value_and_grad(squared)(X[0], Y[0, :, :1].repeat(5, 1)))
    unharmed(running, InputError, lambda: step.value_and_grad(squared)(X[0]))
    unharmed(running, InputError, lambda: step.scan_value_and_grad(squared)(X, Y, Y))


def test_loss_that_is_no_function(running):
    _, step = running
    for make in (
        step.value_and_grad,
        step.scan_value_and_grad,
        lambda loss: step.learn(loss, optax.sgd(0.1)),
    ):
        unharmed(running, InputError, lambda make=make: make(3.0), says="loss")


def test_chunks_that_do_not_exist(running):
    _, step = running
    unharmed(running, EtcompileError, lambda: step.scan_value_and_grad(squared, chunk=0)(X, Y), says="chunk")
    unharmed(running, EtcompileError, lambda: step.scan_value_and_grad(squared, chunk=2.5)(X, Y), says="chunk")  # fmt: skip


def test_learn_needs_an_optimiser_and_a_positive_update_every(running):
    _, step = running
    unharmed(running, EtcompileError, lambda: step.learn(squared, 0.1), says="optimi")
    for k in (0, -1, 1.5, True):
        unharmed(running, EtcompileError, lambda k=k: step.learn(squared, optax.sgd(0.1), update_every=k), says="update_every")  # fmt: skip


def test_batch_size_changed_without_reset():
    model = Model()
    step = etcompile.compile(model, X[0])
    step(X[0])
    traces = step.traces
    brainstate.nn.init_all_states(model, batch_size=5)
    wide, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    for call in [*drivers(step, wide, targets), *drivers(step, X[0], Y[0])[:2]]:
        if call is not None:
            refused(InputError, call, says="reset", model=model)
    refused(CarryError, lambda: step(X[0]), says=("h", "(5, 4)", "reset(batch_size"), model=model)
    assert same(step.traces, traces)
    step.reset(batch_size=5)
    assert step(wide).shape == (5, 2)
    refused(CarryError, lambda: step.init_carry(batch_size=7), says="reset", model=model)


def test_state_set_to_another_dtype_or_structure(running):
    model, step = running
    good = model.h.value
    for bad in (good.astype(jnp.float32), good.astype(jnp.complex128), {"h": good}):
        model.h._value = bad  # past brainstate's own check of the structure
        refused(EtcompileError, lambda: step(X[0]), says="h")
    model.h._value = good
    assert step(X[0]).shape == (2, 2)


def test_parameter_of_another_shape_or_missing(running):
    model, step = running
    params = {k: s.value for k, s in step.param_states.items()}
    refused(
        InputError, lambda: step.apply({"a": params["a"]}, step.init_carry(), X[0]), says="param", model=model
    )
    wrong = {**params, "w": jnp.ones((3, 5))}
    refused(InputError, lambda: step.apply(wrong, step.init_carry(), X[0]), says="w", model=model)


# --- plain functions --------------------------------------------------------------------------------------------------


def test_functions_that_cannot_be_compiled():
    params, state = {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))}

    def make(fn, params=params, state=state):
        model = etcompile.from_function(fn, params, state)
        return lambda: etcompile.compile(model, X[0])

    refused(ModelError, lambda: etcompile.from_function(3, params, state), says="function")
    refused(ModelError, make(lambda p, s, x: s["h"]), says="two values")
    refused(ModelError, make(lambda p, s, x: ({"h": s["h"], "new": x}, x)), says="structure")
    refused(
        ModelError,
        make(lambda p, s, x: ({"h": (s["h"] + x @ p["w"])[:1]}, x)),
        says=("state h", "test_errors.py"),
    )
    refused(ModelError, make(lambda p, s, x: (s, x @ p["w"])), says="no hidden state")
    refused(
        ModelError,
        make(lambda p, s, x: ({"h": s["h"] + x[:, :1]}, x), params={}),
        says="no trainable parameter",
    )
    refused(InputError, make(lambda p, s, x: ({"h": s["h"] + x @ p["w"].T}, x)), says="inputs")
    refused(EtcompileError, make(lambda p, s, x: ({"h": s["h"] + x @ p["nothing"]}, x)), says="nothing")
