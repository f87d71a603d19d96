"""What the table of ops says of each op, against what the op computes: linearity, structural zeros, rows."""

from __future__ import annotations

import collections
import copy

import jax
import numpy as np
import pytest
from language_rules import FILTERED, PRODUCTS
from numpy_evaluation import interpreted
from oracles import relative_error, time_slice
from references import compiled, fresh, step_of
from shared import shared
from zoo import by_name

from etcompile.errors import ProgramError
from etcompile.ir.kinds import KINDS, type_of
from etcompile.ir.ops import OPS
from etcompile.ir.program import Ref
from etcompile.ir.support import support
from etcompile.lowering import causal
from etcompile.lowering.evaluate import EVALUATE

pytestmark = pytest.mark.xdist_group("ops")  # they look at the same equations

RULES = [
    ("d_rtrl", {}), ("e_prop", {"kappa": 0.7, "normalize": True, "feedback": "random"}), ("pp_prop", {"rank": 3}), ("otpe", {}),
    ("osttp", {}), ("ostl", {}), ("snap", {}), ("uoro", {}), ("kf_rtrl", {}), ("compose", {"trace": "factored", "decay": 0.5}),
    (PRODUCTS, {}), (FILTERED, {}), ("dodge", {}), ("subset_rtrl", {"k": 2}), ("kf_rtrl", {"rank": 2}), ("rank_rtrl", {"rank": 2}),
    ("reward_e_prop", {}), ("kernl", {}),
]  # fmt: skip
#: What calls of some rules take beside inputs and targets.
CALLS = {"reward_e_prop": {"modulator": 0.5}}
#: Two rows in a group; three, and two layers.
MODELS = ["lstm", "two_spiking_layers_and_a_leaky_readout"]
PAIRS = [
    *((name, *rule) for k, name in enumerate(MODELS) for rule in (RULES if k < 1 else RULES[::4])),
    ("second_layer_reads_the_old_first", "e_prop", {"feedback": "random"}),
    ("lstm", "e_prop", {"feedback": "adaptive"}),
]


@shared
def equations(name, algo, options):
    """Every equation of the second step with its context, arguments and value, all of them numbers."""
    built = fresh(by_name(name))
    run = compiled(built, algo, **dict(options)).value_and_grad(built.loss_fn)
    found = []
    original = causal.evaluate

    def recording(context, wanted, known, previous):
        values = original(context, wanted, known, previous)

        def get(a):
            return (
                previous.get(a.name)
                if isinstance(a, Ref) and a.delay
                else values[a.name]
                if isinstance(a, Ref)
                else a
            )

        found.extend((context, e, [get(a) for a in e.args], values[e.name]) for e in wanted)
        return values

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(causal, "evaluate", recording)
        patch.setattr(causal, "updated_in_order", lambda context, values, old: {})
        for t in range(2):
            found.clear()
            run(time_slice(built.xs, t), *time_slice(tuple(built.targets), t), **CALLS.get(algo, {}))
    return list(found)


def of_all():
    """Equations of all programs, a few of each op on the same kinds of values."""
    seen = collections.Counter()
    for name, algo, options in PAIRS:
        for context, e, args, value in equations(name, algo, tuple(options.items())):
            kinds = (e.op, e.type.kind, *(context.program.equation(r.name).type.kind for r in e.refs))
            seen[kinds] += 1
            if seen[kinds] <= 3:
                yield context, e, args, value


def is_array(value):
    return value is None or isinstance(value, (jax.Array, np.ndarray))


def numeric(value):
    """Whether a value is an array, or rows of arrays and zeros: no operator, no list of what an operation reads."""
    return is_array(value) or (isinstance(value, tuple) and all(map(numeric, value)))


def drawn(rng, value):
    return jax.tree.map(lambda v: rng.normal(size=v.shape).astype(v.dtype), value)


def combined(a, b):
    return jax.tree.map(lambda x, y: 2 * np.asarray(x) - 3 * np.asarray(y), a, b)


def random_argument(rng, context, e, place, value):
    """Another value of the argument's kind, with its structural zeros."""
    kind = context.program.equation(e.args[place].name).type.kind
    return None if value is None or not numeric(value) or kind == "presynaptic" else drawn(rng, value)


def places(e):
    return range(len(e.args)) if OPS[e.op].together else OPS[e.op].linear


def values_of(context, e, args):
    """What an op makes of other arguments, traced once; what it kept of these is not asked."""
    context = copy.copy(context)
    context.reached = {}
    return interpreted(lambda changes: EVALUATE[e.op](context, e, replaced(args, changes)))


def replaced(args, changes):
    return [changes.get(k, a) for k, a in enumerate(args)]


def linear_in(op, changeable):
    """Arguments that are changed together."""
    if op.together:
        return [changeable] if len(changeable) == 2 else []
    return [[k] for k in changeable]


def test_linear_ops_are_linear():
    rng, tried = np.random.default_rng(0), set()
    for context, e, args, value in of_all():
        if not numeric(value):
            continue
        draws = {
            k: random_argument(rng, context, e, k, args[k]) for k in places(e) if isinstance(e.args[k], Ref)
        }
        for places_now in linear_in(OPS[e.op], [k for k, v in draws.items() if v is not None]):
            one = {k: draws[k] for k in places_now}
            two = {k: drawn(rng, v) for k, v in one.items()}
            value_at = values_of(context, e, args)
            of_one, of_two, of_both = value_at(one), value_at(two), value_at(combined(one, two))
            assert relative_error(of_both, combined(of_one, of_two)) < 1e-10, f"{e.op} in {places_now}"
            tried.add(e.op)
    assert tried >= {op.name for op in OPS.values() if op.linear or op.together} - {"outside", "copy"}


def test_structural_zeros_are_zero():
    tried = set()
    for pair in PAIRS:
        found = equations(pair[0], pair[1], tuple(pair[2].items()))
        tables = support(found[0][0].program)
        for _, e, _, value in found:
            if not KINDS[e.type.kind].rows:
                continue
            rows = value if value is not None else (None,) * e.type.shape[0]
            for can, entry in zip(
                jax.tree.leaves(tables[e.name]), jax.tree.leaves(rows, is_leaf=is_array), strict=True
            ):
                assert can or entry is None or not np.any(entry), f"{e.name} = {e.op}(...) of {pair}"
            tried.add(e.op)
    assert tried >= {op.name for op in OPS.values() if op.by_row} - {"copy", "div", "sub"}


def test_ops_by_rows_read_nothing_but_their_own_row():
    rng, tried = np.random.default_rng(1), set()
    for context, e, args, value in of_all():
        if not OPS[e.op].by_row or not isinstance(value, tuple) or not numeric(value):
            continue
        for k in range(len(value)):
            others = {
                place: tuple(v if j == k else drawn(rng, v) for j, v in enumerate(a))
                for place, (ref, a) in enumerate(zip(e.args, args, strict=True))
                if isinstance(ref, Ref) and not ref.delay and isinstance(a, tuple) and len(a) == len(value)
            }
            if e.op == "matmul" and isinstance(e.args[1], Ref) and not e.args[1].delay:
                continue  # a product with values of this step reads all their rows
            again = values_of(context, e, args)(others)
            assert relative_error(again[k], value[k]) < 1e-12, e.op
            tried.add(e.op)
    assert tried >= {"outer", "matmul", "add", "mul"}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_type_for_its_owner(name):
    header = step_of(by_name("lstm")).program.header
    full = compiled(fresh(by_name("lstm")), "rtrl").program.header
    owners = {
        "group": header.groups,
        "relation": header.relations,
        "site": header.sites,
        "layer": full.layers,
        "effect": full.effects,
    }
    of = owners[KINDS[name].owner][0].name if KINDS[name].owner else ""
    if name == "snap":  # of a shape that its op alone knows
        with pytest.raises(ProgramError, match="snap_immediate"):
            type_of(full, name, of)
    else:
        found = type_of(full if KINDS[name].every_path else header, name, of)
        assert (found.kind, found.of, len(found.shape) >= KINDS[name].rows) == (name, of, True)
