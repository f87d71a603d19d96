"""How a rule's equations are computed, apart from what they are: chunks, memory, precision, devices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from etcompile.errors import OptionError
from etcompile.integers import as_integer, positive_integer
from etcompile.keywords import named_arguments

__all__ = ["Schedule", "as_schedule", "check_chunk", "require_divisible_batch"]

#: Bytes that what is stacked over a chunk's steps may take, unless the schedule says otherwise.
MEMORY = 256 << 20


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the equations of a learning rule are computed; the gradient is the same for all, to the precision chosen.

    Parameters
    ----------
    chunk : int or "auto"
        Steps that ``scan_value_and_grad`` handles together. ``"auto"``: as many as pay off within ``memory``. 1: step by step.
    memory : int
        Bytes that may be used beside parameters, states, traces, inputs and outputs, for ``chunk="auto"``. Where no traces are
        kept, a sequence that is one chunk needs none, and may take their bytes as well.
    trace_dtype : dtype, optional
        What traces are stored in between steps (in chunks: between chunks), ``"bfloat16"`` or ``"float16"`` say. They are
        computed in the model's precision, and rounded when they are stored; sums are taken in float32 at least. None: as
        the model. A trace that is no wider keeps its own dtype; one with filtered inputs in its place has nothing to narrow.
    keep_traces : bool
        False: every call of ``scan_value_and_grad`` is a sequence of its own, whose traces start at zero and are given up at its
        end; states go on. Operations whose traces have no closed form, and would be too large to store, then learn too. Nothing
        learns step by step. A sequence that ``memory`` holds is one chunk; a longer one is run in blocks of steps, forwards for
        their first states and then block by block from the last, each step twice, with the same gradient: memory is that of
        one block and of a state for each, at best in proportion to the root of the steps. A step that prints or calls back to
        Python runs once, in chunks with traces from one to the next; so do steps where ``chunk`` is a number, and models whose
        traces take less than to run a step twice, such as a GRU with ``d_rtrl``. True: those of a sequence that starts
        anew are made when somebody asks for them, where that takes no more memory (:meth:`Step.scan_value_and_grad`).
    events : float, optional
        The part of a sparse weight's synapses, above 0 and up to 1, that send something in one step, at most: 0.05 where 5 % of
        the neurons spike. Sequences then run in chunks that take the synapses of those that send alone; a step in which more is
        sent takes all of them, with the same result. None: always all of them.
    write_every : int or "auto"
        Where steps run one by one: after how many a trace of a matrix or kernel is written. In between what is added stands
        beside it, and a gradient reads the trace and a product of what was added; numbers are equal to rounding. It saves two
        of three passes over the trace for a product of more rows. ``"auto"``: by size, in memory that is slow beside products,
        on a processor and without a mesh; else 1, at every step.
    mesh : jax.sharding.Mesh, optional
        Devices over which parameters, states and traces are split. How its axes are typed does not matter.
    batch : str or tuple of str, optional
        Axes of the mesh over which the examples of a batch are split; their number must be a multiple of these devices.
    units : str or tuple of str, optional
        Axes of the mesh over which the units of each layer are split: the output axes of weights, and the unit axes of states
        and traces. What does not divide stays whole, and ``step.report()`` says so.
    how : str, optional
        The schedule by name: ``"steps"``, ``"chunks"``, ``"events"``, ``"windows"``, ``"replay"`` (see ``keep_traces``), or one
        of your own (:func:`etcompile.register_schedule`).
        None: what fits the rule, ``chunk`` and ``memory``.

    Raises
    ------
    OptionError
        For values that make no sense; by ``compile`` for a ``trace_dtype`` wider than the model's traces.

    Examples
    --------
    >>> import etcompile
    >>> etcompile.Schedule(chunk=50).chunk
    50
    >>> import jax
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    >>> etcompile.Schedule(mesh=mesh, batch="data", units="model").unit_axes
    ('model',)
    """

    chunk: int | str = "auto"
    memory: int = MEMORY
    trace_dtype: Any = None
    keep_traces: bool = True
    events: float | None = None
    write_every: int | str = "auto"
    mesh: Mesh | None = None
    batch: str | tuple[str, ...] | None = None
    units: str | tuple[str, ...] | None = None
    how: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk", check_chunk(self.chunk))
        memory = as_integer(self.memory)
        if memory is None or memory < 1:
            raise OptionError("memory must be a positive number of bytes.", got=f"memory={self.memory!r}")
        object.__setattr__(self, "memory", memory)
        if self.how is not None and not isinstance(self.how, str):
            raise OptionError("how must be the name of a schedule, or None.", got=f"how={self.how!r}")
        if not isinstance(self.keep_traces, bool):
            raise OptionError("keep_traces must be True or False.", got=f"keep_traces={self.keep_traces!r}")
        if self.write_every != "auto":
            every = positive_integer("write_every", self.write_every, otherwise=", or 'auto'")
            object.__setattr__(self, "write_every", every)
            _check_deferring(self)
        if self.events is not None:
            _check_share(self.events)
        if self.trace_dtype is not None:
            _check_floating(self.trace_dtype)
        _check_mesh(self)

    @property
    def writes_later(self) -> bool:
        """Whether traces may be written later than at the step that changes them."""
        return self.write_every != 1 and self.keep_traces

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes of the mesh for examples."""
        return _names(self.batch)

    @property
    def unit_axes(self) -> tuple[str, ...]:
        """Axes of the mesh for units."""
        return _names(self.units)


Schedule.__init__ = named_arguments("Schedule")(Schedule.__init__)


def _check_deferring(schedule: Schedule) -> None:
    """Refuse to write traces later where there are none."""
    if schedule.write_every != 1 and not schedule.writes_later:
        raise OptionError(
            "traces cannot be written later where none are kept.",
            got=f"write_every={schedule.write_every}, keep_traces={schedule.keep_traces}",
            expected="write_every=1, or 'auto'",
        )


def _check_share(events: Any) -> None:
    number = isinstance(events, (int, float)) and not isinstance(events, bool)
    if not (number and 0 < events <= 1):
        raise OptionError(
            "events must be the part of the synapses that send in one step, at most.",
            got=f"events={events!r}",
            expected="a number above 0 and at most 1, such as 0.05 for 5 %, or None",
        )


def _check_floating(dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise OptionError(
            "trace_dtype must be a floating-point dtype.",
            got=f"trace_dtype={dtype!r}",
            expected="'bfloat16', 'float16', 'float32', ..., or None: as the model",
        )


def check_chunk(chunk: Any) -> Any:
    """``chunk``, a positive integer or ``"auto"``."""
    if isinstance(chunk, str) and chunk == "auto":
        return chunk
    return positive_integer("chunk", chunk, otherwise=", or 'auto'")


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _check_mesh(schedule: Schedule) -> None:
    mesh = schedule.mesh
    for option, axes in (("batch", schedule.batch), ("units", schedule.units)):
        names = isinstance(axes, tuple) and axes != () and all(isinstance(a, str) for a in axes)
        if not (axes is None or isinstance(axes, str) or names):
            raise OptionError(
                f"{option} must name axes of the mesh.",
                got=f"{option}={axes!r}",
                expected="a name, or a tuple of names",
            )
    wanted = (*schedule.batch_axes, *schedule.unit_axes)
    if mesh is None:
        if wanted:
            raise OptionError(
                "there is no mesh to split over.",
                got=f"batch={schedule.batch!r}, units={schedule.units!r}, mesh=None",
                hint="mesh=jax.make_mesh((4, 2), ('data', 'model')), for example.",
            )
        return
    if not isinstance(mesh, Mesh):
        raise OptionError("mesh must be a jax.sharding.Mesh.", got=f"mesh={mesh!r}")
    if not wanted:
        raise OptionError(
            "a mesh needs to be told what is split over its axes.",
            got=f"mesh with axes {mesh.axis_names}, batch=None, units=None",
            expected="batch=, units= or both",
        )
    for name in wanted:
        if name not in mesh.axis_names:
            raise OptionError(
                f"the mesh has no axis {name!r}.",
                got=f"batch={schedule.batch!r}, units={schedule.units!r}",
                expected=f"names among {mesh.axis_names}",
            )
    if len(set(wanted)) != len(wanted):
        raise OptionError(
            "an axis of the mesh can split one thing only.",
            got=f"batch={schedule.batch!r}, units={schedule.units!r}",
        )


def require_divisible_batch(schedule: Schedule, size: int) -> None:
    """Raise :class:`OptionError` where examples cannot be shared out evenly."""
    if schedule.mesh is None:
        return
    parts = math.prod(schedule.mesh.shape[a] for a in schedule.batch_axes)
    if size % parts:
        raise OptionError(
            f"{size} examples cannot be split evenly over {parts} devices.",
            got=f"batch={schedule.batch!r} of a mesh with {dict(schedule.mesh.shape)}",
            expected=f"a batch size that is a multiple of {parts}",
        )


def as_schedule(schedule: Any) -> Schedule:
    """What ``compile(schedule=...)`` was given as a :class:`Schedule`."""
    if schedule is None:
        return Schedule()
    if isinstance(schedule, str) and schedule == "causal":
        return Schedule(chunk=1)
    if isinstance(schedule, Schedule):
        return schedule
    raise OptionError(
        "there is no such schedule.",
        got=f"schedule={schedule!r}",
        expected="None, 'causal' or etcompile.Schedule(...)",
    )
