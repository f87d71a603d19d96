"""Gradients computed another way than the compiler does, in float64, for tests to compare with.

An *instrumented step* is a hand-written function ::

    step(params, state, x, *, cut, put) -> (state, out)

over dicts of pytrees. ``cut(v)`` marks a use of a value that credit does not pass in the local version: it is
``stop_gradient`` there and the identity in the full version. ``put(name, v)`` is called on every new hidden state
and returns the value to go on with: ``v`` itself, or an independent value when that state is taken as an
independent variable.

Three oracles:

`bptt`
    full autodiff through time;
`dense_d_rtrl`
    the gradient that D-RTRL means, with whole Jacobians: no traces, no relations, no positions;
`finite_difference`
    a directional derivative of the summed loss by central differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy_evaluation import interpreted, op_by_op
from numpy_gradients import grad, vjp

Tree = Any


def identity(value):
    return value


def keep(name, value):
    """``put`` that changes nothing."""
    return value


def cut_tree(value):
    """Stop the gradient at every leaf."""
    return jax.tree.map(jax.lax.stop_gradient, value)


# --- Pytrees as real vectors --------------------------------------------------------------------------------------


def to_vector(tree: Tree) -> jax.Array:
    """All leaves of `tree` as one float64 vector; a complex leaf gives its real, then its imaginary parts."""
    parts = []
    for leaf in jax.tree.leaves(tree):
        leaf = jnp.asarray(leaf)
        if jnp.iscomplexobj(leaf):
            parts += [leaf.real.reshape(-1), leaf.imag.reshape(-1)]
        else:
            parts.append(leaf.reshape(-1))
    return jnp.concatenate([p.astype(jnp.float64) for p in parts]) if parts else jnp.zeros(0)


def from_vector(vector: jax.Array, like: Tree, *, gradient: bool = False) -> Tree:
    """Inverse of `to_vector`. A `gradient` of a complex leaf is d/d(re) - i d/d(im), as `jax.grad` has it."""
    leaves, treedef = jax.tree.flatten(like)
    out, start = [], 0
    for leaf in leaves:
        leaf = jnp.asarray(leaf)
        size = leaf.size
        part = vector[start : start + size].reshape(leaf.shape)
        start += size
        if jnp.iscomplexobj(leaf):
            imaginary = vector[start : start + size].reshape(leaf.shape)
            start += size
            part = jax.lax.complex(part, -imaginary if gradient else imaginary)
        out.append(part.astype(leaf.dtype))
    assert start == vector.size
    return jax.tree.unflatten(treedef, out)


def time_slice(tree: Tree, t: int) -> Tree:
    """Step t. By numpy, since JAX compiles a program for each shape; keys are none of its arrays."""
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda a: a[t] if is_key(a) else np.asarray(a)[t, ...], tree)


def summed(trees: Sequence[Tree]) -> Tree:
    """Leaf by leaf."""
    return jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)), *trees)


def length(xs: Tree) -> int:
    return jax.tree.leaves(xs)[0].shape[0]


def relative_error(got: Tree, wanted: Tree) -> float:
    """The largest over leaves of max|got - wanted| / max|wanted|; a leaf wanted as zero must be as good as zero."""
    got_leaves, got_def = jax.tree.flatten(got)
    wanted_leaves, wanted_def = jax.tree.flatten(wanted)
    assert got_def == wanted_def, f"different structures: {got_def} and {wanted_def}"
    wanted_arrays = [np.asarray(w).astype(np.complex128) for w in wanted_leaves]
    overall = max((float(np.max(np.abs(w), initial=0.0)) for w in wanted_arrays), default=0.0)
    worst = 0.0
    for g, w in zip(got_leaves, wanted_arrays, strict=True):
        g = np.asarray(g).astype(np.complex128)
        assert g.shape == w.shape, f"different shapes: {g.shape} and {w.shape}"
        # Cancellation leaves rounding noise in a leaf that is zero in exact arithmetic: measure that against the rest.
        scale = max(float(np.max(np.abs(w), initial=0.0)), 1e-6 * overall, 1e-30)
        error = float(np.max(np.abs(g - w), initial=0.0)) / scale
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


# --- Backpropagation through time -----------------------------------------------------------------------------------


def summed_losses(fn, state, xs, targets, loss_fn):
    """The sum of the losses over time as a function of the parameters of a plain step, for autodiff."""

    def total(params):
        def body(state, item):
            state, out = fn(params, state, item[0])
            return state, loss_fn(out, item[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, targets))[1])

    return total


def bptt(step, params, state, xs, targets, loss_fn) -> tuple[jax.Array, Tree]:
    """Losses (T,) and the gradient of their sum by full autodiff through time."""

    def total(params):
        def body(state, inputs):
            x, target = inputs
            state, out = step(params, state, x, cut=identity, put=keep)
            return state, loss_fn(out, *target)

        _, losses = jax.lax.scan(body, state, (xs, tuple(targets)))
        return losses.sum(), losses

    grads, losses = grad(total, params, has_aux=True)
    return losses, grads


def one_step_grad(step, params, state, x, target, loss_fn) -> tuple[jax.Array, Tree]:
    """Loss and its gradient by ordinary autodiff of one step, the state before it held constant."""

    def loss(params):
        return loss_fn(step(params, state, x, cut=identity, put=keep)[1], *target)

    found, pull = vjp(loss, params)
    (gradient,) = pull(jnp.ones_like(found))
    return found, gradient


# --- D-RTRL, dense -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Online:
    """What an online run gives: the sum of gradients, those of every step, and where the run ended."""

    losses: np.ndarray
    grads: Tree
    grads_per_step: list[Tree]
    params: Tree
    state: Tree


def dense_step(step, loss_fn, groups: Sequence[Sequence[str]], jacobian=jax.jacfwd) -> Callable:
    """One online step, traced once: ``(params, state, J, x, target) -> (loss, grads, new state, new J)``.

    ``J[g]`` is the influence d(states of group g)/d(params), (states, parameters), both flattened.
    """
    groups = [tuple(g) for g in groups]

    def pick(state, names):
        return {name: state[name] for name in names}

    def run(theta, h, params, state, x, *, cut, put=keep):
        """The step as a function of the flat parameters, and the flat states of some groups by their names."""
        state = dict(state)
        for names, vector in h.items():
            state.update(from_vector(vector, pick(state, names)))
        return step(from_vector(theta, params), state, x, cut=cut, put=put)

    @interpreted
    def one(params, state, influence, x, target):
        theta = to_vector(params)
        new_state, _ = step(params, state, x, cut=identity, put=keep)

        def loss_of_theta(theta):
            return loss_fn(run(theta, {}, params, state, x, cut=identity)[1], *target)

        loss, total = jax.value_and_grad(loss_of_theta)(theta)

        new_influence = []
        for g, carried in zip(groups, influence, strict=True):
            before = to_vector(pick(state, g))

            def local(theta, h, g=g):
                after, _ = run(theta, {g: h}, params, state, x, cut=cut_tree)
                return to_vector(pick(after, g))

            def loss_of_new_states(vector, g=g):
                independent = from_vector(vector, pick(new_state, g))
                _, out = run(
                    theta, {}, params, state, x, cut=identity, put=lambda name, v: independent.get(name, v)
                )
                return loss_fn(out, *target)

            def loss_past_own_new_states(h, g=g):
                independent = pick(new_state, g)
                _, out = run(
                    theta,
                    {g: h},
                    params,
                    state,
                    x,
                    cut=identity,
                    put=lambda name, v: independent.get(name, v),
                )
                return loss_fn(out, *target)

            immediate, transition = jacobian(local, argnums=(0, 1))(theta, before)
            signal = jax.grad(loss_of_new_states)(to_vector(pick(new_state, g)))
            bypass = jax.grad(loss_past_own_new_states)(before)
            total = total + (signal @ transition + bypass) @ carried
            new_influence.append(transition @ carried + immediate)
        return loss, from_vector(total, params, gradient=True), new_state, new_influence

    return one


def no_influence(params, state, groups) -> list[np.ndarray]:
    def size(tree):
        return jax.eval_shape(to_vector, tree).size

    return [np.zeros((size({n: state[n] for n in g}), size(params))) for g in groups]


def dense_d_rtrl(
    step,
    params,
    state,
    xs,
    targets,
    loss_fn,
    groups: Sequence[Sequence[str]],
    *,
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]] | None = None,
    update_state: Tree = None,
    jacobian=jax.jacfwd,
) -> Online:
    """The dense reference of the D-RTRL gradient.

    Per step, with J_t the influence of the parameters on a group's states,

        grad_t = (one-step autodiff of loss_t) + Σ_groups (L_t D_t + bypass_t) J_{t-1}
        J_t = D_t J_{t-1} + F_t

    where D_t and F_t are Jacobians of the step with the cuts in place, L_t is the derivative of the loss with all
    new states of the group taken as independent, and the bypass is the part that meets none of the group's new states.

    Parameters
    ----------
    update : callable, optional
        ``(params, update_state, grads) -> (params, update_state)``, called after every step (online learning). The
        influence is kept from step to step.
    """
    one = dense_step(step, loss_fn, groups, jacobian)
    influence = no_influence(params, state, groups)
    losses, per_step = [], []
    for t in range(length(xs)):
        loss, grads, state, influence = one(
            params, state, influence, time_slice(xs, t), time_slice(tuple(targets), t)
        )
        losses.append(loss)
        per_step.append(grads)
        if update is not None:
            params, update_state = update(params, update_state, grads)
    return Online(np.stack(losses), summed(per_step), per_step, params, state)


# --- Structure, found from derivatives --------------------------------------------------------------------------------


def local_groups(step, params, state, x, hidden: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Connected components of the hidden states under non-zero local derivatives, old to new and new to new."""
    hidden = list(hidden)

    def locally(old, offset):
        """New states before `put`; what flows on from them is moved by `offset`."""
        before_put = {}

        def put(name, v):
            before_put[name] = v
            return jax.tree.map(jnp.add, v, from_vector(offset[name], v)) if name in offset else v

        full = {**state, **{n: from_vector(old[n], state[n]) for n in hidden}}
        step(params, full, x, cut=cut_tree, put=put)
        return {n: to_vector(before_put[n]) for n in hidden}

    def all_slopes(states):
        old = {n: to_vector(v) for n, v in states.items()}
        return jax.jacfwd(locally, argnums=(0, 1))(old, {n: jnp.zeros_like(v) for n, v in old.items()})

    slopes = op_by_op(all_slopes, {n: state[n] for n in hidden})
    parent = {n: n for n in hidden}

    def root(n):
        return n if parent[n] == n else root(parent[n])

    for target in hidden:
        for source in hidden:
            if any(np.any(np.asarray(slope[source])) for slope in slopes[target]):
                parent[root(target)] = root(source)
    components: dict[str, list[str]] = {}
    for n in hidden:
        components.setdefault(root(n), []).append(n)
    return tuple(tuple(c) for c in components.values())


def finite_difference(losses_of, params: Tree, direction: Tree, epsilon: float = 1e-6) -> float:
    """Derivative of the summed losses along `direction` (a tree like `params`), by central differences."""

    def moved(sign):
        at = jax.tree.map(lambda p, d: np.asarray(p) + sign * epsilon * d, params, direction)
        return np.asarray(losses_of(at)).sum()

    return float((moved(1.0) - moved(-1.0)) / (2 * epsilon))


def directional(grads: Tree, direction: Tree) -> float:
    """Derivative along `direction` that `grads` (in the convention of `jax.grad`) stands for."""
    products = jax.tree.map(lambda g, d: np.real(np.sum(np.asarray(g) * d)), grads, direction)
    return float(sum(jax.tree.leaves(products)))
