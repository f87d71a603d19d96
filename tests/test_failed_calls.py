"""A failed call leaves states, traces and parameters as they were: the next call gives what it gives without the failure."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import etcompile
from etcompile import CarryError, EtcompileError, InputError, ModelError, MultiStepData, OptionError

BATCH, STEPS = 2, 4
rng = np.random.default_rng(0)
XS, YS = jnp.asarray(rng.normal(size=(STEPS, BATCH, 3))), jnp.asarray(rng.normal(size=(STEPS, BATCH, 2)))
TOO_MUCH = XS.at[2, 0, 0].set(1000.0)
W, U = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=(4, 2)))

SGD = optax.sgd(0.1)
HostError = (RuntimeError, ValueError)  # jax's own classes differ between the first call and later ones


def refuses(value):
    if np.max(value) > 100:
        raise RuntimeError("the host refuses this value")
    return value


def checked(x):
    return jax.pure_callback(refuses, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")


class Net(brainstate.nn.Module):
    """A leaky tanh state; the host looks at the input, and the environment may forbid the step once states are written."""

    def __init__(self):
        super().__init__()
        self.w, self.u = brainstate.ParamState(W), brainstate.ParamState(U)
        self.steps = brainstate.LongTermState(jnp.zeros(()))

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4)))
        if batch_size == 13:
            raise MemoryError("no room for thirteen")

    def update(self, x):
        self.h.value = jnp.tanh(0.9 * self.h.value + checked(x) @ self.w.value)
        self.steps.value = self.steps.value + 1.0
        if brainstate.environ.get("forbidden", False):
            raise LookupError("forbidden here")
        return self.h.value @ self.u.value


def leaky(params, state, x):
    h = jnp.tanh(0.9 * state["h"] + checked(x) @ params["w"])
    if brainstate.environ.get("forbidden", False):
        raise LookupError("forbidden here")
    return {"h": h}, h @ params["u"]


def squared(out, y):
    return jnp.mean((out - y) ** 2)


class Prepared:
    """A step in the middle of a sequence, and what its next calls give."""

    def __init__(self, kind, **options):
        if kind == "module":
            self.model, options["batch_size"] = Net(), BATCH
        else:
            self.model = etcompile.from_function(leaky, {"w": W, "u": U}, {"h": jnp.zeros((BATCH, 4))})
        self.step = etcompile.compile(self.model, XS[0], **options)
        self.start = self.step.params
        self.begin()
        self.wanted = self.goes_on()

    def begin(self):
        self.step.params = self.start
        if isinstance(self.model, Net):
            self.model.steps.value = jnp.zeros(())
        self.step.reset()
        self.step.value_and_grad(squared)(XS[0], YS[0])

    def goes_on(self):
        found = self.step.scan_value_and_grad(squared, chunk=1)(XS, YS)
        return found, self.step.value_and_grad(squared)(XS[0], YS[0]), self.held()

    def held(self):
        """Copies: what is compared with must not be what a call gives away."""
        access = self.step.executor.live
        return jax.tree.map(np.array, (access.params(), access.states(), self.step.traces))


PREPARED: dict[str, Prepared] = {}


@pytest.fixture
def prepared(request):
    kind = request.param
    if kind not in PREPARED:
        PREPARED[kind] = Prepared(kind)
    PREPARED[kind].begin()
    yield PREPARED[kind]
    if request.node.stash.get(FAILED, True):
        PREPARED.pop(kind, None)


FAILED = pytest.StashKey[bool]()


def same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), found, wanted)


def raises_itself(out, y):
    raise KeyError("a mistake in the loss")


def takes_a_branch(out, y):
    return jnp.mean(out) if out[0, 0] > 0 else jnp.mean(y)


def optimizer(update):
    return optax.GradientTransformation(SGD.init, update)


def divides(grads, state, params=None):
    raise ZeroDivisionError("a mistake in the optimiser")


def misshaped(grads, state, params=None):
    return jax.tree.map(lambda g: jnp.ones(2), grads), state


def at_first(value):
    """The first step of what has time on axis 0."""
    return value if isinstance(value, (str, list)) else jax.tree.map(lambda v: v[0], value)


WRONG_INPUTS = {
    "features": (XS[..., :2], "axis . has 2 entries in place of 3"),
    "batch": (XS[:, :1], "axis 0 has 1 entries in place of 2"),
    "dtype": (XS.astype(complex), "wrong dtype"),
    "structure": ({"x": XS}, "structure"),
    "text": ("spikes", "no array"),
    "two": ((XS, XS), "one array"),
}
METHODS = {
    "call": lambda s, x: s(at_first(x)),
    "value_and_grad": lambda s, x: s.value_and_grad(squared)(at_first(x), YS[0]),
    "scan": lambda s, x: s.scan(x),
    "scan_value_and_grad": lambda s, x: s.scan_value_and_grad(squared)(x, YS),
    "learn": lambda s, x: s.learn(squared, SGD)(x, YS),
    "apply": lambda s, x: s.apply(s.params, s.init_carry(), at_first(x)),
    "many steps": lambda s, x: s(MultiStepData(x)),
}

WRONG_LOSSES = {
    "raises": (raises_itself, (YS,), KeyError, "a mistake in the loss"),
    "shape": (lambda o, y: o - y, (YS,), InputError, r"got: shape \(2, 2\)"),
    "integer": (lambda o, y: 3, (YS,), InputError, "floating-point"),
    "nothing": (lambda o, y: None, (YS,), InputError, "NoneType"),
    "complex": (lambda o, y: jnp.mean(o) * 1j, (YS,), InputError, "complex128"),
    "no target": (
        squared,
        (),
        InputError,
        r"test_failed_calls.py:\d+(.|\n)*0 targets(.|\n)*squared\(out, y\)",
    ),
    "two targets": (squared, (YS, YS), InputError, r"2 targets(.|\n)*squared\(out, y\)"),
    "target shape": (
        squared,
        (YS[..., None] * jnp.ones(5),),
        InputError,
        r"test_failed_calls.py:\d+(.|\n)*outputs float64\[2, 2\], target 0 float64\[2, 2, 5\]",
    ),
    "branch": (takes_a_branch, (YS,), ModelError, r"takes_a_branch(.|\n)*jnp.where"),
    "text": (squared, ("spikes",), InputError, "no array"),
    "no function": (3, (YS,), InputError, "must be a function"),
}
LOSS_METHODS = {
    "value_and_grad": lambda s, f, t: s.value_and_grad(f)(XS[0], *map(at_first, t)),
    "scan_value_and_grad": lambda s, f, t: s.scan_value_and_grad(f)(XS, *t),
    "in pieces": lambda s, f, t: s.scan_value_and_grad(f)(XS, *t, progress=True),
    "learn": lambda s, f, t: s.learn(f, SGD)(XS, *t),
    "learn in blocks": lambda s, f, t: s.learn(f, SGD, update_every=2)(XS, *t),
}

CALLS = {f"{method}: {wrong}": (lambda s, run=run, x=x: run(s, x), EtcompileError, text)
         for wrong, (x, text) in WRONG_INPUTS.items() for method, run in METHODS.items()}  # fmt: skip
CALLS |= {f"{method}: loss {wrong}": (lambda s, run=run, f=f, t=t: run(s, f, t), error, text)
          for wrong, (f, t, error, text) in WRONG_LOSSES.items() for method, run in LOSS_METHODS.items()}  # fmt: skip
CALLS |= {
    "scan_value_and_grad: lengths": (lambda s: s.scan_value_and_grad(squared)(XS, YS[:2]), InputError, "4 steps"),
    "learn: lengths": (lambda s: s.learn(squared, SGD)(XS, YS[:2]), InputError, "4 steps"),
    "scan: empty": (lambda s: s.scan(XS[:0]), InputError, "empty"),
    "learn: empty": (lambda s: s.learn(squared, SGD)(XS[:0], YS[:0]), InputError, "empty"),
    "mask: steps": (lambda s: s.scan_value_and_grad(squared)(XS, YS, mask=jnp.ones(3)), InputError, "mask"),
    "mask: examples": (
        lambda s: s.scan_value_and_grad(squared)(XS, YS, mask=jnp.ones((4, 3))),
        InputError,
        "per example",
    ),
    "mask: text": (lambda s: s.value_and_grad(squared)(XS[0], YS[0], mask="all"), InputError, "the mask is no array"),
    "mask: learn": (lambda s: s.learn(squared, SGD)(XS, YS, mask=jnp.ones((4, 3))), InputError, "per example"),
    "chunk: 0": (lambda s: s.scan_value_and_grad(squared, chunk=0), OptionError, "chunk"),
    "chunk: text": (lambda s: s.scan_value_and_grad(squared, chunk="x"), OptionError, "chunk"),
    "reduction": (lambda s: s.scan_value_and_grad(squared, reduction="x"), OptionError, "reduction"),
    "modulator": (lambda s: s.value_and_grad(squared)(XS[0], YS[0], modulator=1.0), OptionError, "modulator=1.0"),
    "modulator: scan": (lambda s: s.scan_value_and_grad(squared)(XS, YS, modulator=1.0), OptionError, "modulator"),
    "modulator: learn": (lambda s: s.learn(squared, SGD)(XS, YS, modulator=1.0), OptionError, "of shape"),
    "target": (lambda s: s(XS[0], target=1.0), OptionError, "target"),
    "progress: scan": (lambda s: s.scan(XS, progress=3), OptionError, "progress"),
    "progress: learn": (lambda s: s.learn(squared, SGD)(XS, YS, progress=3), OptionError, "progress"),
    "aux": (lambda s: s.value_and_grad(squared, has_aux=True)(XS[0], YS[0]), InputError, r"got: an array of shape \(\)"),
    "aux: learn": (lambda s: s.learn(squared, SGD, has_aux=True)(XS, YS), InputError, "two values"),
    "optimiser: none": (lambda s: s.learn(squared), OptionError, "needs an optimiser"),
    "optimiser: raises": (lambda s: s.learn(squared, optimizer(divides))(XS, YS), ZeroDivisionError, "a mistake"),
    "optimiser: raises in blocks": (
        lambda s: s.learn(squared, optimizer(divides), update_every=3)(XS, YS),
        ZeroDivisionError,
        "a mistake",
    ),
    "optimiser: shapes": (lambda s: s.learn(squared, optimizer(misshaped))(XS, YS), OptionError, r"\(4, 2\)"),
    "callback: no function": (lambda s: s.learn(squared, SGD)(XS, YS, callback=3), OptionError, "callback"),
    "update_every": (lambda s: s.learn(squared, SGD, update_every=0), OptionError, "update_every"),
    "reset: 0": (lambda s: s.reset(batch_size=0), InputError, "batch_size"),
    "reset: text": (lambda s: s.reset(batch_size="two"), InputError, "batch_size"),
    "carry": (lambda s: s.init_carry(batch_size=17), InputError, "batch_size=17"),
    "params: none": (lambda s: setattr(s, "params", None), InputError, "structure"),
    "params: some": (lambda s: setattr(s, "params", {"w": W}), InputError, "structure"),
    "params: shape": (lambda s: setattr(s, "params", {"w": W, "u": U[:1]}), InputError, "parameter u"),
    "params: dtype": (lambda s: setattr(s, "params", {"w": W, "u": U.astype(int)}), InputError, "parameter u"),
    "params: text": (lambda s: setattr(s, "params", {"w": W, "u": "zero"}), InputError, "parameter u"),
    "cost: batch": (lambda s: s.cost(batch=0), OptionError, "batch"),
    "cost: chunk": (lambda s: s.cost(chunk="auto"), OptionError, "chunk"),
    "environment": (lambda s: forbidden(lambda: s(XS[0])), EtcompileError, "forbidden here"),
    "environment: sequence": (
        lambda s: forbidden(lambda: s.scan_value_and_grad(squared)(XS, YS)),
        EtcompileError,
        "forbidden here",
    ),
    "environment: learn": (
        lambda s: forbidden(lambda: s.learn(squared, SGD)(XS, YS)),
        EtcompileError,
        "forbidden here",
    ),
    "host: call": (lambda s: s(TOO_MUCH[2]), HostError, "host refuses"),
    "host: value_and_grad": (lambda s: s.value_and_grad(squared)(TOO_MUCH[2], YS[0]), HostError, "host refuses"),
    "host: scan": (lambda s: s.scan(TOO_MUCH), HostError, "host refuses"),
    "host: sequence": (lambda s: s.scan_value_and_grad(squared, chunk=1)(TOO_MUCH, YS), HostError, "host refuses"),
    "host: chunks": (lambda s: s.scan_value_and_grad(squared, chunk=3)(TOO_MUCH, YS), HostError, "host refuses"),
    "host: many steps": (lambda s: s(MultiStepData(TOO_MUCH)), HostError, "host refuses"),
    "host: learn": (lambda s: s.learn(squared, SGD)(TOO_MUCH, YS), HostError, "host refuses"),
    "host: learn in blocks": (
        lambda s: s.learn(squared, SGD, update_every=2)(TOO_MUCH[:3], YS[:3]),
        HostError,
        "host refuses",
    ),
}  # fmt: skip


def forbidden(call):
    with brainstate.environ.context(forbidden=True):
        return call()


@pytest.mark.parametrize("prepared", ["module"], indirect=True)
@pytest.mark.parametrize("case", CALLS)
def test_a_failed_call_of_a_module_changes_nothing(case, prepared, request):
    fails_and_goes_on(prepared, *CALLS[case])
    request.node.stash[FAILED] = False


#: Of a plain function those that go another way than for a module.
OF_FUNCTIONS = [
    c for c in CALLS if c.split(":")[0] in ("apply", "params", "environment", "host", "optimiser", "reset")
]


@pytest.mark.parametrize("prepared", ["function"], indirect=True)
@pytest.mark.parametrize("case", OF_FUNCTIONS)
def test_a_failed_call_of_a_function_changes_nothing(case, prepared, request):
    fails_and_goes_on(prepared, *CALLS[case])
    request.node.stash[FAILED] = False


def fails_and_goes_on(prepared, call, error, text):
    before = prepared.held()
    with pytest.raises(error, match=text):
        call(prepared.step)
    same(prepared.held(), before)
    same(prepared.goes_on(), prepared.wanted)


@pytest.mark.parametrize("prepared", ["module"], indirect=True)
def test_a_batch_size_that_the_model_refuses_changes_nothing(prepared):
    fails_and_goes_on(prepared, lambda s: s.reset(batch_size=13), EtcompileError, "no room for thirteen")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("prepared", ["module"], indirect=True)
def test_the_optimiser_stays_where_a_call_of_learn_fails(prepared, every):
    """Also where parts of the call have run before the one that fails."""

    def losses(fail):
        prepared.begin()
        learner = prepared.step.learn(squared, optax.adam(0.1), update_every=every)
        learner(XS[:3], YS[:3])
        if fail:
            with pytest.raises(HostError, match="host refuses"):
                learner(TOO_MUCH, YS)
        return learner(XS, YS), prepared.held()

    same(losses(True), losses(False))


def test_a_callback_that_raises_leaves_the_run_after_its_last_piece():
    one, other = Prepared("module"), Prepared("module")
    seen = []

    def stop(steps, losses):
        seen.append(steps)
        raise KeyboardInterrupt

    xs, ys = jnp.concatenate([XS, XS]), jnp.concatenate([YS, YS])
    for prepared in (one, other):
        prepared.begin()
    learner = one.step.learn(squared, SGD)
    with pytest.raises(KeyboardInterrupt):
        learner(xs, ys, callback=stop)
    (done,) = seen
    assert 0 < done < len(xs)
    reference = other.step.learn(squared, SGD)
    reference(xs[:done], ys[:done])
    same(one.held(), other.held())
    same(learner(xs[done:], ys[done:]), reference(xs[done:], ys[done:]))


@pytest.mark.parametrize("prepared", ["module"], indirect=True)
def test_a_loss_that_fails_leaves_the_states_that_it_writes(prepared):
    count = brainstate.ShortTermState(jnp.zeros(()))

    def counts(out, y):
        count.value = count.value + checked(jnp.mean(y) ** 2)
        return squared(out, y) + 0 * count.value

    def fails(out, y):
        count.value = count.value + 5
        raise KeyError("a mistake in the loss")

    def no_scalar(out, y):
        count.value = count.value + 5
        return out

    step = prepared.step
    for call, error in (
        (lambda: step.value_and_grad(fails)(XS[0], YS[0]), KeyError),
        (lambda: step.scan_value_and_grad(no_scalar)(XS, YS), InputError),
        (lambda: step.learn(fails, SGD)(XS, YS), KeyError),
        (lambda: step.value_and_grad(counts)(XS[0], YS[0] + 1000), HostError),
        (lambda: step.scan_value_and_grad(counts)(XS, YS + 1000), HostError),
        (lambda: step.scan_value_and_grad(counts)(XS, YS + 1000, progress=True), HostError),
        (lambda: step.learn(counts, SGD)(XS, YS + 1000), HostError),
    ):
        prepared.begin()
        fails_and_goes_on(prepared, lambda s, call=call: call(), error, "a mistake|one number|host refuses")
        assert count.value == 0


def test_traces_that_a_failure_takes_along_are_said_at_the_next_call():
    """A failure that nobody can expect, such as too little memory; here it stands in that the host is not known to be asked."""
    model = etcompile.from_function(leaky, {"w": W, "u": U}, {"h": jnp.zeros((BATCH, 4))})
    step = etcompile.compile(model, XS[0])
    step.executor.compilation.functions.asks_host = False
    wanted = step.scan_value_and_grad(squared)(XS, YS)
    with pytest.raises(HostError, match="host refuses"):
        jax.block_until_ready(step.scan_value_and_grad(squared)(TOO_MUCH, YS))
    assert not any(v.is_deleted() for v in jax.tree.leaves((step.params, model.state)))
    with pytest.raises(CarryError, match=r"lost in a call that failed while it ran(.|\n)*step.reset\(\)"):
        step.scan_value_and_grad(squared)(XS, YS)
    step.reset()
    same(step.scan_value_and_grad(squared)(XS, YS), wanted)


@pytest.mark.by_xla
@pytest.mark.parametrize("kind", ["one step", "sequence", "learn"])
def test_a_check_for_nan_says_where_and_nothing_is_lost(kind):
    def leaky(p, s, x):
        h = jnp.tanh(0.9 * s["h"] + x @ p["w"])
        return {"h": h}, h @ p["u"]

    model = etcompile.from_function(leaky, {"w": W, "u": U}, {"h": jnp.zeros((BATCH, 4))})
    step = etcompile.compile(model, XS[0])
    square = lambda out, y: jnp.mean((out - y) ** 2)  # noqa: E731
    run = {
        "one step": lambda y: step.value_and_grad(square)(XS[0], y[0]),
        "sequence": lambda y: step.scan_value_and_grad(square)(XS, y),
        "learn": lambda y: step.learn(square, SGD)(XS, y),
    }[kind]
    for _ in range(3):
        run(YS)
    before = step.traces, jax.tree.map(jnp.array, (step.executor.live.states(), step.params))
    wrong = np.full(YS.shape, np.nan)
    with jax.debug_nans(True):
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                run(wrong)
    after = step.traces, (step.executor.live.states(), step.params)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    run(YS)
