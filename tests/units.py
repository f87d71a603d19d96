"""Units and fan-out found from the sparsity of Jacobians, and the D-RTRL gradient that follows: nothing is asked of the compiler.

A *tapped step* is ::

    step(params, state, x, *, op, put) -> (state, out)

over a dict of states. ``op(name, fn, *reads)`` is a weight operation: ``fn(params[name], *reads)``, of which a number that
nothing reads is one too (``fn`` the identity). ``put(name, value)`` is called on every new state and gives the value to go on with.

With the results y of all operations held as variables of their own, the step is h' = G(h, y). The pattern of dG/dh says which old
elements reach which new ones by a path that no weight operation spreads, so its connected parts are the units; the pattern of
dG/dy says which elements an element of y reaches. The pattern of y by h, and by other y, says where an operation would spread credit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy_evaluation import interpreted
from oracles import Online, Tree, dense_d_rtrl, from_vector, identity, keep, to_vector

#: Of how many elements of one y a position may keep the influence.
READS = 8
#: How many elements of a unit the compiler tells apart in one array.
PARTS = 32
#: Points at which Jacobians are evaluated: an element that is zero at all of them is taken as zero.
POINTS = 6


def plain(step) -> Callable:
    """The step as a user writes it: ``(params, state, x) -> (state, out)``."""

    def fn(params, state, x):
        return step(params, state, x, op=lambda name, of, *reads: of(params[name], *reads), put=keep)

    return fn


def instrumented(step) -> Callable:
    """The step as `dense_d_rtrl` takes it: what a weight operation reads is cut."""

    def fn(params, state, x, *, cut=identity, put=keep):
        return step(params, state, x, op=lambda name, of, *reads: of(params[name], *map(cut, reads)), put=put)

    return fn


def is_float(value) -> bool:
    return all(jnp.issubdtype(v.dtype, jnp.inexact) for v in jax.tree.leaves(value))


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Who depends on whom: booleans, over the flattened states of ``names`` and the flattened results of operations.

    Attributes
    ----------
    names : tuple of str
    owner : np.ndarray
        (H,) of int: the state, as a place in ``names``, of each element.
    places : tuple of np.ndarray
        For each state (elements, axes) of int: where in its array, or in which of its arrays, each element lies.
    transition : np.ndarray
        (H, H): new element by old element.
    immediate : dict
        For each operation (H, Y): new element by element of y.
    copies : dict
        For each operation how many examples an element of y is for: all of them where it reads nothing, else one.
    spread : frozenset of str
        Operations that reach a state and read another y, or a state that a weight reaches.
    """

    names: tuple[str, ...]
    owner: np.ndarray
    places: tuple[np.ndarray, ...]
    transition: np.ndarray
    immediate: dict[str, np.ndarray]
    copies: dict[str, int]
    spread: frozenset[str]

    @property
    def units(self) -> np.ndarray:
        """(H,) of int: the number of each element's unit."""
        near = self.transition | self.transition.T | np.eye(len(self.owner), dtype=bool)
        return closure(near).argmax(1)

    @property
    def sizes(self) -> np.ndarray:
        """Elements of each unit."""
        return np.unique(self.units, return_counts=True)[1]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """States that have a unit in common."""
        shared = np.zeros((len(self.names),) * 2, bool)
        for unit in np.unique(self.units):
            members = np.unique(self.owner[self.units == unit])
            shared[np.ix_(members, members)] = True
        root = closure(shared).argmax(1)
        return tuple(
            tuple(n for n, r in zip(self.names, root, strict=True) if r == which) for which in np.unique(root)
        )

    def support(self, name: str) -> np.ndarray:
        """(H, Y): of which elements of y a trace of each state element is kept, over any number of steps."""
        return (closure(self.transition) @ self.immediate[name].astype(np.int64)) > 0

    @property
    def kept(self) -> bool:
        """Whether each element's influence has a place in every group."""
        return all(map(self.kept_in, self.groups))

    def kept_in(self, group: Sequence[str]) -> bool:
        """Whether the elements of a group have their places.

        Units have few elements, of which each is reached by few elements of y. Or a unit of any number is reached by few, and
        none of these reaches another unit of its example.
        """
        members = np.isin(self.owner, [self.names.index(n) for n in group])
        supports = {n: self.support(n)[members] for n in self.immediate}
        few = all(int(s.sum(1).max(initial=0)) <= READS for s in supports.values())
        if few and self.rows(members) <= PARTS and not self.crossed(members):
            return True
        units = self.units[members]
        by_unit = {n: np.stack([s[units == u].any(0) for u in np.unique(units)]) for n, s in supports.items()}
        return all(
            int(r.sum(1).max()) <= READS and int(r.sum(0).max(initial=0)) <= self.copies[n]
            for n, r in by_unit.items()
        )

    def crossed(self, members: np.ndarray) -> bool:
        """Whether elements of one state that lie along several of its axes come together in an element of another one."""
        reaching = closure(self.transition)
        for which, places in enumerate(self.places):
            own = self.owner == which
            for reached in np.unique(reaching[members & ~own][:, own], axis=0):
                if sum(len(np.unique(axis)) > 1 for axis in places[reached].T) > 1:
                    return True
        return False

    def rows(self, members: np.ndarray) -> int:
        """The most elements of one state in one unit, where each of them is read by the others."""
        both = closure(self.transition)
        mutual = both & both.T
        same = self.owner[:, None] == self.owner[None, :]
        return int((mutual & same)[members].sum(1).max(initial=0))

    @property
    def exact(self) -> bool:
        """Whether the local step is the whole one, so that the gradient is that of backpropagation through time."""
        return self.kept and not self.spread

    def reached(self, name: str) -> np.ndarray:
        """(Y,) of int: units that each element of y reaches within the step."""
        units = self.units
        return np.array([len(np.unique(units[column])) for column in self.immediate[name].T], int)


def closure(near: np.ndarray) -> np.ndarray:
    """What is reached in any number of steps, none included."""
    found = near | np.eye(len(near), dtype=bool)
    while True:
        further = (found.astype(np.float32) @ found.astype(np.float32)) > 0
        if (further == found).all():
            return found
        found = further


def pattern(step, params: Tree, state: Tree, xs: Tree, seed: int = 0, points: int = POINTS) -> Pattern:
    """Evaluate the Jacobians at random points; counters and other whole numbers go on as they do in the model.

    A running index should go round in ``points`` steps.
    """
    rng = np.random.default_rng(seed)
    names = tuple(n for n, v in state.items() if is_float(v))
    x = jax.tree.map(lambda v: v[0], xs)
    operations = _operations(step, params, state, x)

    def local(h, ys, params, state, x):
        made = {}

        def op(name, of, *reads):
            made[name] = of(params[name], *reads)
            return ys[name].reshape(made[name].shape).astype(made[name].dtype)

        old = {**state, **from_vector(h, {n: state[n] for n in names})}
        new, _ = step(params, old, x, op=op, put=keep)
        return to_vector({n: new[n] for n in names}), {n: to_vector(v) for n, v in made.items()}

    slopes = interpreted(jax.jacfwd(local, argnums=(0, 1)))
    forward = interpreted(plain(step))
    found: Any = None
    for _ in range(points):
        x = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape[1:]), v.dtype), xs)
        h = rng.normal(size=jax.eval_shape(to_vector, {n: state[n] for n in names}).size)
        ys = {n: rng.normal(size=y.size) for n, (_, y) in operations.items()}
        moved = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), params)
        here = jax.tree.map(lambda v: np.asarray(v) != 0, slopes(h, ys, moved, state, x))
        found = here if found is None else jax.tree.map(np.logical_or, found, here)
        new, _ = forward(params, state, x)
        state = {n: state[n] if n in names else new[n] for n in state}
    (by_h, by_y), made = found
    order = sorted(names)  # as `to_vector` has them
    owner = np.concatenate([np.full(jax.eval_shape(to_vector, state[n]).size, names.index(n)) for n in order])
    trained = np.zeros(len(owner), bool)
    for reaches in by_y.values():
        trained |= reaches.any(1)
    trained = (closure(by_h) @ trained.astype(np.int64)) > 0
    reaching = {n for n, reaches in by_y.items() if reaches.any()}
    places = tuple(_places(state[n]) for n in names)
    spread = frozenset(
        n
        for n in reaching
        if made[n][0][:, trained].any() or any(m != n and v.any() for m, v in made[n][1].items())
    )
    examples = int(np.prod(x.shape[:-1]))
    copies = {n: 1 if reads else examples for n, (reads, _) in operations.items()}
    return Pattern(names, owner, places, by_h, by_y, copies, spread)


def _operations(step, params: Tree, state: Tree, x: Tree) -> dict[str, tuple[list[Any], Any]]:
    """Each weight operation, with the shapes of what it reads and makes."""
    found: dict[str, tuple[list[Any], Any]] = {}

    def shape(v):
        return jax.ShapeDtypeStruct(v.shape, v.dtype)

    def op(name, of, *reads):
        y = of(params[name], *reads)
        found[name] = [shape(v) for v in reads], shape(y)
        return y

    jax.eval_shape(lambda state, x: step(params, state, x, op=op, put=keep)[0], state, x)
    return found


def _places(state: Tree) -> np.ndarray:
    """(elements, axes) of int, in the order of `to_vector`: an array of several is one axis more, a complex number a pair."""
    leaves = [
        np.stack([v.real, v.imag], -1) if np.iscomplexobj(v) else np.asarray(v)
        for v in jax.tree.leaves(state)
    ]
    found = [
        np.concatenate([np.full((v.size, 1), k), np.indices(v.shape).reshape(v.ndim, -1).T], 1)
        for k, v in enumerate(leaves)
    ]
    axes = max(f.shape[1] for f in found)
    return np.concatenate([np.pad(f, ((0, 0), (0, axes - f.shape[1]))) for f in found])


def reference(step, params, state, xs, targets, loss_fn, found: Pattern) -> Online:
    """The D-RTRL gradient that follows: whole Jacobians of the step in which weight operations pass no credit.

    These have no entry from unit to unit, so each trace stays within its unit; groups say what the signal takes as independent.
    """
    return dense_d_rtrl(instrumented(step), params, state, xs, (targets,), loss_fn, found.groups)
