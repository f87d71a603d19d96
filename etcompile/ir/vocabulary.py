"""What a learning rule can say, a method for each op; :class:`~etcompile.ir.builder.ProgramBuilder` inherits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etcompile.errors import ProgramError
from etcompile.ir.header import Effect, Group, Header, Layer, Relation, Site, name_of
from etcompile.ir.value import Value

__all__ = ["Vocabulary"]


class Vocabulary:
    """A method for each op that learning rules use."""

    header: Header

    def op(self, op: str, *args: Any) -> Value:
        """Append an equation and return its value."""
        raise NotImplementedError

    # -- of one step, by paths within units ------------------------------------------------------------------

    def transition(self, group: Group | str) -> Value:
        """D_t = dh_t/dh_{t-1} of a group, ``[states, states, positions]``."""
        return self.op("transition", group)

    def immediate(self, relation: Relation | str) -> Value:
        """f_t = dh_t/dy_t of a relation, ``[states, span of y]``."""
        return self.op("immediate", relation)

    def presynaptic(self, site: Relation | Site | str) -> Value:
        """x_t: what the operation at the site reads beside the weight."""
        return self.op("presynaptic", _site(site))

    def state(self, group: Group | str) -> Value:
        """h_t: the group's new states, ``[states, positions]``; ``.prev`` is zero at the first step."""
        return self.op("state", group)

    def shown(self, group: Group | str) -> Value:
        """What the group shows to the rest of the network, ``[positions]``: a spike, or the state itself.

        It is what a readout or another layer reads of it. Of several such values it is the sum, so that :meth:`derivative`
        is its derivative whatever the group shows.
        """
        return self.op("shown", group)

    def derivative(self, group: Group | str) -> Value:
        """dshown_t/dh_t, ``[states, positions]``: for a spike the surrogate derivative, by the group's new states."""
        return self.op("derivative", group)

    def signal(self, group: Group | str) -> Value:
        """L_t = dloss_t/dh_t with the group's new states taken as independent, ``[states, positions]``."""
        return self.op("signal", group)

    def shown_signal(self, group: Group | str) -> Value:
        """dloss_t/dshown_t, ``[positions]``: the loss by what the group shows, before the unit's own derivative."""
        return self.op("shown_signal", group)

    def bypass(self, group: Group | str) -> Value:
        """dloss_t/dh_{t-1} along paths that avoid the group's new states, ``[states, positions]``."""
        return self.op("bypass", group)

    def one_step(self, site: Relation | Site | str) -> Value:
        """dloss_t/dy_t by ordinary autodiff with h_{t-1} held constant."""
        return self.op("one_step", _site(site))

    def earlier_credit(self, of: Group | Layer | str) -> Value:
        """L D + K of a group, L H + K of a layer: the loss by the old states, with all paths that the transition follows.

        What a trace of the step before is contracted with.
        """
        name = name_of(of)
        if any(name == layer.name for layer in self.header.layers):
            return self.layer_signal(name) @ self.layer_transition(name) + self.layer_bypass(name)
        credit = self.signal(name) @ self.transition(name)
        return credit + self.bypass(name) if any(self.header.group(name).bypass) else credit

    # -- arithmetic ------------------------------------------------------------------------------------------

    def number(self, value: float) -> Value:
        """A constant as a value, for a recurrence of numbers."""
        return self.op("number", float(value))

    def as_value(self, value: Value | float) -> Value:
        """A number as a value of the program, a value as it is."""
        return value if isinstance(value, Value) else self.number(value)

    def scale(self, units: Value, value: Value) -> Value:
        """A trace or Jacobian of a relation, each entry times the number of its unit.

        ``units`` is a value of the group: ``[states, positions]``, as :meth:`derivative`, or ``[positions]`` for all states
        of a unit alike, as :meth:`shown`; for an influence it is one of the layer.
        """
        return self.op("scale", units, value)

    def outer(self, relation: Relation | Value, x: Value | None = None) -> Value:
        """F (x) x, what this step adds to a trace; of a relation, or of a Jacobian and a presynaptic value."""
        if isinstance(relation, Value):
            if x is None:
                raise ProgramError("outer of a Jacobian needs the presynaptic value as its second argument.")
            return self.op("outer", relation, x)
        return self.op("outer", self.immediate(relation), x or self.presynaptic(relation))

    def norm(self, *values: Value) -> Value:
        """The Euclidean norm of all entries of all values."""
        return self.op("norm", *values)

    def dot(self, a: Value, b: Value) -> Value:
        """The scalar product of two values of one layer's states."""
        return self.op("dot", a, b)

    def changed(self, value: Value) -> Value:
        """1 where any entry of a value differs from zero, else 0."""
        return self.op("changed", value)

    # -- gradients -------------------------------------------------------------------------------------------

    def back(self, signal: Value, jacobian: Value) -> Value:
        """L f: the credit of y that flows through the group."""
        return self.op("back", signal, jacobian)

    def pullback(self, site: Relation | Site | Value, credit: Value) -> Value:
        """Weight gradient of a credit of y: x (x) credit for a matrix."""
        x = site if isinstance(site, Value) else self.presynaptic(site)
        return self.op("pullback", x, credit)

    # -- learning signals of a rule's own --------------------------------------------------------------------

    def error(self) -> Value:
        """dloss_t/dout_t: all outputs of an example in one row, ``[examples, outputs]``."""
        return self.op("error")

    def target(self) -> Value:
        """The first target of the loss, in one row per example; class labels become one-hot rows."""
        return self.op("target")

    def modulator(self, group: Group | str) -> Value:
        """The modulator given with the call, for each unit of the group."""
        return self.op("modulator", group)

    def reward(self) -> Value:
        """The modulator given with the call where it is one number, or one for each example, ``[examples, 1]``."""
        return self.op("reward")

    def of_example(self, group: Group | str, vector: Value) -> Value:
        """The one number of each example, as :meth:`reward`, for each of the group's units."""
        return self.op("of_example", group, vector)

    def by_example(self, site: Relation | Site | str, credit: Value) -> Value:
        """The weight gradient of a credit of y, of each example by itself, ``[examples, weight]``."""
        return self.op("by_example", self.presynaptic(site), credit)

    def weigh(self, vector: Value, gradients: Value) -> Value:
        """Gradients of examples, each times the one number of its example, as :meth:`reward`, summed."""
        return self.op("weigh", vector, gradients)

    def mask(self, group: Group | str) -> Value:
        """The mask that came with the call, for each unit of the group: that of the step, or of each example; else 1."""
        return self.op("mask", group)

    def constant(self, group: Group | str, value: float) -> Value:
        """The same number for each unit of the group."""
        return self.op("constant", group, float(value))

    def random_feedback(self, group: Group | str, seed: int = 0) -> Value:
        """A fixed random matrix B ``[outputs, units]`` for errors, normal with variance 1 / rows."""
        return self.op("random_feedback", group, int(seed))

    def random_projection(self, group: Group | str, seed: int = 0) -> Value:
        """A fixed random matrix B ``[targets, units]`` for targets, normal with variance 1 / rows."""
        return self.op("random_projection", group, int(seed))

    def readout_weight(self, group: Group | str) -> Value:
        """The transposed weight ``[outputs, units]`` of the readout that reads what the group shows."""
        return self.op("readout_weight", group)

    def project(self, vector: Value, feedback: Value) -> Value:
        """An error or target times a feedback matrix: a drive of the group's units."""
        return self.op("project", vector, feedback)

    def read(self, drive: Value, feedback: Value) -> Value:
        """What a fixed readout makes of a group: ``drive @ feedback.T``, a row for each example as in :meth:`target`."""
        return self.op("read", drive, feedback)

    def spread(self, drive: Value) -> Value:
        """A drive as a learning signal of each of the group's new states, past the unit's own derivative; masked as the loss.

        For traces that hold :meth:`derivative` of their own time. With it, ``p.spread(d) * p.derivative(g)`` is
        ``p.through(d)`` where the group shows nothing of its old states.
        """
        return self.op("spread", self.mask(drive.type.of) * drive)

    def through(self, drive: Value) -> Value:
        """A drive of what the group shows to the rest of the network, as a learning signal of its states.

        ``drive`` is ``p.project(p.error(), B)``, ``p.project(p.target(), B)`` or ``p.modulator(group)``. What a group shows
        is what a readout or another layer reads of it: a spike, or the state itself. Where the step, or the example, is
        masked, the signal is zero.
        """
        return self.op("through", drive)

    # -- by all paths of a layer -----------------------------------------------------------------------------

    def layer_transition(self, layer: Layer | str) -> Value:
        """H_t = dh_t/dh_{t-1} of a layer's states by all paths, as an operator: ``H @ J`` pushes, ``L @ H`` pulls back."""
        return self.op("layer_transition", layer)

    def layer_immediate(self, effect: Effect | str) -> Value:
        """F_t = dh_t/dw, ``[states, weight]``."""
        return self.op("layer_immediate", effect)

    def snap_immediate(self, effect: Effect | str, order: int) -> Value:
        """F_t on the pattern of states that a weight reaches within ``order`` steps; ``recur`` keeps to the pattern."""
        return self.op("snap_immediate", effect, order)

    def layer_response(self, effect: Effect | str) -> Value:
        """dh_t/dy_t, ``[states, y]``, example by example."""
        return self.op("layer_response", effect)

    def layer_signal(self, layer: Layer | str) -> Value:
        """dloss_t/dh_t with the layer's new states taken as independent."""
        return self.op("layer_signal", layer)

    def layer_bypass(self, layer: Layer | str) -> Value:
        """dloss_t/dh_{t-1} along paths that avoid the layer's new states."""
        return self.op("layer_bypass", layer)

    def to_layer(self, layer: Layer, signals: Sequence[Value]) -> Value:
        """Signals of a layer's groups, in their order, as one of the layer."""
        return self.op("to_layer", layer, *signals)

    def reach(self, effect: Effect | str, cotangent: Value) -> Value:
        """The credit of y for a cotangent of the layer's new states: one vector-Jacobian product for all effects."""
        return self.op("reach", effect, cotangent)

    def identity(self, layer: Layer | str) -> Value:
        """1 for each unit of a layer with itself, ``[units, units]``, the same for all examples."""
        return self.op("identity", layer)

    def relate(self, matrix: Value, units: Value) -> Value:
        """What a layer's units make of values of them by such a matrix: S v of each example."""
        return self.op("relate", matrix, units)

    def relate_back(self, units: Value, matrix: Value) -> Value:
        """The transposed: v S of each example, of a signal say."""
        return self.op("relate_back", units, matrix)

    def correlate(self, a: Value, b: Value) -> Value:
        """A (x) b of values of a layer's units, mean over examples, ``[units, units]``."""
        return self.op("correlate", a, b)

    def over_examples(self, units: Value) -> Value:
        """The mean over examples of a value of a layer's units, for each example."""
        return self.op("over_examples", units)

    def of_layer(self, group: Group | str, value: Value) -> Value:
        """The part of a layer's value that belongs to a group, ``[states, positions]``."""
        return self.op("of_layer", group, value)

    def along(self, effect: Effect | str, direction: Value) -> Value:
        """F u: the layer's new states along a direction u of the effect's weight, ``[states]``."""
        return self.op("along", effect, direction)

    def row_factor(self, effect: Effect | str) -> Value:
        """x_t with one row for each example, place, and whatever else x depends on."""
        return self.op("row_factor", effect)

    def unit_factor(self, effect: Effect | str) -> Value:
        """x_t for each element of y, so that each may keep another sum of them, ``[y, contracted]``."""
        return self.op("unit_factor", effect)

    def row_norm(self, value: Value) -> Value:
        """The Euclidean norm of the entries that belong to each row."""
        return self.op("row_norm", value)


def _site(of: Relation | Site | str) -> Site | str:
    return of.site if isinstance(of, Relation) else of
