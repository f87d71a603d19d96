"""Run groups of cases on eight host devices and on one of them, and print how far the numbers are apart.

python tests/sharding_run.py GROUP...: one line of JSON, from groups to names of cases to a difference or to what went wrong.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import traceback

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sharding_models import compiled, data, difference, over, square, states

import etcompile
from etcompile.lowering.losses import Loss

SHAPES = [(4, 2), (8, 1), (1, 8)]
#: Rules with each kind of carried value.
RULES = [
    ("e_prop", {"kappa": 0.7, "feedback": "adaptive"}), ("pp_prop", {}), ("uoro", {}), ("kf_rtrl", {}), ("rank_rtrl", {}), ("snap", {}),
]  # fmt: skip


def sequence(model, schedule, chunk, **options):
    step = compiled(model, schedule, **options)
    xs, ys = data(model)
    found = step.scan_value_and_grad(square, chunk=chunk)(xs, ys)
    return step, (found, states(step))


@functools.cache
def on_one_device(model, chunk, options):
    return sequence(model, None, chunk, **dict(options))[1]


def apart(model, schedule, chunk=None, **options):
    _, found = sequence(model, schedule, chunk, **options)
    return difference(found, on_one_device(model, chunk, tuple(options.items())))


def driven(drive, **options):
    """A way to use a step, with the mesh and without."""

    def case():
        found = [drive(compiled("gru", schedule)) for schedule in (over((4, 2), **options), None)]
        return difference(*found)

    return case


def step_by_step(step):
    run = step.value_and_grad(square)
    return [run(x, y) for x, y in zip(*data("gru"), strict=True)], states(step)


def learn(step):
    run = step.learn(square, optax.adam(1e-2), update_every=2)
    losses = [run(*data("gru")) for _ in range(2)]
    return losses, jax.tree.map(lambda s: s.value, step.param_states), states(step)


def called(step):
    """The step itself inside brainstate's gradient, a call of many steps, and a scan."""
    xs, ys = data("gru")
    grad = brainstate.transform.grad(lambda x, y: square(step(x), y), step.param_states)
    grads = grad(jnp.asarray(xs[0]), jnp.asarray(ys[0]))
    outs = step(etcompile.MultiStepData(xs[1:3])), step.scan(xs[3:])
    return grads, outs, states(step)


def pure(step):
    """``apply`` in a jit and a grad of one's own, from a carry that lies on one device."""
    x, y = (jnp.asarray(v[0]) for v in data("gru"))
    params = {path: s.value for path, s in step.param_states.items()}
    carry = step.init_carry()

    @jax.jit
    @jax.grad
    def loss(params):
        now, out = step.apply(params, carry, x)
        return square(out, y) + square(step.apply(params, now, x)[1], y)

    return loss(params), step.apply(params, carry, x)[1]


def written_later():
    """What is kept beside a trace lies where the trace does, also when it was just put there."""
    step = compiled("gru", over((4, 2), write_every=3))
    step_by_step(step)
    held = step.executor.traces.own()["e0"]
    places = {
        "written": held.written[0],
        "since": held.since[0][0],
        **{name: value for fs, (x,) in held.added.values() for name, value in (("f", fs[0]), ("x", x))},
    }
    specs = {name: tuple(value.sharding.spec) for name, value in places.items()}
    expected = {"written": ("data", None, "model"), "since": ("data", "model")}
    assert specs == {**expected, "f": (None, "data", "model"), "x": (None, "data")}, specs
    assert any("trace e0 f of" in line for line in step.report().devices), step.report().devices
    return 0.0


def exact_windows():
    return apart("gru", over((4, 2)), 2, within="exact")


def collectives(model, shape, chunk, examples=8, **options):
    """The most that a gather, all-to-all or permutation brings to a device, as a share of its part of the smallest trace."""
    schedule = over(shape, write_every=options.pop("write_every", 1))
    step = compiled(model, schedule, examples=examples, **options)
    header = step.program.header
    traces = [
        leaf.addressable_shards[0].data.size
        for e in step.program.equations
        if e.type.kind == "trace"
        and e.name in step.traces
        and header.site(header.relation(e.type.of).site).contracted
        for leaf in jax.tree.leaves(step.traces[e.name])
    ]
    xs, ys = (jnp.asarray(v) for v in data(model, examples))
    functions = step.executor.functions
    run = functools.partial(functions.sequence, functions.plan(etcompile.Schedule(), len(xs), chunk))
    params, carry, (inputs, targets) = step.executor.placed(step.executor.carry(), ((xs,), (ys,)), 1)
    items = ((targets, None), None)
    text = jax.jit(run).lower(Loss.plain(square), params, carry, inputs, items, {}).compile().as_text()
    pattern = r"= (\(.*?\)|\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n)
        for result in re.findall(pattern, text)
        for dims in re.findall(r"\[([\d,]*)\]", result)
    ]
    return max(sizes) / min(traces)


def refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def a_batch_that_does_not_divide():
    """Also at a reset, which then leaves states and traces as they are."""
    refused(etcompile.OptionError, "evenly over 4 devices", lambda: compiled("gru", over((4, 2)), examples=6))
    step, _ = sequence("gru", over((4, 2)), 1)
    before = states(step)
    refused(etcompile.OptionError, "multiple of 4", lambda: step.reset(batch_size=6))
    assert difference(states(step), before) == 0.0
    step.reset(batch_size=12)
    assert step.init_carry().traces["e0"][0].sharding.spec[0] == "data"
    return 0.0


def units_that_do_not_divide():
    """Two of the three units of a readout on one device would not do: its weight is whole, and the report says so."""
    step = compiled("gru", over((4, 2)))
    lines = step.report().devices
    assert lines[0] == "mesh data=4, model=2"
    assert any(x.startswith("parameter readout.weight.weight [16, 3] (3 units") for x in lines), lines
    assert any(x.startswith("state cell.h [8@data, 16@model]") for x in lines), lines
    assert any(x.startswith("trace e0 [8@data, 22, 16@model]") for x in lines), lines
    assert {len(v.sharding.device_set) for v in jax.tree.leaves(step.traces)} == {8}
    return 0.0


def rules_that_follow_every_path():
    step = compiled("gru", over((4, 2)), "rtrl")
    assert "rtrl follows every path between units" in step.report().devices[0]
    return 0.0


GROUPS = {
    "models": {
        **{
            f"{model} {shape} chunk {chunk}": lambda m=model, s=shape, c=chunk: apart(m, over(s), c)
            for model, shape, chunk in [
                ("gru", (4, 2), 1), ("gru", (8, 1), 1), ("gru", (1, 8), 1), ("gru", (4, 2), 3), ("spiking", (4, 2), 2), ("conv", (2, 4), 1),
                ("complex_diagonal", (4, 2), 1), ("packed", (4, 2), 1),
            ]
        },
        "one example": lambda: apart("one_example", over((1, 8), batch=None), 1),
        "both axes for units": lambda: apart("gru", over((4, 2), None, ("data", "model")), 1),
    },
    "rules": {
        f"{algo} {options}": lambda a=algo, o=options: apart("gru", over((4, 2)), 1, algo=a, **o)
        for algo, options in RULES
    },
    "drivers": {
        **{fn.__name__: driven(fn) for fn in (step_by_step, learn, called, pure)},
        "exact_windows": exact_windows,
    },
    "later": {
        **{fn.__name__: driven(fn, write_every=3) for fn in (step_by_step, learn, called, pure)},
        **{
            f"{model} {shape}": lambda m=model, s=shape: apart(m, over(s, write_every=3), 1)
            for model, shape in [("gru", (8, 1)), ("gru", (1, 8)), ("spiking", (4, 2)), ("conv", (2, 4)), ("packed", (4, 2))]
        },
        "in chunks": lambda: apart("gru", over((4, 2), write_every=2), 3),
        "one example": lambda: apart("one_example", over((1, 8), batch=None, write_every=3), 1),
        "written_later": written_later,
    },
    "collectives": {
        f"{model} {shape} chunk {chunk} {options}": lambda m=model, s=shape, c=chunk, o=options: collectives(m, s, c, **dict(o))
        for model, shape, chunk, options in [
            *[("wide_gru", shape, 1, {"examples": 32}) for shape in SHAPES],
            *[("wide_gru", shape, 3, {"examples": 32}) for shape in ((4, 2), (1, 8))],
            ("wide_gru", (4, 2), 1, {"examples": 32, "algo": "e_prop", "kappa": 0.7}), ("conv", (2, 4), 1, {}),
            ("wide_gru", (4, 2), 1, {"examples": 32, "write_every": 3}),
        ]
    },
    "limits": {
        fn.__name__: fn
        for fn in (a_batch_that_does_not_divide, units_that_do_not_divide, rules_that_follow_every_path)
    },
}  # fmt: skip


def result(case):
    try:
        return case()
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    brainstate.environ.set(precision=64)
    np.set_printoptions(precision=3)
    if "collectives" not in sys.argv:  # those are read off a program that is compiled in earnest
        jax.config.update("jax_disable_most_optimizations", True)
    print(json.dumps({g: {name: result(case) for name, case in GROUPS[g].items()} for g in sys.argv[1:]}))
