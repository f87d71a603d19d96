"""Calls in a row: what one of them leaves out since nothing changed, the next one sees where something did."""

from __future__ import annotations

import collections
import warnings

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u
from test_reset import XS, YS, draw, fresh, same, squared

import etcompile
from etcompile.errors import CarryError, EtcompileWarning, ForeignWriteWarning, InputError
from etcompile.frontend.captured import Captured
from etcompile.runtime import gradients
from etcompile.runtime.jitted import Jitted, NotSeen

SCALE = 1.0


class Weigher:
    """Slots, a property and a list: kinds of places where a loss finds a number."""

    __slots__ = ("held", "slot")

    def __init__(self):
        self.slot, self.held = 1.0, [1.0]

    @property
    def product(self):
        return self.slot * self.held[0]


class Answers:
    """Says itself what its attributes are, and knows of no others."""

    def __init__(self):
        vars(self)["fields"] = {"scale": 1.0}

    def __getattr__(self, name):
        return self.fields[name]


class Base:
    scale, offset = 1.0, 0.0

    def weigh(self, value):
        return self.scale * value + self.offset

    def __getitem__(self, place):
        return self.scale

    @classmethod
    def of_class(cls):
        return cls.scale


class Derived(Base):
    def weigh(self, value):
        return super().weigh(value)


class Doubled:
    """A descriptor of somebody else's."""

    def __get__(self, owner, kind=None):
        return vars(owner).get("kept", 1.0)

    def __set__(self, owner, value):
        vars(owner)["kept"] = value


class Described:
    scale = Doubled()


def kinds_of_places():
    """By name: what a loss multiplies with, and how another number gets there."""
    row, answers, derived, own = collections.deque([1.0]), Answers(), Derived(), Derived()
    length, described, class_of = u.Quantity(np.ones(1)), Described(), type("Of", (Base,), {"scale": 1.0})
    of_class = type("OfClass", (Base,), {"scale": 1.0})()
    return {
        "deque": (lambda: row[0], lambda v: row.__setitem__(0, v)),
        "__getattr__": (lambda: answers.scale, lambda v: answers.fields.update(scale=v)),
        "super": (lambda: derived.weigh(1.0), lambda v: setattr(derived, "scale", v)),
        "an operator": (lambda: own[0], lambda v: setattr(own, "scale", v)),
        "a method of a class": (lambda: class_of.of_class(), lambda v: setattr(class_of, "scale", v)),
        "the same of an object": (lambda: of_class.of_class(), lambda v: setattr(type(of_class), "scale", v)),
        "a quantity": (lambda: u.get_magnitude(length)[0], lambda v: length.mantissa.__setitem__(0, v)),
        "a descriptor": (lambda: described.scale, lambda v: setattr(described, "scale", v)),
    }


@pytest.mark.parametrize("kind", kinds_of_places())
def test_numbers_are_seen_in_all_kinds_of_places(kind):
    read, put = kinds_of_places()[kind]
    step = fresh()
    run = step.value_and_grad(lambda out, target: read() * squared(out, target))

    def first():
        step.reset()
        return float(run(XS[0], YS[0])[0])

    one = [first() for _ in range(3)]
    put(3.0)
    assert first() == pytest.approx(3 * one[0]) and one == one[:1] * 3


def test_what_a_loss_finds_is_seen_wherever_it_lies():
    weigher, table, array, closed = Weigher(), {"a": 1.0}, np.ones(2), 1.0

    def loss(out, target, *, more={"b": 1.0}):  # noqa: B006
        numbers = weigher.product * table["a"] * array[0] * closed * SCALE * more["b"]
        return numbers * squared(out, target)

    def globally(value):
        global SCALE
        SCALE = value

    def closed_over(value):
        nonlocal closed
        closed = value

    places = [
        lambda v: setattr(weigher, "slot", v),
        lambda v: weigher.held.__setitem__(0, v),
        lambda v: table.__setitem__("a", v),
        lambda v: array.__setitem__(0, v),
        lambda v: loss.__kwdefaults__["more"].__setitem__("b", v),
        globally,
        closed_over,
    ]
    step = fresh()
    run = step.value_and_grad(loss)
    plain = fresh().value_and_grad(squared)(XS[0], YS[0])[0]
    for put in places:
        for value in (1.0, 3.0, 3.0, 1.0):
            put(value)
            step.reset()
            same(run(XS[0], YS[0])[0], value * plain)


def test_functions_that_get_another_body_are_compiled_again():
    """As where an interactive shell loads a module anew: the loss and its helper stay, their code and defaults do not."""

    def helper(error, factor=1.0):
        return factor * jnp.sum(error**2)

    def loss(out, target):
        return helper(out - target)

    def other(out, target):
        return helper(out - target) + 1.0

    step = fresh()
    run = step.value_and_grad(loss)
    plain = [fresh().value_and_grad(f)(XS[0], YS[0])[0] for f in (loss, other)]
    code = loss.__code__
    for replaced in (other.__code__, code):
        for factor in (1, 1.0, 3.0):
            loss.__code__, helper.__defaults__ = replaced, (factor,)
            for _ in range(2):
                step.reset()
                added = float(plain[1] - plain[0]) if replaced is not code else 0.0
                same(run(XS[0], YS[0])[0], factor * plain[0] + added)


def test_a_function_that_finds_the_same_is_not_walked_again():
    held, table = draw(0, 3), {"a": 2.0}
    followed = Captured(lambda x: x * held * table["a"] * SCALE)
    key = followed.key()
    assert followed.unchanged() and followed.key() is not None
    table["a"] = 3.0
    assert not followed.unchanged() and followed.key() != key
    table["a"] = 2.0
    assert followed.key() == key
    watched = np.ones(3)
    assert Captured(lambda x: x * watched).key() and not Captured(lambda x: x * watched).unchanged()


@pytest.mark.parametrize("globally", [False, True])
def test_hooks_of_the_user_are_told_of_every_read_and_write(globally):
    step = fresh()
    run, told = step.value_and_grad(squared), []
    run(XS[0], YS[0])
    state, weight = step.executor.live.state_objects["h"], step.param_states["w"]

    def note(context):
        if not globally or context.state in (state, weight):
            told.append((context.operation, context.state is state))

    register = brainstate.register_state_hook if globally else None
    handles = [
        (register or owner.register_hook)(kind, note)
        for kind in ("read", "write_before", "write_after")
        for owner in ((state,) if globally else (state, weight))
    ]
    try:
        run(XS[1], YS[1])
        assert {("read", True), ("read", False), ("write_before", True), ("write_after", True)} <= set(told)
    finally:
        for handle in handles:
            handle.remove()
    told.clear()
    run(XS[2], YS[2])
    assert not told


def test_a_hook_that_changes_what_is_written_is_heeded():
    step = fresh()
    step(XS[0])
    state = step.executor.live.state_objects["h"]

    def halve(context):
        context.transformed_value = 0.5 * context.value

    state.register_hook("write_before", halve)
    out = step(XS[1])
    same(state.value, 0.5 * out)


class Counted(brainstate.HiddenState):
    """A kind of state that says what it holds in another way."""

    @property
    def value(self):
        return brainstate.HiddenState.value.fget(self)

    @value.setter
    def value(self, v):
        vars(self)["writes"] = vars(self).get("writes", 0) + 1
        brainstate.HiddenState.value.fset(self, v)


def test_a_state_with_a_value_of_its_own_kind_is_asked_for_it():
    class Leaky(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.h = brainstate.ParamState(draw(1, 3)), Counted(jnp.zeros(3))

        def update(self, x):
            self.h.value = 0.9 * self.h.value + self.w.value * x
            return self.h.value

    step = etcompile.compile(Leaky(), jnp.ones(3))
    for _ in range(2):
        step(jnp.ones(3))
    before = vars(step.executor.live.state_objects["h"])["writes"]
    step(jnp.ones(3))
    assert vars(step.executor.live.state_objects["h"])["writes"] == before + 1


@pytest.mark.parametrize(
    "wrong", ["text", np.array(["a"]), XS[0][:, :2], XS[0][None], XS[0] + 1j, [XS[0], XS[0]], iter([1])]
)
def test_an_input_that_does_not_fit_is_said_after_calls_that_did(wrong):
    step = fresh()
    gradient = step.value_and_grad(squared)
    step(XS[0]), gradient(XS[0], YS[0])
    held = step.executor.live.states()["h"]
    for call in (lambda: step(wrong), lambda: gradient(wrong, YS[0])):
        with pytest.raises(InputError):
            call()
    assert step.executor.live.states()["h"] is held
    assert gradient(XS[1], YS[1])[1]["w"].shape == (3, 4)


@pytest.mark.by_xla
def test_all_is_looked_at_only_where_something_is_another(monkeypatch):
    step = fresh()
    run, executor = step.value_and_grad(squared), step.executor
    looked, follow = [], executor.follow_environment
    monkeypatch.setattr(executor, "follow_environment", lambda: (looked.append(1), follow())[1])

    def in_full(do):
        looked.clear()
        do()
        return bool(looked)

    def forward():
        return in_full(lambda: step(XS[0]))

    def gradient():
        return in_full(lambda: (run(XS[0], YS[0]), over(XS, YS), over(XS[:3], YS[:3])))

    over = step.scan_value_and_grad(squared)
    state, weight = executor.live.state_objects["h"], step.param_states["w"]
    changes = {
        "reset": step.reset,
        "another value": lambda: setattr(state, "value", state.value + 0),
        "traces seen": lambda: step.traces_state.value,
        "a hook": lambda: weight.register_hook("read", lambda context: None),
        "another size": lambda: step(XS[0][:1]),
    }
    for _ in range(2):  # the second state has another type than the first: it is not weak
        forward(), gradient()
    assert not forward() and not gradient()
    step.params = {path: 2 * value for path, value in step.params.items()}
    assert not forward() and not gradient()
    for name, change in changes.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ForeignWriteWarning)
                change()
        except InputError:
            assert name == "another size" and not forward()
            continue
        assert forward(), name
        weight.clear_hooks()
        forward()
        assert not forward() and not gradient(), name


def test_sequences_in_a_row_are_as_good_as_the_first():
    """With another length, mean, mask, loss, weights and states in between, and of a loss that counts its steps."""
    count = brainstate.ShortTermState(jnp.zeros(()))
    factor = [1.0]

    def counting(out, target):
        count.value += 1
        return factor[0] * squared(out, target) * count.value

    def run(again):
        """All calls of a step; with ``again`` by functions that ran before, else by new ones."""
        step, found = fresh(), []
        count.value, factor[0] = jnp.zeros(()), 1.0
        kept = {}

        def call(loss, *data, **options):
            mask = options.pop("mask", None)
            key = loss, *options.items()
            made = step.scan_value_and_grad(loss, **options)
            found.append((kept.setdefault(key, made) if again else made)(*data, mask=mask))

        for _ in range(3):
            for loss in (squared, counting):
                call(loss, XS, YS)
                call(loss, XS, YS, reduction="mean")
                call(loss, XS[:3], YS[:3], chunk=2)
                call(loss, XS, YS, mask=jnp.arange(len(XS)) % 2)
                call(loss, XS, YS)
            step.params = jax.tree.map(lambda v: 1.1 * v, step.params)
            factor[0] += 1
        step.reset()
        call(squared, XS, YS)
        return found, count.value

    same(run(True), run(False))


@pytest.mark.parametrize("wrong", [XS[:, :, :2], XS[0], XS[:2], "text"])
def test_a_sequence_that_does_not_fit_is_said_after_sequences_that_did(wrong):
    step = fresh()
    run = step.scan_value_and_grad(squared)
    run(XS, YS), run(XS, YS)
    held = step.executor.live.states()["h"]
    with pytest.raises(InputError):
        run(wrong, YS)
    assert step.executor.live.states()["h"] is held
    same(run(XS, YS)[1]["w"].shape, (3, 4))


@pytest.mark.by_xla
def test_no_sequence_is_traced_again_where_two_lengths_take_turns(monkeypatch):
    step = fresh()
    run = step.scan_value_and_grad(squared)
    lengths = (2, len(XS))
    for _ in range(3):
        for n in lengths:
            run(XS[:n], YS[:n])
    made = []
    monkeypatch.setattr(gradients, "_sequence", lambda *args: made.append(args))
    monkeypatch.setattr(NotSeen, "__init__", lambda error: made.append(error))
    found = [run(XS[:n], YS[:n]) for n in lengths]
    assert not made and [len(losses) for losses, _ in found] == [*lengths]


@pytest.mark.by_xla
def test_a_parameter_that_was_deleted_costs_no_traces():
    step, other = fresh(), fresh()
    runs = [s.value_and_grad(squared) for s in (step, other)]
    for run in runs:
        for x, y in zip(XS, YS, strict=True):
            run(x, y)
    kept = jax.tree.map(jnp.copy, step.params)
    step.params["w"].delete()
    with pytest.raises(CarryError, match=r"parameter w(.|\n)*step.params = "):
        runs[0](XS[0], YS[0])
    step.params = kept
    same(*(run(XS[0], YS[0])[1] for run in runs))


class Listed(brainstate.nn.Module):
    """Cells in a list, a dict and a tuple."""

    def __init__(self):
        super().__init__()
        self.cells = [Leaky(), {"b": (Leaky(),)}]

    def update(self, x):
        return self.cells[1]["b"][0](self.cells[0](x))


class Leaky(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.h = brainstate.ParamState(draw(1, 3)), brainstate.HiddenState(jnp.zeros(3))

    def update(self, x):
        self.h.value = 0.9 * self.h.value + self.w.value * x
        return self.h.value


def test_a_state_replaced_inside_of_a_list_is_seen():
    model = Listed()
    step = etcompile.compile(model, jnp.ones(3))
    for _ in range(3):
        step(jnp.ones(3))
    found = step.executor.live.holders
    assert found.linked(model) and not found.linked(Listed())
    model.cells[1]["b"][0].w = brainstate.ParamState(jnp.full(3, 2.0))
    assert not found.linked(model)
    first, last = (cell.h.value for cell in (model.cells[0], model.cells[1]["b"][0]))
    out = step(jnp.ones(3))
    same(out, 0.9 * last + 2.0 * (0.9 * first + model.cells[0].w.value))
    model.cells[0] = model.cells[1]
    assert not step.executor.live.holders.linked(model)


class Shared(brainstate.nn.Module):
    """A state that lies in the class, so that no dict of the module says which one it is."""

    kept = None

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(draw(1, 3))

    @property
    def h(self):
        return type(self).kept

    def update(self, x):
        self.h.value = 0.9 * self.h.value + self.w.value * x
        return self.h.value


def test_entries_that_come_go_and_change_from_call_to_call():
    model = Listed()
    step, first = etcompile.compile(model, jnp.ones(3)), model.cells[0]
    for _ in range(3):
        step(jnp.ones(3))
    unchanged = step.executor._unchanged
    for k, change in enumerate(
        [
            lambda: setattr(model, "note", 0),  # the last entry of a dict comes, changes and goes
            lambda: setattr(model, "note", 1),
            lambda: delattr(model, "note"),
            lambda: model.cells.append(None),
            lambda: model.cells.pop(),
        ]
    ):
        change()
        assert not unchanged._looked_up._entries.same()
        before = first.h.value
        step(jnp.full(3, float(k)))
        same(first.h.value, 0.9 * before + k * first.w.value)
        assert step.executor._unchanged is unchanged  # the call was not made in full
        assert unchanged._looked_up._entries.same()
    model.cells[0] = Leaky()
    with pytest.raises(CarryError, match=r"state cells\.0\.h of Listed was reset"):
        step(jnp.ones(3))


def test_a_state_that_no_dict_of_the_module_holds_is_looked_for_at_every_call():
    Shared.kept = brainstate.HiddenState(jnp.zeros(3))
    model = Shared()
    step = etcompile.compile(model, jnp.ones(3))
    for _ in range(3):
        step(jnp.ones(3))
    before = Shared.kept.value
    step(jnp.ones(3))
    same(Shared.kept.value, 0.9 * before + model.w.value)


class Weighed:
    def __init__(self):
        self.weight = 1.0

    def loss(self, out, target):
        return self.weight * squared(out, target)


def test_an_attribute_is_not_taken_for_what_the_module_has_under_its_name(monkeypatch):
    monkeypatch.setattr("etcompile.frontend.captured._LIMIT", 20)
    many = [[k] for k in range(100)]
    monkeypatch.setitem(globals(), "loss", lambda: many)
    monkeypatch.setitem(globals(), "weight", lambda: many)
    weighed, step = Weighed(), fresh()
    gradient = step.value_and_grad(weighed.loss)
    first, _ = gradient(XS[0], YS[0])
    step.reset()
    weighed.weight = 2.0
    again, _ = gradient(XS[0], YS[0])
    assert again == pytest.approx(2 * first)


def test_a_loss_that_reaches_too_much_to_follow_is_said(monkeypatch):
    monkeypatch.setattr("etcompile.frontend.captured._LIMIT", 20)
    many = [[k] for k in range(100)]
    gradient = fresh().value_and_grad(lambda out, target: many[1][0] * squared(out, target))
    with pytest.warns(EtcompileWarning, match="more than 20 values .* as a target"):
        gradient(XS[0], YS[0])
    gradient(XS[0], YS[0])


@pytest.mark.by_xla
def test_an_interrupted_call_is_named_by_later_ones(monkeypatch):
    step = fresh()
    run = step.value_and_grad(squared)
    for _ in range(3):
        run(XS[0], YS[0])
    again = Jitted.again

    def interrupted(*args):
        again(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Jitted, "again", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(XS[0], YS[0])
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(CarryError, match="KeyboardInterrupt"):
            run(XS[0], YS[0])
    step.reset()
    run(XS[0], YS[0])
