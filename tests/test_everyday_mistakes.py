"""What a new user gets wrong ends in one sentence with the way out, and leaves the model as it was."""

from __future__ import annotations

import inspect

import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import etcompile
from etcompile.errors import CheckpointError, EtcompileError, InputError, ModelError, OptionError
from etcompile.keywords import COMPILE


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(3, 4)
        self.readout = brainstate.nn.Linear(4, 2)

    def update(self, x):
        return self.readout(self.cell(x))


class Plain(brainstate.nn.Module):
    """Keeps its state in an attribute that is no state."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.ones((3, 4)))
        self.h = jnp.zeros((2, 4))

    def update(self, x):
        self.h = jnp.tanh(self.h + x @ self.w.value)
        return self.h


class Dropped(Net):
    """Reads `fit` of the environment, in a layer of a library that raises an error of its own for it."""

    def __init__(self):
        super().__init__()
        self.readout = brainstate.nn.Sequential(brainstate.nn.Dropout(0.5), self.readout)


def leaky(params, state, x):
    h = 0.9 * state["h"] + x @ params["w"]
    return {"h": h}, h


def swapped_results(params, state, x):
    return x @ params["w"], {"h": x @ params["w"]}


class Tensor:
    """Stands for torch's."""

    shape, ndim = (2, 3), 2


Tensor.__module__ = "torch"

P, S = {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))}
X, XS = jnp.ones((2, 3)), jnp.ones((5, 2, 3))


def loss(out, y):
    return jnp.mean((out - y) ** 2)


def on(*inputs, **options):
    return lambda: etcompile.compile(Net(), *inputs, **{"batch_size": 2, **options})


def function(*inputs, fn=leaky, params=P, state=S):
    return lambda: etcompile.compile(etcompile.from_function(fn, params, state), *inputs)


AT_COMPILE = {
    "a model class": (lambda: etcompile.compile(Net, X), ModelError, "etcompile.compile(Net(...), x)"),
    "a bare function": (lambda: etcompile.compile(leaky, X), ModelError, "from_function"),
    "features of a cell": (on(jnp.ones((2, 7))), InputError, "axis 1 (features) of the input has 7 entries where the weight takes 3"),
    "features of a function": (function(jnp.ones((2, 7))), InputError, "axis 1 (features) of the input has 7"),
    "batch of a cell": (on(jnp.ones((9, 3))), InputError, "axis 0 (batch) of the input has 9 entries where the states have 2"),
    "batch of a function": (function(jnp.ones((9, 3))), InputError, "axis 0 (batch) of the input has 9"),
    "params and state swapped": (function(X, params=S, state=P), ModelError, "are params and state swapped"),
    "the function in the middle": (lambda: etcompile.from_function(P, leaky, S), ModelError, "are the arguments swapped"),
    "the function at the end": (lambda: etcompile.from_function(P, S, leaky), ModelError, "are the arguments swapped"),
    "results swapped": (function(X, fn=swapped_results), ModelError, "are the two swapped"),
    "the order of the peer": (lambda: etcompile.compile(Net(), "d_rtrl", X), InputError, "compile(model, x, algo='d_rtrl')"),
    "algorithm=": (on(X, algorithm="e_prop"), OptionError, "algo="),
    "batchsize=": (on(X, batchsize=2), OptionError, "did you mean 'batch_size'"),
    "chunk= of compile": (on(X, chunk=4), OptionError, "etcompile.Schedule(chunk=...)"),
    "optimize=": (on(X, optimize=False), OptionError, "optimise="),
    "an option of the rule": (on(X, algo="pp_prop", dcay=0.9), OptionError, "did you mean 'decay'"),
    "a generator": (on(v for v in [X]), InputError, "jnp.stack(list("),
    "a string": (on("text"), InputError, "turn text into numbers"),
    "a tensor of torch": (on(Tensor()), InputError, ".numpy()"),
    "a function as input": (on(loss), InputError, "no input"),
    "a list of numbers": (on([[1.0, 2.0, 3.0]] * 2), InputError, "the input is a list of numbers"),
    "fit that is not set": (lambda: etcompile.compile(Dropped(), X, batch_size=2), ModelError, "brainstate.environ.set(fit=True)"),
    "state in a plain attribute": (lambda: etcompile.compile(Plain(), X), ModelError, "assigns h during a step"),
    "Schedule(chunks=4)": (lambda: etcompile.Schedule(chunks=4), OptionError, "did you mean 'chunk'"),
    "PassManager(chek=True)": (lambda: etcompile.PassManager(chek=True), OptionError, "did you mean 'check'"),
    "Checkpoints(evry=3)": (lambda: etcompile.Checkpoints("x", evry=3), OptionError, "did you mean 'every'"),
}  # fmt: skip


@pytest.mark.parametrize("case", AT_COMPILE.values(), ids=AT_COMPILE)
def test_what_goes_wrong_before_there_is_a_step(case):
    call, kind, says = case
    with pytest.raises(kind) as caught:
        call()
    assert says in str(caught.value)


@pytest.fixture(scope="module")
def step():
    return on(X)()


AT_CALLS = {
    "features": (lambda s: s(jnp.ones((2, 7))), "axis 1 has 7 entries in place of 3 (features)"),
    "batch": (lambda s: s(jnp.ones((9, 3))), "step.reset(batch_size=9)"),
    "a sequence": (lambda s: s(XS), "step.scan"),
    "a list": (lambda s: s([X]), "jnp.stack(x)"),
    "a generator": (lambda s: s(v for v in [X]), "jnp.stack(list("),
    "a string": (lambda s: s("a"), "no array"),
    "a tensor of torch": (lambda s: s(Tensor()), ".numpy()"),
    "a list over time": (
        lambda s: s.scan([XS[0], XS[1][:1]]),
        "(1, 3) at step 1",
    ),
    "a generator over time": (lambda s: s.scan(v for v in XS), "jnp.stack(list("),
    "features over time": (lambda s: s.scan(jnp.ones((5, 2, 7))), "axis 1 has 7 entries in place of 3"),
    "chunks=": (lambda s: s.scan_value_and_grad(loss, chunks=2), "did you mean 'chunk'"),
    "data beside the loss": (
        lambda s: s.value_and_grad(loss, X, X),
        "step.value_and_grad(loss_fn)(x, *targets)",
    ),
    "one input beside the loss": (
        lambda s: s.value_and_grad(loss, X),
        "step.value_and_grad(loss_fn)(x, *targets)",
    ),
    "a sequence beside the loss": (
        lambda s: s.scan_value_and_grad(loss, XS, XS),
        "step.scan_value_and_grad(loss_fn)(xs",
    ),
    "a sequence to learn beside the loss": (
        lambda s: s.learn(loss, XS, XS),
        "step.learn(loss_fn, optimizer)(xs",
    ),
    "a large array for a number": (lambda s: s.reset(list(range(1000))), "characters)"),
    "batch=": (lambda s: s.reset(batch=3), "did you mean 'batch_size'"),
    "two inputs": (lambda s: s(X, X), "2 input(s)"),
    "an input by name": (lambda s: s(x=X), "by their place in the call"),
    "a target by name": (lambda s: s.value_and_grad(loss)(X, y=X[:, :2]), "by their place in the call"),
    "targets by name": (lambda s: s.scan_value_and_grad(loss)(XS, y=XS), "by their place in the call"),
    "targets to learn by name": (
        lambda s: s.learn(loss, optax.sgd(0.1))(XS, y=XS),
        "by their place in the call",
    ),
    "msk=": (lambda s: s.value_and_grad(loss)(X, X[:, :2], msk=1.0), "did you mean 'mask'"),
    "a list of numbers as a target": (
        lambda s: s.value_and_grad(lambda o, y: jnp.sum(o[:, y]) - jnp.sum(y))(X, [0, 1]),
        "only after jnp.asarray",
    ),
    "a class of optimisers": (lambda s: s.learn(loss, braintools.optim.Adam), "make one: Adam(1e-3)"),
    "a line search": (
        lambda s: s.learn(loss, optax.lbfgs())(XS, XS[..., :2]),
        "more than gradients and parameters",
    ),
}


@pytest.mark.parametrize("case", AT_CALLS.values(), ids=AT_CALLS)
def test_what_goes_wrong_at_a_call(step, case):
    call, says = case
    before = jax.tree.map(np.asarray, {k: s.value for k, s in step.param_states.items()})
    with pytest.raises(EtcompileError) as caught:
        call(step)
    assert says in str(caught.value)
    after = {k: s.value for k, s in step.param_states.items()}
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_where_only_libraries_run_no_line_of_theirs_that_traces_is_named():
    with pytest.raises(ModelError, match=r"\Aone step of GRUCell fails(.|\n)*initialise the states first"):
        etcompile.compile(brainstate.nn.GRUCell(3, 4), X)


def test_a_plain_attribute_is_put_back():
    model = Plain()
    with pytest.raises(ModelError, match=r"test_everyday_mistakes.py:\d+(.|\n)*HiddenState"):
        etcompile.compile(model, X)
    assert not isinstance(model.h, jax.core.Tracer) and not model.h.any()


def test_a_file_in_the_place_of_a_directory(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="kept in a directory"):
        etcompile.Checkpoints(tmp_path / "run")


def test_the_keywords_of_compile_are_known():
    given = [
        p.name for p in inspect.signature(etcompile.compile).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    assert set(given) == set(COMPILE)
