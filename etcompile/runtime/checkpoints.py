"""Checkpoints of a run: everything that a step or a learner needs to go on bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.compiled import Compiled
from etcompile.errors import CheckpointError, OptionError
from etcompile.extras import from_extra
from etcompile.frontend.jaxpr import Constant
from etcompile.frontend.step_model import leaf_names
from etcompile.integers import as_integer, positive_integer
from etcompile.keywords import named_arguments
from etcompile.lowering.functions import Carry
from etcompile.runtime.progress import refuse_traced

if TYPE_CHECKING:
    from etcompile.runtime.learn import Learner
    from etcompile.runtime.step import Step
    from etcompile.runtime.td_learner import TDLearner

__all__ = ["Checkpoints", "Restored"]

Array = Any

#: Of the layout of a checkpoint; another number is another layout.
_FORMAT = 2


class Restored(NamedTuple):
    """Where a run goes on: the position of the checkpoint, and what was saved as ``extra``."""

    at: int
    extra: Any


class Checkpoints:
    """Saves a run to a directory, and goes on from there after a crash.

    A checkpoint holds the parameters, the model's states (random keys included), the traces and counters of the rule, the states'
    initial values, and of a learner the optimiser and the gradients that wait for an update. A run that was killed at any moment,
    while saving too, goes on from its last checkpoint with the numbers of a run that was never interrupted.

    Parameters
    ----------
    directory : path
        One run each. Made at the first save.
    every : int
        A checkpoint is written whenever the position reaches or passes a multiple of this.
    keep : int
        How many of the last checkpoints stay.

    Notes
    -----
    Written with orbax-checkpoint (the extra ``checkpoint``). A save is finished when the call returns. It becomes visible by one
    renaming at its end, so a checkpoint is whole or is not there.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, tempfile, etcompile
    >>> def leaky(params, state, x):
    ...     h = 0.9 * state["h"] + x @ params["w"]
    ...     return {"h": h}, h
    >>> def new_run():
    ...     model = etcompile.from_function(leaky, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    ...     step = etcompile.compile(model, jnp.ones((2, 3)))
    ...     return step.learn(lambda out, y: jnp.mean((out - y) ** 2), optax.adam(1e-3))
    >>> xs, ys = jnp.ones((20, 2, 3)), jnp.ones((20, 2, 4))
    >>> directory = tempfile.mkdtemp()
    >>> saves = etcompile.Checkpoints(directory, every=10)
    >>> losses = new_run()(xs[:15], ys[:15], checkpoints=saves)  # and here it is killed
    >>> learn, saves = new_run(), etcompile.Checkpoints(directory, every=10)
    >>> done = saves.restore(learn).at
    >>> done
    10
    >>> learn(xs[done:], ys[done:], checkpoints=saves).shape
    (10,)
    """

    @named_arguments("Checkpoints")
    def __init__(self, directory: str | os.PathLike[str], *, every: int = 1, keep: int = 3) -> None:
        every, keep = positive_integer("every", every), positive_integer("keep", keep)
        _orbax()
        self.directory = Path(directory).expanduser().absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(
                "checkpoints are kept in a directory.",
                got=f"the file {str(self.directory)!r}",
                expected="a directory, or a path where none is yet",
                hint=f"give its folder: etcompile.Checkpoints({str(self.directory.parent)!r}).",
            )
        self.every = every
        self.keep = keep
        self._at = 0
        self._described: tuple[Compiled, dict[str, Any]] | None = None

    @property
    def at(self) -> int:
        """The position: what was last given to :meth:`save`, or found by :meth:`restore`; a learner's calls add their steps."""
        return self._at

    @property
    def latest(self) -> int | None:
        """Position of the last checkpoint in the directory; None if there is none."""
        if not self.directory.is_dir():
            return None
        with _manager(self.directory, create=False) as manager:
            return manager.latest_step()

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.directory)!r}, every={self.every}, keep={self.keep}, at={self.at})"

    def save(
        self, run: Step | Learner | TDLearner, at: int, extra: Any = None, *, force: bool = False
    ) -> bool:
        """Save a run at a position, if a checkpoint is due there.

        Parameters
        ----------
        run : Step, Learner or TDLearner
        at : int
            Counts what the caller likes: steps, sequences, epochs. Must grow from save to save.
        extra : pytree of arrays and numbers
            What else the run needs: the state of an optimiser of yours, a random key for the data.
        force : bool
            Write in any case, at the end of a run for example.

        Returns
        -------
        bool
            Whether a checkpoint was written.

        Raises
        ------
        CheckpointError
            The directory holds a checkpoint of this position or a later one, of another run.
        OptionError
            ``at`` does not grow, or ``extra`` holds something else than arrays and numbers.
        """
        position = as_integer(at)
        if position is None or position < self._at:
            raise OptionError(
                "positions must be integers that grow.", got=f"at={at!r}", expected=f"at least {self._at}"
            )
        at = position
        due = force or at // self.every > self._at // self.every
        if not due:
            self._at = at
            return False
        step = _step_of(run)
        with step.executor.turns:  # what is written is a run between two calls
            parts = _parts(run, step, extra)
            about = {**self._about(step), **_settings(run), "leaves": _describe(parts)}
            stored = [_stored(v) for v in jax.tree.leaves(parts) if np.size(v)]
            args = _orbax().args
            with _manager(self.directory, create=True, keep=self.keep) as manager:
                latest = manager.latest_step()
                if latest == at == self._at:  # forced twice
                    return False
                self._check_latest(latest, at)
                items = args.Composite(arrays=args.StandardSave(stored), about=args.JsonSave(about))
                manager.save(at, args=items, force=True)
        self._at = at
        return True

    def restore(self, run: Step | Learner | TDLearner, extra: Any = None) -> Restored:
        """Bring a run to where the last checkpoint left it.

        Parameters
        ----------
        run : Step, Learner or TDLearner
            Made as the one that was saved.
        extra : pytree
            As it was given to :meth:`save`: its structure, shapes and dtypes count.

        Returns
        -------
        Restored
            ``(at, extra)``. Where there is no checkpoint yet: 0, and ``extra`` as given.

        Raises
        ------
        CheckpointError
            The checkpoint is of another model, rule, batch size or optimiser; the message says what differs.
            ``run`` is as it was.
        """
        at = self.latest
        if at is None:
            return Restored(0, extra)
        step = _step_of(run)
        with step.executor.turns:
            parts = _parts(run, step, extra)
            here = {**self._about(step), **_settings(run), "leaves": _describe(parts)}
            where = f"checkpoint {at} in {self.directory}"
            args = _orbax().args
            with _manager(self.directory, create=False) as manager:
                there = _read(manager, at, where, about=args.JsonRestore())
                _compare(where, there, here)
                live, tree = jax.tree.flatten(parts)
                pairs = list(zip(live, _leaves(there), strict=True))
                wanted = [_wanted(v, leaf) for v, leaf in pairs if np.size(v)]
                found = iter(_read(manager, at, where, arrays=args.StandardRestore(wanted)))
            values = [_placed(next(found), v, leaf) if np.size(v) else v for v, leaf in pairs]
            restored = jax.tree.unflatten(tree, values)
            _set(run, restored)
        self._at = at
        return Restored(at, restored["extra"])

    def check_goes_on(self) -> None:
        """Raise :class:`CheckpointError` if the directory holds a checkpoint from beyond the position: of another run."""
        self._check_latest(self.latest, self._at + 1)

    def _check_latest(self, latest: int | None, at: int) -> None:
        if latest is not None and latest >= at:
            raise CheckpointError(
                f"{self.directory} holds a checkpoint of a run that went further than this one.",
                got=f"position {self._at}",
                expected=f"position {latest} or later",
                hint="restore(...) goes on from there; take another directory for another run.",
            )

    def _about(self, step: Step) -> dict[str, Any]:
        """What a step computes; found once, since constants may be large."""
        compiled = step.executor.compiled
        if self._described is None or self._described[0] is not compiled:
            self._described = compiled, _about(compiled)
        return self._described[1]


# -- what is saved ----------------------------------------------------------------------------------------------------


def _step_of(run: Any) -> Step:
    """The step of a run, and everything that a checkpoint holds, as it stands."""
    from etcompile.runtime.step import Step

    if not isinstance(run, (Step, *_learners())):
        raise OptionError(
            "only a step or a learner can be saved.",
            got=type(run).__name__,
            expected="what etcompile.compile(...), step.learn(...) or step.learn_td(...) returned",
        )
    return run if isinstance(run, Step) else run.step


def _learners() -> tuple[type, type]:
    """Classes of what keeps something beside its step."""
    from etcompile.runtime.learn import Learner
    from etcompile.runtime.td_learner import TDLearner

    return Learner, TDLearner


def _saved_states(run: Any) -> dict[str, Any]:
    """What a learner keeps beside its step."""
    return run.saved_states() if isinstance(run, _learners()) else {}


def _parts(run: Step | Learner | TDLearner, step: Step, extra: Any) -> dict[str, Any]:
    carry, live = step.executor.carry(), step.executor.live
    parts = {
        "params": live.params(),
        "states": carry.states,
        "traces": carry.traces,
        "initial": live.initial,
        "learner": {k: s.value for k, s in _saved_states(run).items()},
        "extra": extra,
    }
    for name, leaf in zip(leaf_names(parts), jax.tree.leaves(parts), strict=True):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise OptionError(
                f"{name} cannot be saved.", got=type(leaf).__name__, expected="an array or a number"
            )
    refuse_traced(parts, "a checkpoint")
    return parts


def _set(run: Step | Learner | TDLearner, parts: dict[str, Any]) -> None:
    executor = _step_of(run).executor
    live = executor.live
    learner = _saved_states(run)
    before, initial = {name: state.value for name, state in learner.items()}, live.initial
    try:
        with executor.unchanged_on_error():
            live.set_params(parts["params"])
            executor.commit(Carry(parts["states"], parts["traces"]))
            live.initial = parts["initial"]
            for name, state in learner.items():
                state.value = parts["learner"][name]
    except BaseException:
        live.initial = initial
        for name, state in learner.items():
            if state.value is not before[name]:
                state.value = before[name]
        raise


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of a checkpoint. ``form`` is what Python and JAX shall take it for, beside its dtype and shape.

    That is ``array``, ``weak`` (its dtype gives way to another's), ``numpy``, ``number`` (of Python), or the kind of random key.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str

    @property
    def key(self) -> str:
        """The kind of random key, or nothing."""
        return self.form.removeprefix("key ") if self.form.startswith("key ") else ""

    def fits(self, other: _Leaf) -> bool:
        """Whether one can be restored in the place of the other. A Python number becomes an array of any precision."""
        if (self.name, self.shape, self.key) != (other.name, other.shape, other.key):
            return False
        return "number" in (self.form, other.form) or _canonical(self.dtype) == _canonical(other.dtype)

    def __str__(self) -> str:
        return f"{self.form if self.key else self.dtype}{list(self.shape)}"


def _canonical(dtype: str) -> Any:
    return jax.dtypes.canonicalize_dtype(jnp.dtype(dtype))


def _describe(parts: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Records of :class:`_Leaf`, for JSON."""
    found: dict[str, tuple[str, str, tuple[int, ...], str]] = {}
    for path, leaf in zip(leaf_names(parts), jax.tree.leaves(parts), strict=True):
        name, k = path, 1
        while name in found:  # leaves of one container without names
            k += 1
            name = f"{path}#{k}"
        if _is_key(leaf):
            form = f"key {jax.random.key_impl(leaf)}"
        elif isinstance(leaf, jax.Array):
            form = "weak" if leaf.weak_type else "array"
        else:
            form = "numpy" if isinstance(leaf, (np.ndarray, np.generic)) else "number"
        value = _bare(leaf)
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        found[name] = (name, str(dtype), np.shape(value), form)
    return list(found.values())


def _leaves(about: dict[str, Any]) -> list[_Leaf]:
    return [_Leaf(name, dtype, tuple(shape), form) for name, dtype, shape, form in about["leaves"]]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bare(leaf: Any) -> Any:
    """A random key as the numbers that it is made of."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _spread(leaf: Any) -> bool:
    """Whether an array lies on several devices, so that orbax has to store it shard by shard."""
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _stored(leaf: Any) -> Any:
    value = _bare(leaf)
    return value if _spread(value) else np.asarray(value)


def _wanted(live: Any, leaf: _Leaf) -> Any:
    """What orbax shall make of a stored array: what lies where the run's own array lies."""
    value = _bare(live)
    if _spread(value):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf.dtype)), leaf.shape)


def _placed(value: Any, live: Any, leaf: _Leaf) -> Any:
    """A stored array in the place of the run's own one."""
    if leaf.form == "number":
        return value.item()
    if leaf.form == "numpy":
        return value
    if not isinstance(value, jax.Array):
        # A copy: JAX may take an array of numpy's for its own, and traces are buffers that it writes over.
        value = _weak(value) if leaf.form == "weak" else jnp.array(value)
        home = _bare(live)
        if isinstance(home, jax.Array) and home.committed:
            value = jax.device_put(value, home.sharding)
    return jax.random.wrap_key_data(value, impl=leaf.key) if leaf.key else value


def _weak(value: Any) -> Array:
    """An array whose dtype gives way to another's, as that of a Python number does."""
    weak = jnp.full(value.shape, np.zeros((), value.dtype).item())
    return weak.at[...].set(value) if weak.dtype == value.dtype else jnp.array(value)


# -- what a checkpoint belongs to -------------------------------------------------------------------------------------


def _about(compiled: Compiled) -> dict[str, Any]:
    program = compiled.program
    # What follows a "#" is the user's source line, which may move.
    lines = [line.split("  # ")[0].rstrip() for line in str(program).splitlines()]
    return {
        "format": _FORMAT,
        "algorithm": program.name,
        "program": lines,
        "program_hash": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "constants": _constants_hash(compiled),
    }


def _constants_hash(compiled: Compiled) -> str:
    """A hash of the arrays that the model closes over: masks and fixed weights, often drawn at random."""
    graph = compiled.analysis.model.graph
    digest = hashlib.sha256()
    for operation in graph.operations:
        for operand in operation.inputs:
            if isinstance(operand, Constant) and operand.aval.shape:
                digest.update(str(operand.aval).encode())
                digest.update(np.asarray(_bare(operand.value)).tobytes())
    return digest.hexdigest()


def _settings(run: Step | Learner | TDLearner) -> dict[str, Any]:
    from etcompile.runtime.learn import Learner

    if isinstance(run, Learner):
        return {"of": "a learner", "update_every": run.update_every}
    return {"of": "agents" if isinstance(run, _learners()) else "a step", "update_every": None}


def _compare(where: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless a checkpoint fits."""

    def differs(what: str, got: Any, expected: Any, hint: str | None = None) -> None:
        raise CheckpointError(
            f"{where} does not fit: {what}.",
            got=f"{got} in the checkpoint",
            expected=f"{expected} here",
            hint=hint,
        )

    for key, what in [
        ("format", "it was written by another version of etcompile"),
        ("of", "it was saved of something else"),
        ("algorithm", "another learning rule"),
        ("update_every", "another number of steps between updates"),
    ]:
        if there.get(key) != here[key]:
            differs(what, there.get(key), here[key])
    theirs = {leaf.name: leaf for leaf in _leaves(there)}
    mine = {leaf.name: leaf for leaf in _leaves(here)}
    off = [
        name
        for name in {**theirs, **mine}
        if name not in theirs or name not in mine or not theirs[name].fits(mine[name])
    ]
    if off:
        told = off[:4]
        resized = any(name in theirs and name in mine for name in off)
        more = f" and {len(off) - len(told)} more" if len(off) > len(told) else ""
        differs(
            f"{', '.join(told)}{more}",
            ", ".join(str(theirs.get(name, "nothing")) for name in told),
            ", ".join(str(mine.get(name, "nothing")) for name in told),
            "for another batch size call step.reset(batch_size=...) before restoring." if resized else None,
        )
    if there["program_hash"] != here["program_hash"]:
        pairs = zip([*there["program"], ""], [*here["program"], ""], strict=False)
        got, expected = next(((a, b) for a, b in pairs if a != b), ("more lines", "fewer"))
        differs(
            "another trace program", got.strip(), expected.strip(), "the model or the rule's options changed."
        )
    if there["constants"] != here["constants"]:
        differs(
            "arrays that the model closes over (masks, fixed weights) have other values",
            there["constants"][:12],
            here["constants"][:12],
            "if they are drawn at random, seed them, or keep them in a LongTermState.",
        )


# -- orbax ------------------------------------------------------------------------------------------------------------


def _orbax() -> Any:
    return from_extra("checkpoint", "orbax.checkpoint", "checkpoints need orbax-checkpoint.")


def _read(manager: Any, at: int, where: str, **item: Any) -> Any:
    """The one item of a checkpoint that is asked for."""
    try:
        ((_, found),) = manager.restore(at, args=_orbax().args.Composite(**item)).items()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{where} cannot be read.",
            got=f"{type(error).__name__}: {error}",
            expected="what etcompile.Checkpoints wrote",
            hint="delete this checkpoint to go on from the one before it, or take another directory.",
        ) from error
    return found


def _manager(directory: Path, create: bool, keep: int | None = None) -> Any:
    """An orbax manager, for one operation.

    What a killed save left behind is cleared away by the next save only: who reads may not be the only one at work.
    """
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=create,
        cleanup_tmp_directories=create,
        # Arrays may be donated to the next step: nothing may read them after save() has returned.
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(directory, options=options)
