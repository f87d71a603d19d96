"""The IR: text, equality, verifier, pass manager, registry, and the optimisations that every rule gets."""

from __future__ import annotations

import dataclasses

import brainstate
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from references import compiled as compiled_case
from references import fresh, step_of, zoo_cases
from zoo import CASES, by_name

import etcompile
from etcompile import PassManager, parse_program
from etcompile.errors import AlgorithmError, OptionError, PassError, ProgramError
from etcompile.ir.verifier import verify
from etcompile.pass_api import Equation, Gradient, Ref, TraceProgram, algorithm
from etcompile.passes import DeadTraces, HoistParameters, ShareTraces

pytestmark = pytest.mark.usefixtures("by_numpy")

TOLERANCE = 1e-10


def compiled(name, **options):
    built = fresh(by_name(name))
    return compiled_case(built, **options), built


def gradients(name, **options):
    step, built = compiled(name, **options)
    return step.scan_value_and_grad(built.loss_fn)(built.xs[:4], *(t[:4] for t in built.targets))[1]


@pytest.fixture(scope="module")
def lstm() -> TraceProgram:
    return compiled("lstm")[0].program


# --- text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_programs_parse_back_from_their_print(case):
    program = step_of(case).program
    verify(program)
    again = parse_program(str(program))
    assert again == program
    assert hash(again) == hash(program)
    assert str(again) == str(program)


def test_compiling_twice_gives_the_same_program():
    one, two = compiled("lstm_gru")[0].program, compiled("lstm_gru")[0].program
    assert one == two
    assert hash(one) == hash(two)
    assert str(one) == str(two)
    assert len({one, two, compiled("gru")[0].program}) == 2


def test_programs_without_optimisation_parse_back_too():
    program = compiled("gru", optimise=False)[0].program
    assert parse_program(str(program)) == program
    assert program != compiled("gru")[0].program


def test_a_program_holds_plain_values_only(lstm):
    """No State, no jax variable, no array: it survives a copy by value."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return all(plain(getattr(value, f.name)) for f in dataclasses.fields(value))
        if isinstance(value, tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, (str, int, float, bool))

    assert plain(lstm)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("program ", "programme ", "line 1"),
        ("transition(g0)", "transition(g7)", "g7"),
        ("transition(", "transmission(", "transmission"),
        ("[t-1]", "[t-2]", "[t-1]"),
        ("signal(g0) ", "signal(g0, g0) ", "signal"),
    ],
)
def test_text_that_is_no_program(lstm, old, new, says):
    text = str(lstm)
    assert old in text
    with pytest.raises(ProgramError) as caught:
        parse_program(text.replace(old, new))
    assert says in str(caught.value)


def test_empty_text():
    with pytest.raises(ProgramError, match="empty"):
        parse_program("\n")


# --- verifier -------------------------------------------------------------------------------------------------------------


def with_equation(program, name, **changes):
    return dataclasses.replace(
        program,
        equations=tuple(
            dataclasses.replace(e, **changes) if e.name == name else e for e in program.equations
        ),
    )


def first(program, op):
    return next(e for e in program.equations if e.op == op)


def fails(program, *says):
    """The verifier refuses; every text of `says` is in the message; returns it."""
    with pytest.raises(ProgramError) as caught:
        verify(program)
    for text in says:
        assert text in str(caught.value)
    return str(caught.value)


def recurrence(program):
    """The equation of the first trace: it refers to itself one step back, by way of a product."""
    return next(e for e in program.equations if e.type.kind == "trace" and e.op == "add")


def test_undefined_name(lstm):
    e = recurrence(lstm)
    message = fails(with_equation(lstm, e.name, args=(Ref("nobody"), e.args[1])), "nobody[t] is not defined")
    assert f"-> {e.name}[t] = nobody[t]" in message


def test_name_defined_twice(lstm):
    e = recurrence(lstm)
    fails(dataclasses.replace(lstm, equations=(*lstm.equations, e)), f"{e.name} is defined twice")


def test_cycle_without_a_step_between(lstm):
    e = recurrence(lstm)
    product = next(p for p in lstm.equations if Ref(e.name, -1) in p.args and p.type.kind == "trace")
    broken = with_equation(lstm, product.name, args=tuple(Ref(e.name) if a == Ref(e.name, -1) else a for a in product.args))  # fmt: skip
    message = fails(broken, "a cycle needs a [t-1]")
    assert f"-> {product.name}[t] = " in message


def test_wrong_type(lstm):
    e = first(lstm, "outer")
    wrong = dataclasses.replace(e.type, dtype="f16")
    assert f"-> {e.name}[t] = " in fails(with_equation(lstm, e.name, type=wrong), "f16", str(e.type))
    f, x = first(lstm, "immediate"), first(lstm, "presynaptic")
    message = fails(
        with_equation(lstm, first(lstm, "outer").name, args=(Ref(x.name), Ref(f.name))), "outer takes"
    )
    assert "-> " in message


def test_unknown_op(lstm):
    e = first(lstm, "outer")
    assert f"-> {e.name}[t] = inner(" in fails(with_equation(lstm, e.name, op="inner"), "no op 'inner'")


def test_reference_to_a_later_step(lstm):
    e = recurrence(lstm)
    fails(
        with_equation(lstm, e.name, args=(Ref(e.args[0].name, 1), e.args[1])),
        "neither of this step nor of the one before",
    )


def test_carried_value_that_depends_on_the_loss(lstm):
    signal = first(lstm, "signal")
    memory = Equation("m", "add", (Ref("m", -1), Ref(signal.name)), signal.type)
    message = fails(
        dataclasses.replace(lstm, equations=(*lstm.equations, memory)), "m is carried and depends on the loss"
    )
    assert "-> m[t] = m[t-1] + " in message


def test_missing_gradient(lstm):
    site = lstm.gradients[0].site
    broken = dataclasses.replace(lstm, gradients=tuple(g for g in lstm.gradients if g.site != site))
    fails(broken, lstm.header.site(site).params[0], "gets no gradient", f"grad {site} += ")


def test_gradient_of_another_site(lstm):
    one, other = lstm.gradients[0], next(g for g in lstm.gradients if g.site != lstm.gradients[0].site)
    broken = dataclasses.replace(lstm, gradients=(*lstm.gradients, Gradient(one.site, other.value)))
    fails(broken, f"the gradient of {one.site}")


def test_gradient_of_an_undefined_value(lstm):
    broken = dataclasses.replace(
        lstm, gradients=(*lstm.gradients, Gradient(lstm.gradients[0].site, Ref("G99")))
    )
    fails(broken, "G99")


# --- pass manager -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Liar:
    """Says that it keeps the gradients; `how` tells what it does instead."""

    how: str
    name: str = "liar"
    preserves: str = "gradients"

    def __call__(self, program):
        if self.how == "drop":
            traced = {g.site for g in program.gradients if program.equation(g.value.name).op == "contract"}
            kept = tuple(g for g in program.gradients if not (g.site in traced and program.equation(g.value.name).op == "contract"))  # fmt: skip
            return dataclasses.replace(program, gradients=kept)
        if self.how == "double":
            g = program.gradients[0]
            twice = Equation("twice", "mul", (2.0, g.value), program.equation(g.value.name).type)
            return dataclasses.replace(
                program,
                equations=(*program.equations, twice),
                gradients=(Gradient(g.site, Ref("twice")), *program.gradients[1:]),
            )
        if self.how == "forget":
            e = recurrence(program)
            return with_equation(program, e.name, op="sub")
        if self.how == "raise":
            raise ZeroDivisionError("inside the pass")
        if self.how == "nothing":
            return program
        if self.how == "none":
            return None
        e = recurrence(program)  # "break"
        return with_equation(program, e.name, args=(Ref("nobody"), e.args[1]))


@pytest.mark.parametrize("how", ["drop", "double", "forget"])
def test_a_pass_that_lies_about_the_gradients_is_caught(how):
    with pytest.raises(PassError, match=r"pass liar \(after d_rtrl\).*preserves='gradients'.*weight"):
        compiled("gru", algo=["d_rtrl", Liar(how)], manager=PassManager(check=True, tolerance=1e-9))


@pytest.mark.parametrize("effect", ["approximates", "changes"])
def test_a_pass_that_says_so_may_change_them(effect):
    honest = dataclasses.replace(Liar("double"), preserves=effect)
    step, _ = compiled("gru", algo=["d_rtrl", honest], manager=PassManager(check=True))
    assert "twice" in str(step.program)


def test_failures_name_the_pass_and_its_predecessors():
    for how, says in {
        "raise": "ZeroDivisionError: inside the pass",
        "none": "NoneType",
        "break": "-> ",
    }.items():
        with pytest.raises(PassError) as caught:
            compiled("gru", algo=["d_rtrl", HoistParameters(), Liar(how)])
        assert "pass liar (after d_rtrl, hoist_parameters)" in str(caught.value)
        assert says in str(caught.value)
    with pytest.raises(PassError) as caught:
        compiled("gru", algo=["d_rtrl", Liar("break")])
    assert "nobody[t] is not defined" in str(caught.value)


@pytest.mark.parametrize("name", ["lstm", "masked_weight", "learned_time_constants", "readout_of_the_old_state"])  # fmt: skip
def test_the_shipped_optimisations_keep_what_they_declare(name):
    step, _ = compiled(name, manager=PassManager(check=True, tolerance=1e-9))
    assert [r.name for r in step.passes] == [
        "d_rtrl",
        "hoist_parameters",
        "collapse_constant_decay",
        "share_traces",
        "dead_traces",
    ]
    assert relative_error(gradients(name), gradients(name, optimise=False)) < TOLERANCE


def test_records():
    step, _ = compiled("lstm", algo=["d_rtrl", Liar("nothing")])
    records = {r.name: r for r in step.passes}
    assert list(records) == [
        "d_rtrl",
        "liar",
        "hoist_parameters",
        "collapse_constant_decay",
        "share_traces",
        "dead_traces",
    ]
    assert records["d_rtrl"].changed
    assert not records["liar"].changed
    assert records["liar"].before == records["liar"].after == records["d_rtrl"].after
    assert records["d_rtrl"].before == 0
    assert records["dead_traces"].after == len(step.program.equations)
    assert all(r.seconds >= 0 for r in records.values())


@pytest.mark.parametrize("when", ["all", "changes", None])
def test_print_after(when, capsys):
    printed = []
    step, _ = compiled("gru", algo=["d_rtrl", Liar("nothing")], manager=PassManager(print_after=when, emit=printed.append))  # fmt: skip
    wanted = {
        "all": [r.name for r in step.passes],
        "changes": [r.name for r in step.passes if r.changed],
        None: [],
    }
    assert [text.split("\n")[0] for text in printed] == [f"# after {name}" for name in wanted[when]]
    if printed:
        assert parse_program(printed[-1].split("\n", 1)[1]).header == step.program.header
    assert capsys.readouterr().out == ""


def test_a_diff_after_every_pass_that_changed_something_leads_from_program_to_program():
    printed, whole = [], []
    step, _ = compiled("gru", manager=PassManager(print_after="diff", emit=printed.append))
    compiled("gru", manager=PassManager(print_after="changes", emit=whole.append))
    assert [text.split("\n")[0] for text in printed] == [text.split("\n")[0] for text in whole]
    before = None
    for diff, after in zip(printed, whole, strict=True):
        lines, after = diff.splitlines()[1:], after.splitlines()[1:]
        assert lines[0].startswith("--- ") and lines[1].startswith("+++ ")
        assert {line[1:] for line in lines[2:] if line[0] == "+"} <= set(after)
        if before is not None:
            taken = [line[1:] for line in lines[2:] if line[0] == "-"]
            put = [line[1:] for line in lines[2:] if line[0] == "+"]
            assert sorted([*before, *put]) == sorted([*after, *taken])
        before = after
    assert before == str(step.program).splitlines()


def test_print_after_goes_to_standard_output_by_default(capsys):
    compiled("indrnn", manager=PassManager(print_after="all"))
    assert "# after d_rtrl\nprogram d_rtrl" in capsys.readouterr().out


def test_manager_options():
    with pytest.raises(OptionError, match="print_after"):
        PassManager(print_after="sometimes")
    with pytest.raises(OptionError, match="'perhaps'"):
        compiled("indrnn", algo=["d_rtrl", dataclasses.replace(Liar("nothing"), preserves="perhaps")])
    with pytest.raises(OptionError, match="not a pass"):
        compiled("indrnn", algo=["d_rtrl", lambda program: program])


# --- optimisations ------------------------------------------------------------------------------------------------------------


@algorithm("test_twice", exact="uncut")
def twice(p):
    """D-RTRL that keeps every trace two times, and one that nobody reads."""
    for r in p.relations:
        transition = p.transition(r.group)
        e = p.recur(decay=transition, inject=p.outer(r))
        again = p.recur(decay=transition, inject=p.outer(r))
        p.recur(decay=0.5, inject=p.outer(r), name=f"dead_{r.name}")
        credit = p.signal(r.group) @ transition
        p.gradient(r, p.contract(credit, 0.25 * e.prev), within="one_step")
        p.gradient(r, p.contract(credit, 0.75 * again.prev), within="one_step")


def test_equal_traces_are_shared_and_dead_ones_removed():
    plain, _ = compiled("lstm")
    for options in ({}, {"optimise": False}):
        step, _ = compiled("lstm", algo="test_twice", **options)
        carried = [name for name in step.program.carried if step.program.equation(name).type.kind == "trace"]
        factor = 1 if not options else 3
        assert len(carried) == factor * len(plain.program.carried)
        assert any(name.startswith("dead") for name in carried) is bool(options)
        assert relative_error(gradients("lstm", algo="test_twice", **options), gradients("lstm")) < TOLERANCE


def test_traces_that_differ_are_not_shared():
    @algorithm("test_two_decays")
    def two_decays(p):
        for r in p.relations:
            slow = p.recur(decay=0.9, inject=p.outer(r))
            fast = p.recur(decay=0.5, inject=p.outer(r))
            p.gradient(r, p.contract(p.signal(r.group), slow + fast))

    program = compiled("indrnn", algo="test_two_decays")[0].program
    for name in ("0.9", "0.5"):
        assert name in str(program)
    optimised, plain = gradients("indrnn", algo="test_two_decays"), gradients("indrnn", algo="test_two_decays", optimise=False)  # fmt: skip
    assert relative_error(optimised, plain) < TOLERANCE


def test_sharing_and_removing_are_idempotent(lstm):
    for item in (ShareTraces(), DeadTraces(), HoistParameters()):
        assert item(lstm) == lstm


@pytest.mark.parametrize("name", ["masked_weight", "weight_norm", "low_rank_adapter", "sum_of_weights", "softmax_weight"])  # fmt: skip
def test_hoisting_keeps_the_gradients(name):
    plain, built = compiled(name, algo="d_rtrl", optimise=False)
    hoisted, _ = compiled(name, algo=["d_rtrl", HoistParameters()], optimise=False)
    assert not any(s.hoisted for s in plain.program.header.sites)
    assert all(s.hoisted for s in hoisted.program.header.sites)
    data = (built.xs[:4], *(t[:4] for t in built.targets))
    wanted = plain.scan_value_and_grad(built.loss_fn)(*data)
    assert relative_error(hoisted.scan_value_and_grad(built.loss_fn)(*data), wanted) < TOLERANCE


# --- registry -------------------------------------------------------------------------------------------------------------------


@algorithm("test_e_prop")
def e_prop(p, kappa=0.9):
    """The example of the documentation, word for word."""
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        ebar = p.recur(decay=kappa, inject=(1 - kappa) * e)
        p.gradient(r, p.contract(p.signal(r.group), ebar))


def small():
    class Leaky(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            rng = np.random.default_rng(0)
            self.w, self.a, self.v = (brainstate.ParamState(jnp.asarray(rng.normal(size=s))) for s in ((3, 4), (4,), (4, 2)))  # fmt: skip
            self.h = brainstate.HiddenState(jnp.asarray(rng.normal(size=(2, 4))))

        def update(self, x):
            self.h.value = jnp.tanh(self.a.value * self.h.value + x @ self.w.value)
            return self.h.value @ self.v.value

    return Leaky()


XS = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2, 3)))


def learn_small(**options):
    step = etcompile.compile(small(), XS[0], **options)
    return step, step.scan_value_and_grad(lambda out: jnp.sum(out**2))(XS)[1]


def test_e_prop_filters_the_trace():
    """Against the equations in plain numpy: e = D e + f x, ebar = kappa ebar + (1 - kappa) e, grad = L ebar."""
    step, grads = learn_small(algo="test_e_prop", kappa=0.7)
    assert not step.exact
    model = small()
    w, a, v, h = (np.asarray(s.value) for s in (model.w, model.a, model.v, model.h))
    e, ebar = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    wanted, readout = np.zeros((3, 4)), np.zeros((4, 2))
    for x in np.asarray(XS):
        h = np.tanh(a * h + x @ w)
        slope = 1 - h**2
        e = (slope * a)[:, None, :] * e + x[:, :, None] * slope[:, None, :]
        ebar = 0.7 * ebar + 0.3 * e
        out = h @ v
        signal = 2 * out @ v.T
        wanted += (signal[:, None, :] * ebar).sum(0)
        readout += 2 * h.T @ out
    assert relative_error(grads["w"], wanted) < TOLERANCE
    assert relative_error(grads["v"], readout) < TOLERANCE


@pytest.mark.slow
def test_e_prop_without_a_filter_is_d_rtrl():
    names = ["gru", "lstm", "gru_gru", "lif_exponential", "readout_of_the_old_state", "readout_of_old_and_new_state", "gates_partly_unused"]  # fmt: skip
    for name in names:
        assert relative_error(gradients(name, algo="test_e_prop", kappa=0.0), gradients(name)) < TOLERANCE, (
            name
        )
        assert relative_error(gradients(name, algo="test_e_prop", kappa=0.9), gradients(name)) > 1e-4, name


def test_a_filtered_trace_carries_less_of_the_first_step():
    _, one = learn_small(algo="test_e_prop", kappa=0.5)
    _, two = learn_small(algo="test_e_prop")
    assert relative_error(one, two) > 1e-3


def test_rules_by_name_object_and_list():
    _, wanted = learn_small(algo="test_e_prop", kappa=0.3)
    for algo in (e_prop(kappa=0.3), [e_prop(kappa=0.3)], [e_prop(kappa=0.3), Liar("nothing")]):
        assert relative_error(learn_small(algo=algo)[1], wanted) == 0.0
    _, default = learn_small(algo=e_prop)
    assert relative_error(learn_small(algo=["test_e_prop"])[1], default) == 0.0
    assert relative_error(learn_small(algo=e_prop, kappa=0.3)[1], wanted) == 0.0
    assert e_prop(kappa=0.3) == e_prop(kappa=0.3) != e_prop(kappa=0.4)
    assert "word for word" in (e_prop.__doc__ or "")


def test_names():
    assert {"d_rtrl", "test_e_prop"} <= set(etcompile.algorithm_names())
    with pytest.raises(AlgorithmError, match="did you mean 'test_e_prop'"):
        learn_small(algo="test_eprop")
    with pytest.raises(OptionError, match="exact"):
        algorithm("test_other", exact="perhaps")


def test_a_name_registered_again_replaces_the_rule():
    @algorithm("test_replaced")
    def one(p):
        """Within the step only."""

    _, before = learn_small(algo="test_replaced")

    @algorithm("test_replaced")
    def two(p):
        for r in p.relations:
            e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
            p.gradient(r, p.contract(p.signal(r.group), e))

    _, after = learn_small(algo="test_replaced")
    assert relative_error(after, learn_small()[1]) < TOLERANCE
    assert relative_error(before, after) > 1e-3
    assert relative_error(learn_small(algo=one)[1], before) == 0.0


def test_map_takes_any_function():
    @algorithm("test_map")
    def clipped(p, limit=0.1):
        for r in p.relations:
            e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
            p.gradient(r, p.contract(p.map(lambda v: jnp.clip(v, -limit, limit), p.signal(r.group)), e))

    step, grads = learn_small(algo="test_map", limit=1e9)
    assert relative_error(grads, learn_small()[1]) < TOLERANCE
    assert parse_program(str(step.program)) == step.program
    # two values of one option are two functions, whatever was compiled before
    small_limit = learn_small(algo="test_map", limit=1e-3)[1]
    assert relative_error(small_limit["w"], grads["w"]) > 0.1
    assert relative_error(learn_small(algo="test_map", limit=1e9)[1], grads) == 0.0


def test_rules_that_cannot_be_written():
    def compile_rule(write):
        return lambda: learn_small(algo=algorithm("test_broken")(write))

    def wrong_gradient(p):
        p.gradient(p.relations[0], p.outer(p.relations[0]))

    def twice_back(p):
        e = p.recur(decay=0.5, inject=p.outer(p.relations[0]))
        e.prev.prev  # noqa: B018

    def mixed(p):
        for r, within in zip(p.relations, ("rest", "one_step"), strict=False):
            del r
            e = p.recur(decay=0.5, inject=p.outer(p.relations[0]))
            p.gradient(p.relations[0], p.contract(p.signal("g0"), e), within=within)

    def unknown_group(p):
        p.transition("g9")

    def mistyped(p):
        p.signal("g0") + p.transition("g0")

    for write, says in {
        wrong_gradient: "must be a gradient of its site",
        twice_back: "one step back",
        mixed: "different credit within the step",
        unknown_group: "g9",
        mistyped: "same type",
    }.items():
        with pytest.raises(ProgramError) as caught:
            compile_rule(write)()
        assert says in str(caught.value)


def test_an_error_inside_a_rule_names_the_rule():
    @algorithm("test_raises")
    def rule(p):
        raise IndexError("of the rule's author")

    with pytest.raises(PassError, match=r"pass test_raises .*IndexError: of the rule's author"):
        learn_small(algo="test_raises")


def test_exactness_is_a_claim_of_the_rule():
    @algorithm("test_always", exact="always")
    def always(p):
        pass

    assert learn_small(algo="test_always")[0].exact
    assert not learn_small(algo="test_e_prop")[0].exact
    assert learn_small()[0].exact
    assert not compiled("gru")[0].exact
