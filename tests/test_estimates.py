"""Estimates of RTRL's influence: DODGE, random subsets and Kronecker sums, against their equations and RTRL itself."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import MODELS, SQUARED
from numpy_rules import RTRL, Dodge, KroneckerSum, RankRTRL, SubsetRTRL, run
from oracles import relative_error
from test_rules import QUIET, compare, compiled, grads_of, last_gradient, run_compiled, three_steps

import etcompile
from etcompile.lowering.estimates import fewer_terms
from etcompile.lowering.layers import random_signs
from etcompile.lowering.low_rank import nearest

pytestmark = pytest.mark.usefixtures("by_numpy")

TOLERANCE = 1e-10


def same_as(rule, name, algo, **options):
    """The compiled rule equals ``rule(step, model)``, at steps with and without a loss."""
    model = MODELS[name]()
    step = compiled(model, algo, **options)
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET[1:])
    compare(got, run(rule(step, model), model, SQUARED, model.targets, quiet=QUIET[1:]))
    return step


def directions(step, model):
    """What the compiled DODGE draws at the first step."""
    sites = step.program.header.sites
    numbers = {s.params[0]: (10_000 + 2 * k, s.weight) for k, s in enumerate(sites)}

    def draw(name):
        number, shape = numbers[name]
        return np.asarray(random_signs(3, jnp.uint32(1), number, shape, float))

    return draw


def subsets(step, model, seed, size, redraw):
    """What the compiled rule draws: the weight of each state, of all states in the reference's numbering."""
    header = step.program.header
    groups = {
        path.split(".")[-1].strip("[]'"): k for k, g in enumerate(header.groups) for path, _ in g.states
    }

    def draw(t):
        found = []
        for name, value in model.states.items():
            shape = model.outside(value).shape[1:]
            n = int(np.prod(shape))
            key = jax.random.fold_in(jax.random.key(seed), t + 1 if redraw else 0)
            order = jax.random.permutation(jax.random.fold_in(key, 20_000 + groups[name]), n)
            kept = np.asarray(order < size, float).reshape(shape) * (max(1.0, n / size) if redraw else 1.0)
            whole = np.broadcast_to(kept, model.outside(value).shape)
            found.append(np.ravel(model.inside(whole) if hasattr(model, "inside") else whole))
        return np.concatenate(found)

    return draw


def signs_of_terms(step, seed, rank):
    header = step.program.header
    number = {header.site(e.site).params[0]: 30_000 + int(e.name[1:]) for e in header.effects}

    def draw(t, name, rows):
        return np.asarray(random_signs(seed, jnp.uint32(t + 1), number[name], (rows, rank + 1), float))

    return draw


@pytest.mark.parametrize("name", MODELS)
def test_dodge_equals_its_equations(name):
    same_as(lambda step, model: Dodge(directions(step, model)), name, "dodge", seed=3)


@pytest.mark.parametrize(("name", "redraw"), [*((n, True) for n in MODELS), ("lstm", False)])
def test_random_subsets_equal_their_equations(name, redraw):
    same_as(
        lambda step, model: SubsetRTRL(subsets(step, model, 2, 3, redraw)),
        name, "subset_rtrl", k=3, redraw=redraw, seed=2,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "rank"), [*((n, 2) for n in MODELS), ("rate", 1)])
def test_kronecker_sums_equal_their_equations(name, rank):
    def rule(step, model):
        return KroneckerSum(rank, signs_of_terms(step, 1, rank))

    step = same_as(rule, name, "kf_rtrl", rank=rank, seed=1)
    assert etcompile.parse_program(str(step.program)) == step.program


@pytest.mark.parametrize(("name", "rank"), [*((n, 1) for n in MODELS), ("rate", 2)])
def test_a_rank_for_each_unit_equals_its_equations(name, rank):
    step = same_as(lambda step, model: RankRTRL(rank), name, "rank_rtrl", rank=rank)
    assert etcompile.parse_program(str(step.program)) == step.program


def test_with_a_rank_as_high_as_there_are_inputs_nothing_is_dropped():
    model = MODELS["rate"]()
    _, grads = run_compiled(compiled(model, "rank_rtrl", rank=6), model, SQUARED, model.targets)
    wanted = run(RTRL(), model, SQUARED, model.targets)[1]
    assert all(relative_error(g, w) < TOLERANCE for g, w in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("dtype", [float, complex])
def test_the_nearest_sum_of_products(dtype):
    rng = np.random.default_rng(0)
    left, right = (
        (rng.normal(size=(5, n, 3)) + (1j * rng.normal(size=(5, n, 3)) if dtype is complex else 0))
        for n in (4, 6)
    )
    a, b = nearest(jnp.asarray(left), jnp.asarray(right))
    assert a.shape == (5, 4, 2) and b.shape == (5, 6, 2)
    u, d, v = np.linalg.svd(left @ right.swapaxes(1, 2), full_matrices=False)
    assert np.allclose(a @ b.swapaxes(1, 2), (u[..., :2] * d[:, None, :2]) @ v[:, :2], atol=1e-12)
    few = nearest(jnp.asarray(left[:, :1]), jnp.asarray(right))  # of rank one as it is
    assert np.allclose(few[0] @ few[1].swapaxes(1, 2), left[:, :1] @ right.swapaxes(1, 2), atol=1e-12)
    none = nearest(jnp.zeros((2, 4, 3)), jnp.zeros((2, 6, 3)))
    assert all(not np.any(v) for v in none)


# --- right on average -------------------------------------------------------------------------------------------------------


def test_along_a_basis_of_directions_dodge_adds_up_to_rtrl():
    tables = three_steps(MODELS["rate"])
    sizes = {n: tables[0].sites[n].x.shape[1] for n in tables[0].traced}
    total = {n: np.zeros(tables[0].sites[n].shape) for n in tables[0].sites}
    plain = last_gradient(Dodge(lambda n: np.zeros(sizes[n])), tables)
    for name, size in sizes.items():
        for k in range(size):
            unit = {n: np.eye(s)[k] if n == name else np.zeros(s) for n, s in sizes.items()}
            found = last_gradient(Dodge(unit.__getitem__), tables)
            total = {n: v + found[n] - plain[n] for n, v in total.items()}
    wanted = last_gradient(RTRL(), tables)
    assert relative_error({n: v + plain[n] for n, v in total.items()}, wanted) < TOLERANCE


def test_subsets_drawn_anew_are_rtrl_on_average():
    tables = three_steps(MODELS["rate"])
    states = len(tables[0].recurrence)
    drawn = [
        states / 2 * np.isin(np.arange(states), pair) for pair in itertools.combinations(range(states), 2)
    ]
    found = [last_gradient(SubsetRTRL([drawn[0], a, b].__getitem__), tables) for a in drawn for b in drawn]
    mean = {n: np.mean([f[n] for f in found], axis=0) for n in found[0]}
    assert relative_error(mean, last_gradient(RTRL(), tables)) < TOLERANCE


def test_a_subset_of_all_units_is_rtrl():
    model = MODELS["lstm"]()
    _, grads = run_compiled(compiled(model, "subset_rtrl", k=100), model, SQUARED, model.targets)
    assert relative_error(grads, grads_of("lstm", "rtrl()")) < TOLERANCE


@pytest.mark.parametrize(("rank", "sizes"), [(1, (5, 7)), (2, (5, 7)), (3, (6, 4)), (4, (3, 9))])
def test_one_term_less_is_right_on_average_and_varies_least(rank, sizes):
    rng = np.random.default_rng(rank)
    left, right = (rng.normal(size=(2, n, rank + 1)) * 3.0 ** np.arange(rank + 1) for n in sizes)
    whole = left @ np.swapaxes(right, 1, 2)
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=rank + 1):
        u, A = fewer_terms(jnp.asarray(left), jnp.asarray(right), jnp.asarray([signs, signs]))
        assert u.shape[-1] == A.shape[-1] == rank
        found.append(np.asarray(u) @ np.swapaxes(np.asarray(A), 1, 2))
    assert relative_error(np.mean(found, axis=0), whole) < 1e-12
    variance = np.mean([np.sum((f - whole) ** 2, axis=(1, 2)) for f in found], axis=0)
    for row, d in enumerate(np.linalg.svd(whole, compute_uv=False)):
        # No unbiased estimate of this rank has less: (Σ d)² / k of what is shared, less its squares.
        d = np.concatenate([d, np.zeros(rank + 1)])[: rank + 1]
        least = min(
            d[m:].sum() ** 2 / (rank - m) - (d[m:] ** 2).sum()
            for m in range(rank)
            if (rank - m) * d[m] <= d[m:].sum() * (1 + 1e-12)
        )
        assert variance[row] <= least * (1 + 1e-9) + 1e-12 * d[0] ** 2


def test_kronecker_sums_of_zeros_are_zero_and_of_few_terms_exact():
    u, A = fewer_terms(jnp.zeros((1, 4, 3)), jnp.zeros((1, 5, 3)), jnp.ones((1, 3)))
    assert not np.any(u) and not np.any(A)
    left = np.zeros((1, 4, 3))
    left[..., 2] = [1.0, -2.0, 0.5, 3.0]
    right = np.random.default_rng(0).normal(size=(1, 5, 3))
    u, A = fewer_terms(jnp.asarray(left), jnp.asarray(right), jnp.asarray([[1.0, -1.0, -1.0]]))
    assert relative_error(np.asarray(u @ A.swapaxes(1, 2)), left @ right.swapaxes(1, 2)) < 1e-12


def test_a_new_sequence_has_a_direction_of_its_own_and_keeps_it():
    model = MODELS["rate"]()
    step = compiled(model, "dodge")
    x = jnp.asarray(model.xs[0])
    drawn = []
    for _ in range(2):
        step.reset()
        seen = []
        for _ in range(2):
            step(x)
            seen.append(
                [
                    np.asarray(v)
                    for k, v in step.traces.items()
                    if step.program.equation(k).type.kind == "gradient"
                ]
            )
        assert seen[0] and all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))
        assert all(set(np.unique(v)) <= {-1.0, 1.0} for v in seen[0])
        drawn.append(seen[0])
    assert any(not np.array_equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize(("algo", "options"), [("subset_rtrl", {"k": 0}), ("kf_rtrl", {"rank": 0})])
def test_bad_options(algo, options):
    with pytest.raises(etcompile.OptionError):
        compiled(MODELS["rate"](), algo, **options)


@pytest.mark.parametrize(
    ("algo", "options"), [("dodge", {}), ("subset_rtrl", {}), ("kf_rtrl", {"rank": 2})], ids=str
)
def test_they_run_step_by_step(algo, options):
    model = MODELS["rate"]()
    step = compiled(model, algo, **options)
    with pytest.raises(etcompile.UnsupportedError, match=r"follows every path|counts steps"):
        step.scan_value_and_grad(SQUARED.jax, chunk=3)(jnp.asarray(model.xs), jnp.asarray(model.targets))


def test_sums_are_shortened_without_lapack():
    """Two of its decompositions in a loop can wait for each other's threads for ever on a processor of two cores."""
    shapes = jnp.ones((2, 4, 3)), jnp.ones((2, 6, 3))
    for made in (
        jax.make_jaxpr(fewer_terms)(*shapes, jnp.ones((2, 3))),
        jax.make_jaxpr(nearest)(*shapes),
    ):
        assert not {"qr", "householder_product", "geqrf", "svd", "eigh"} & set(re.findall(r"\w+", str(made)))
