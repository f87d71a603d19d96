"""Rules of what units show, against their equations in plain numpy; steps without a loss, chunks, and the first step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import MODELS, SQUARED
from numpy_rules import ETLP, STLLR, Cascade, Decolle, EPropWithRate, Rule, SuperSpike, run, summed
from oracles import relative_error
from shared import shared
from test_rules import (
    ALL,
    QUIET,
    Case,
    autodiff_of_the_first_step,
    compare,
    compiled,
    feedback,
    flattened,
    run_compiled,
)

import etcompile
from etcompile.passes.rules.cascade import of_stages

pytestmark = pytest.mark.usefixtures("by_numpy")

CASES = [
    Case("sltt", lambda B: Rule()),
    Case("superspike", lambda B: SuperSpike(matrix=B)),
    Case(
        "superspike",
        lambda B: SuperSpike(0.5, 0.6, 0.7),
        dict(alpha=0.5, beta=0.6, gamma=0.7, feedback="symmetric"),
    ),
    Case("s_tllr", lambda B: STLLR()),
    Case(
        "s_tllr",
        lambda B: STLLR((0.5, 0.3), (0.6, 1.2), B),
        dict(lambda_pre=0.5, alpha_pre=0.3, lambda_post=0.6, alpha_post=1.2, feedback="random", seed=3),
        seed=3,
    ),
    Case("etlp", lambda B: ETLP(0.7, B), dict(leak=0.7)),
    Case("decolle", lambda B: Decolle(B), dict(seed=2), seed=2),
    Case("cascade", lambda B: Cascade(3.0, 3), dict(delay=3.0, stages=3)),
    Case(
        "e_prop",
        lambda B: EPropWithRate(0.2, 0.3, 0.8, kappa=0.6),
        dict(kappa=0.6, rate=0.2, rate_weight=0.3, rate_decay=0.8),
    ),
]
BY_NAME = {str(c): c for c in CASES}


@shared
def step_of(name, case):
    """Whoever runs it resets it first."""
    rule = BY_NAME[case]
    return compiled(ALL[name](), rule.algo, **rule.options)


@shared
def wanted(name, case, quiet=QUIET):
    model, rule = ALL[name](), BY_NAME[case]
    reference = rule.reference(feedback(step_of(name, case), model, rule.seed))
    return run(reference, model, SQUARED, model.targets, quiet=quiet)


@pytest.mark.parametrize("case", BY_NAME)
@pytest.mark.parametrize("name", MODELS)
def test_rule_equals_its_equations_and_goes_on_without_a_loss(name, case):
    step, model = step_of(name, case), ALL[name]()
    step.reset()
    compare(run_compiled(step, model, SQUARED, model.targets, quiet=QUIET), wanted(name, case))


@pytest.mark.parametrize("case", BY_NAME)
def test_in_chunks_that_do_not_divide_the_sequence(case):
    step, model = step_of("spiking", case), ALL["spiking"]()
    mask = np.ones(6)
    mask[list(QUIET)] = 0
    step.reset()
    _, grads = step.scan_value_and_grad(SQUARED.jax, chunk=4)(
        jnp.asarray(model.xs), jnp.asarray(model.targets), mask=jnp.asarray(mask)
    )
    total = summed([g for g in wanted("spiking", case)[1] if g is not None])
    assert relative_error(flattened(grads), total) < 1e-10


@pytest.mark.parametrize("case", [str(CASES[k]) for k in (0, 2, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_is_autodiff(name, case):
    first = wanted(name, case)[1][0]
    assert relative_error(first, autodiff_of_the_first_step(name)) < 1e-10


def test_sltt_carries_nothing_and_is_one_step_of_backpropagation():
    step = step_of("lstm", "sltt()")
    assert step.report().trace_bytes == 0
    windows = compiled(ALL["lstm"](), "bptt", window=1)
    model = ALL["lstm"]()
    step.reset()
    data = jnp.asarray(model.xs), jnp.asarray(model.targets)
    got, same = (flattened(s.scan_value_and_grad(SQUARED.jax)(*data)[1]) for s in (step, windows))
    assert relative_error(got, same) < 1e-10


@pytest.mark.parametrize(
    ("algo", "options", "message"),
    [
        ("superspike", {"feedback": "none"}, "no such feedback"),
        ("s_tllr", {"lambda_pre": 1.0}, "leak must lie"),
        ("three_factor", {"baseline": 2.0}, "baseline must lie"),
        ("cascade", {"stages": 1}, "two stages or more"),
    ],
)
def test_bad_options(algo, options, message):
    with pytest.raises(etcompile.OptionError, match=message):
        compiled(ALL["rate"](), algo, **options)


def test_the_last_stage_of_a_cascade_peaks_after_the_delay():
    decays, gains = of_stages(20.0, 8)
    keep = sum(np.diag([decays[j]] * (8 - j), -j) for j in range(8))
    z, answers = np.array(gains), []
    for _ in range(400):
        answers.append(z[-1])
        z = keep @ z
    assert abs(int(np.argmax(answers)) - 20) <= 1 and abs(sum(answers) - 1) < 1e-6
