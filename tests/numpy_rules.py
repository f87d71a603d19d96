"""The learning rules in plain numpy over the tables of `numpy_models`, one step at a time, as their papers state them.

A rule is an object with `advance(t)`, which takes one step's `StepTables`, and `gradient(t)`, the gradient of every weight
at that step. `run` drives it. Traces advance whether or not the step has a loss.

Written out per relation, with y's elements as axis y and the effective weight's as axis w:

    f (x) x    [k, y, w]    immediate[k, y] x[y, w]
    D e        [k, y, w]    sum_j D[k, j, at[y]] e[j, y, w]
    L . e      [w]          sum_{k, y} L[k, at[y]] e[k, y, w]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy_models import Array, Arrays, Group, Loss, Model, Site, StepTables

#: (group, outputs, units) -> matrix of shape (outputs, units)
Feedback = Callable[[str, int, int], Array]


# --- Shared pieces --------------------------------------------------------------------------------------------------------


def outer(site: Site) -> Array:
    return site.immediate[:, :, None] * site.x


def faded(group: Group, site: Site, e: Array) -> Array:
    """D e, for traces [K, Y, W] and for Jacobians [K, Y]."""
    return np.einsum("kjy,jy...->ky...", group.transition[:, :, site.at], e)


def contract(signal: Array, site: Site, e: Array) -> Array:
    return np.einsum("ky,kyw->w", signal[:, site.at], e)


def back(signal: Array, site: Site, f: Array | None = None) -> Array:
    """L f: credit of y, [Y]."""
    return np.sum(signal[:, site.at] * (site.immediate if f is None else f), axis=0)


def rest(t: StepTables, name: str) -> Array:
    """Credit of the step that does not pass through L f, as a gradient of the effective weight."""
    site = t.sites[name]
    return (site.credit - back(t.groups[site.group].signal, site)) @ site.x


def through(group: Group, drive: Any) -> Array:
    """A drive on what the group shows, pulled back to its new states: [K, P].

    `drive` is a number, one per unit, or one per unit and example.
    """
    drive = np.asarray(drive, float)
    if drive.size > 1 and drive.size != int(np.prod(group.shape)):
        drive = np.broadcast_to(drive.reshape(1, group.units), (group.shape[0], group.units))
    return group.show * np.broadcast_to(drive.ravel(), (group.show.shape[1],))


def loss_by_shown(group: Group) -> Array:
    """dloss/dshown [P], from the signal of a state through which it passes."""
    row = int(np.argmax(np.abs(group.show).max(axis=1)))
    return group.signal[row] / group.show[row]


def shown_by_y(group: Group, site: Site) -> Array:
    """dshown/dh dh/dy of each state: [K, Y]."""
    return group.show[:, site.at] * site.immediate


def norm(v: Array) -> float:
    return float(np.sqrt(np.sum(v**2)))


class Rule:
    """A rule's state; `values` gives gradients of effective weights, the rest get their one-step gradient."""

    def start(self, t: StepTables) -> None:
        """Make the traces at the first step."""

    def advance(self, t: StepTables) -> None:
        """Traces of this step."""

    def values(self, t: StepTables) -> Arrays:
        return {}

    def held(self) -> Arrays:
        """What stands for dh/d(effective weight) after the last step: [K, Y, E] of a relation, or [states, E]."""
        raise NotImplementedError

    def gradient(self, t: StepTables) -> Arrays:
        found = self.values(t)
        return {
            name: ((found[name] if name in found else t.one_step(name)) @ site.raw).reshape(site.shape)
            for name, site in t.sites.items()
        }


def run(
    rule: Rule,
    model: Model,
    loss: Loss,
    targets: Array,
    *,
    quiet: Sequence[int] = (),
    update: Callable[[Arrays, Arrays], Arrays] | None = None,
) -> tuple[list[StepTables], list[Arrays | None]]:
    """Tables and gradients of every step; steps in `quiet` have no loss. `update(weights, gradients)` changes the weights."""
    weights, states = model.weights, model.states
    tables, grads = [], []
    for k, (x, target) in enumerate(zip(model.xs, targets, strict=True)):
        t = model.tables(weights, states, x, *(() if k in quiet else (target, loss)))
        if not tables:
            rule.start(t)
        rule.advance(t)
        tables.append(t)
        grads.append(None if k in quiet else rule.gradient(t))
        if update is not None and grads[-1] is not None:
            weights = update(weights, grads[-1])
        states = t.states
    return tables, grads


# --- Rules with a trace per relation ------------------------------------------------------------------------------------------


class DRTRL(Rule):
    """e = D e + f (x) x; gradient L . e + rest."""

    def start(self, t):
        self.e = {
            n: np.zeros((len(t.groups[t.sites[n].group].states), *t.sites[n].x.shape)) for n in t.traced
        }

    def advance(self, t):
        for n in t.traced:
            site = t.sites[n]
            self.e[n] = faded(t.groups[site.group], site, self.e[n]) + outer(site)

    def values(self, t):
        return {
            n: contract(t.groups[t.sites[n].group].signal, t.sites[n], self.e[n]) + rest(t, n)
            for n in t.traced
        }

    def held(self):
        return self.e


class PpProp(Rule):
    """xb = a_x xb + x; fb = a_f D fb + (1 - a_f) f; gradient xb (x) (L fb) / (1 - a_f^t) + rest."""

    def __init__(self, decay: float | tuple[float, float] | None = None, rank: int | None = None) -> None:
        if rank is not None:
            decay = (rank - 1) / (rank + 1)
        self.ax, self.af = decay if isinstance(decay, tuple) else (decay, decay)

    def start(self, t):
        self.x = {n: np.zeros_like(t.sites[n].x) for n in t.traced}
        self.f = {n: np.zeros_like(t.sites[n].immediate) for n in t.traced}
        self.steps = 0

    def advance(self, t):
        self.steps += 1
        for n in t.traced:
            site = t.sites[n]
            self.x[n] = self.ax * self.x[n] + site.x
            older = faded(t.groups[site.group], site, self.f[n])
            self.f[n] = self.af * older + (1 - self.af) * site.immediate

    def values(self, t):
        scale = 1 / (1 - self.af**self.steps)
        return {
            n: scale * (back(t.groups[t.sites[n].group].signal, t.sites[n], self.f[n]) @ self.x[n])
            + rest(t, n)
            for n in t.traced
        }

    def held(self):
        scale = 1 / (1 - self.af**self.steps) if self.steps else 0.0
        return {n: scale * f[:, :, None] * self.x[n] for n, f in self.f.items()}


class EProp(DRTRL):
    """e as D-RTRL; eb = kappa eb + e; gradient L . eb, with the true signal or a broadcast error."""

    def __init__(
        self,
        kappa: float = 0.9,
        feedback: str = "symmetric",
        normalize: bool = False,
        feedback_decay: float = 0.01,
        matrix: Feedback | None = None,
    ) -> None:
        self.kappa, self.kind, self.decay, self.matrix = kappa, feedback, feedback_decay, matrix
        self.gain = 1 - kappa if normalize else 1.0

    def start(self, t):
        super().start(t)
        self.filtered = {n: np.zeros_like(e) for n, e in self.e.items()}
        if self.kind != "symmetric":
            self.B = {g: self.matrix(g, t.out.shape[1], group.units) for g, group in t.groups.items()}
        self.seen = t.weights[t.readout]

    def advance(self, t):
        super().advance(t)
        for n in t.traced:
            self.filtered[n] = self.kappa * self.filtered[n] + self.gain * self.e[n]
        readout = t.weights[t.readout]
        if self.kind == "adaptive" and np.any(readout != self.seen):
            self.B[t.read] = (1 - self.decay) * self.B[t.read] + (readout - self.seen).T
        self.seen = readout

    def values(self, t):
        found = {}
        for n, site, group in t.each_traced():
            if self.kind == "symmetric":
                found[n] = contract(group.signal, site, self.filtered[n]) + rest(t, n)
            else:
                found[n] = contract(through(group, t.error @ self.B[site.group]), site, self.filtered[n])
        return found

    def held(self):
        return self.filtered


class EPropWithRate(EProp):
    """E-prop, and c (zb - f) of what a group shows, with the unfiltered trace: zb = mu zb + (1 - mu) z."""

    def __init__(self, rate: float, weight: float, mu: float, **options: Any) -> None:
        super().__init__(**options)
        self.rate, self.weight, self.mu = rate, weight, mu

    def start(self, t):
        super().start(t)
        self.mean = dict.fromkeys(t.groups, 0.0)

    def advance(self, t):
        super().advance(t)
        for n, group in t.groups.items():
            self.mean[n] = self.mu * self.mean[n] + (1 - self.mu) * group.shown

    def values(self, t):
        found = super().values(t)
        for n in t.traced:
            site = t.sites[n]
            drive = self.weight * (self.mean[site.group] - self.rate)
            found[n] = found[n] + contract(through(t.groups[site.group], drive), site, self.e[n])
        return found


class RewardEProp(EProp):
    """F = gamma F + L eb, of each example; gradient reward . F. Credit past the traces is filtered alike."""

    reward: Any = 1.0

    def __init__(self, gamma: float, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = gamma

    def start(self, t):
        super().start(t)
        self.F = dict.fromkeys(t.traced, 0.0)
        self.G = dict.fromkeys(t.sites, 0.0)

    def values(self, t):
        found = {}
        for n, site in t.sites.items():
            credit = site.credit
            of = np.broadcast_to(self.reward, t.batch).repeat(len(credit) // t.batch)  # the reward of each y
            if n in self.F:
                group = t.groups[site.group]
                symmetric = self.kind == "symmetric"
                L = group.signal if symmetric else through(group, t.error @ self.B[site.group])
                self.F[n] = self.gamma * self.F[n] + L[:, site.at, None] * self.filtered[n]
                credit = credit - back(group.signal, site) if symmetric else np.zeros_like(credit)
                found[n] = np.einsum("y,kyw->w", of, self.F[n])
            self.G[n] = self.gamma * self.G[n] + credit[:, None] * site.x
            found[n] = found.get(n, 0.0) + of @ self.G[n]
        return found


class Cascade(Rule):
    """Stages of a state space model dz/ds = A z + b u, u held for a step: z = expm(A) z + (integral of expm(A s) b) u."""

    def __init__(self, delay: float, stages: int) -> None:
        alpha = (stages - 1) / delay
        self.A = -alpha * np.eye(stages) + np.diag(np.ones(stages - 1), -1)
        # expm by scaling and squaring of its series; the integral is the last column of a larger one
        larger = np.zeros((stages + 1, stages + 1))
        larger[:stages, :stages], larger[0, stages] = self.A, 1.0
        whole, term = np.eye(stages + 1), np.eye(stages + 1)
        for k in range(1, 40):
            term = term @ larger / k
            whole = whole + term
        self.keep, self.add = whole[:stages, :stages], whole[:stages, stages]
        answers, z = 0.0, self.add
        for _ in range(int(200 * delay)):
            answers, z = answers + z[-1], self.keep @ z
        self.total = answers

    def start(self, t):
        self.z = {n: np.zeros((len(self.add), *outer(t.sites[n]).shape)) for n in t.traced}

    def advance(self, t):
        for n in t.traced:
            added = np.multiply.outer(self.add, outer(t.sites[n]))
            self.z[n] = np.tensordot(self.keep, self.z[n], 1) + added

    def values(self, t):
        return {
            n: contract(t.groups[t.sites[n].group].signal, t.sites[n], self.z[n][-1] / self.total)
            + rest(t, n)
            for n in t.traced
        }


class ThreeFactor(DRTRL):
    """e as D-RTRL; L is a given modulator: a number, one per unit, or a dict of either by group."""

    modulator: Any = 1.0

    def values(self, t):
        found = {}
        for n in t.traced:
            site = t.sites[n]
            m = self.modulator[site.group] if isinstance(self.modulator, Mapping) else self.modulator
            found[n] = contract(through(t.groups[site.group], m), site, self.e[n])
        return found


class OTTT(Rule):
    """a = leak a + x; gradient a (x) (L f) + rest."""

    def __init__(self, leak: float = 0.9) -> None:
        self.leak = leak

    def start(self, t):
        self.a = {n: np.zeros_like(t.sites[n].x) for n in t.traced}
        self.f = {n: np.zeros_like(t.sites[n].immediate) for n in t.traced}

    def advance(self, t):
        for n in t.traced:
            self.a[n] = self.leak * self.a[n] + t.sites[n].x
            self.f[n] = t.sites[n].immediate

    def held(self):
        return {n: f[:, :, None] * self.a[n] for n, f in self.f.items()}

    def values(self, t):
        return {
            n: back(t.groups[t.sites[n].group].signal, t.sites[n]) @ self.a[n] + rest(t, n) for n in t.traced
        }


class OTPE(Rule):
    """R = leak R + f (x) x, gradient L . R + rest; approximate: z = leak z + x, g = leak g + f, gradient z (x) (L g) + rest."""

    def __init__(self, leak: float = 0.9, approximate: bool = False) -> None:
        self.leak, self.approximate = leak, approximate

    def start(self, t):
        self.R = {n: np.zeros_like(outer(t.sites[n])) for n in t.traced}
        self.z = {n: np.zeros_like(t.sites[n].x) for n in t.traced}
        self.g = {n: np.zeros_like(t.sites[n].immediate) for n in t.traced}

    def advance(self, t):
        for n in t.traced:
            self.R[n] = self.leak * self.R[n] + outer(t.sites[n])
            self.z[n] = self.leak * self.z[n] + t.sites[n].x
            self.g[n] = self.leak * self.g[n] + t.sites[n].immediate

    def values(self, t):
        found = {}
        for n in t.traced:
            signal = t.groups[t.sites[n].group].signal
            if self.approximate:
                found[n] = back(signal, t.sites[n], self.g[n]) @ self.z[n] + rest(t, n)
            else:
                found[n] = contract(signal, t.sites[n], self.R[n]) + rest(t, n)
        return found

    def held(self):
        if self.approximate:
            return {n: g[:, :, None] * self.z[n] for n, g in self.g.items()}
        return self.R


class RFLO(DRTRL):
    """e = leak e + f (x) x, or with the model's own D; L random feedback."""

    def __init__(self, leak: float | None = None, matrix: Feedback | None = None) -> None:
        self.leak, self.matrix = leak, matrix

    def advance(self, t):
        if self.leak is None:
            super().advance(t)
            return
        for n in t.traced:
            self.e[n] = self.leak * self.e[n] + outer(t.sites[n])

    def values(self, t):
        found = {}
        for n, site, group in t.each_traced():
            drive = t.error @ self.matrix(site.group, t.out.shape[1], group.units)
            found[n] = contract(through(group, drive), site, self.e[n])
        return found


class _OfShown(Rule):
    """A rule with a drive of what a group shows: the loss by it, or random feedback."""

    matrix: Feedback | None = None

    def drive(self, t: StepTables, name: str) -> Array:
        group = t.groups[name]
        if self.matrix is None:
            return loss_by_shown(group)
        return (t.error @ self.matrix(name, t.out.shape[1], group.units)).ravel()

    def with_rest(self, t: StepTables, name: str, value: Array) -> Array:
        return value + (rest(t, name) if self.matrix is None else 0.0)


class SuperSpike(_OfShown):
    """a = alpha a + x, xb = beta xb + a, e = gamma e + (psi f) (x) xb; gradient E . e."""

    def __init__(self, alpha=0.8, beta=0.9, gamma=0.9, matrix: Feedback | None = None) -> None:
        self.alpha, self.beta, self.gamma, self.matrix = alpha, beta, gamma, matrix

    def start(self, t):
        self.a = {n: np.zeros_like(t.sites[n].x) for n in t.traced}
        self.x, self.e = dict(self.a), {n: np.zeros_like(outer(t.sites[n])) for n in t.traced}

    def advance(self, t):
        for n in t.traced:
            site = t.sites[n]
            self.a[n] = self.alpha * self.a[n] + site.x
            self.x[n] = self.beta * self.x[n] + self.a[n]
            now = shown_by_y(t.groups[site.group], site)[:, :, None] * self.x[n]
            self.e[n] = self.gamma * self.e[n] + now

    def values(self, t):
        found = {}
        for n in t.traced:
            site = t.sites[n]
            drive = np.broadcast_to(self.drive(t, site.group), t.groups[site.group].show.shape)
            found[n] = self.with_rest(t, n, contract(drive, site, self.e[n]))
        return found


class STLLR(_OfShown):
    """xb = l_post xb + x, P = l_pre P + psi f; gradient E (a_post (psi f) (x) xb + a_pre P_{t-1} (x) x)."""

    def __init__(self, pre=(0.2, -1.0), post=(0.75, 1.0), matrix: Feedback | None = None) -> None:
        self.pre, self.post, self.matrix = pre, post, matrix

    def start(self, t):
        self.x = {n: np.zeros_like(t.sites[n].x) for n in t.traced}
        self.did = {n: np.zeros_like(t.sites[n].immediate) for n in t.traced}

    def advance(self, t):
        self.before = dict(self.did)
        for n in t.traced:
            site = t.sites[n]
            self.x[n] = self.post[0] * self.x[n] + site.x
            self.did[n] = self.pre[0] * self.did[n] + shown_by_y(t.groups[site.group], site)

    def values(self, t):
        found = {}
        for n in t.traced:
            site = t.sites[n]
            E, now = self.drive(t, site.group)[site.at], shown_by_y(t.groups[site.group], site)
            causal = (E * now.sum(axis=0)) @ self.x[n]
            other = (E * self.before[n].sum(axis=0)) @ site.x
            found[n] = self.with_rest(t, n, self.post[1] * causal + self.pre[1] * other)
        return found


class ETLP(OTTT):
    """xb = leak xb + x; gradient xb (x) ((target B) f)."""

    def __init__(self, leak: float = 0.9, matrix: Feedback | None = None) -> None:
        super().__init__(leak)
        self.matrix = matrix

    def values(self, t):
        found = {}
        for n, site, group in t.each_traced():
            drive = t.target @ self.matrix(site.group, t.target.shape[1], group.units)
            found[n] = back(through(group, drive), site) @ self.a[n]
        return found


class Decolle(DRTRL):
    """e as D-RTRL; L is the error of a fixed random readout of what the group shows, through its matrix."""

    def __init__(self, matrix: Feedback | None = None) -> None:
        self.matrix = matrix

    def values(self, t):
        found = {}
        for n, site, group in t.each_traced():
            B = self.matrix(site.group, t.target.shape[1], group.units)
            error = group.shown.reshape(t.batch, -1) @ B.T - t.target
            found[n] = contract(through(group, error @ B), site, self.e[n])
        return found


class Compose(DRTRL):
    """A rule from parts: a trace, its transition (None: the model's own), a learning signal and a filter."""

    def __init__(
        self,
        trace: str = "full",
        leak: float | None = None,
        signal: str = "symmetric",
        filter: float = 0.0,
        normalize: bool = False,
        decay: float = 0.9,
        matrix: Feedback | None = None,
    ) -> None:
        self.trace, self.leak, self.kind = trace, leak, signal
        self.filter, self.gain = filter, 1 - filter if normalize else 1.0
        self.decay, self.matrix = decay, matrix

    def start(self, t):
        super().start(t)
        self.filtered = {n: np.zeros_like(e) for n, e in self.e.items()}
        self.x = {n: np.zeros_like(t.sites[n].x) for n in t.traced}
        self.f = {n: np.zeros_like(t.sites[n].immediate) for n in t.traced}

    def _older(self, t, site, e):
        return faded(t.groups[site.group], site, e) if self.leak is None else self.leak * e

    def advance(self, t):
        for n in t.traced:
            site = t.sites[n]
            if self.trace == "full":
                self.e[n] = self._older(t, site, self.e[n]) + outer(site)
            elif self.trace == "none":
                self.e[n] = outer(site)
            else:
                factored = self.trace == "factored"
                self.x[n] = (self.decay if factored else self.leak) * self.x[n] + site.x
                self.f[n] = site.immediate + (self._older(t, site, self.f[n]) if factored else 0.0)
                self.e[n] = self.f[n][:, :, None] * self.x[n]
            self.filtered[n] = self.filter * self.filtered[n] + self.gain * self.e[n]

    def values(self, t):
        found = {}
        for n, site, group in t.each_traced():
            if self.kind == "symmetric":
                found[n] = contract(group.signal, site, self.filtered[n]) + rest(t, n)
            else:
                vector = t.error if self.kind == "random" else t.target
                drive = vector @ self.matrix(site.group, vector.shape[1], group.units)
                found[n] = contract(through(group, drive), site, self.filtered[n])
        return found

    def held(self):
        return self.filtered


# --- Rules with a full influence --------------------------------------------------------------------------------------------


class Influence(Rule):
    """J = H J + F over sets of states; gradient one_step + (dloss_t/dh_{t-1}) . J_{t-1}.

    ``whole`` takes the network as one layer. ``kept`` may drop entries of the influence, by a pattern made at the start.
    """

    def __init__(self, whole: bool = True) -> None:
        self.whole = whole

    def start(self, t):
        self.J, self.index = {}, {}
        everything = np.arange(len(t.recurrence))
        for n in t.traced:
            self.index[n] = everything if self.whole else t.layers[t.layer_of[n]]
            self.J[n] = np.zeros((len(self.index[n]), t.sites[n].x.shape[1]))
        self.before = self.J

    def kept(self, name: str, J: Array) -> Array:
        return J

    def advance(self, t):
        self.before = self.J
        self.J = {}
        for n, J in self.before.items():
            rows = self.index[n]
            self.J[n] = self.kept(n, t.recurrence[np.ix_(rows, rows)] @ J + t.influence[n][rows])

    def values(self, t):
        return {n: t.one_step(n) + t.past[self.index[n]] @ J for n, J in self.before.items()}

    def held(self):
        return self.J


class RTRL(Influence):
    """Real-time recurrent learning."""


class OSTL(Influence):
    """Per layer the whole recurrence; without it, D-RTRL."""

    def __init__(self) -> None:
        super().__init__(whole=False)


class SnAp(Influence):
    """RTRL with J kept where a weight reaches a state within n steps: the pattern of sum_{k < n} |H|^k |F|.

    ``by_weight`` finds the pattern from the weight itself, otherwise from the effective weight.
    """

    def __init__(self, n: int = 1, by_weight: bool = False) -> None:
        super().__init__()
        self.n, self.by_weight = n, by_weight

    def start(self, t):
        super().start(t)
        self.masks = {}
        H = t.recurrence_pattern.astype(float)
        for name in t.traced:
            raw = (t.sites[name].raw != 0).astype(float)
            F = t.influence_pattern[name].astype(float)
            F = F @ raw if self.by_weight else F
            mask = F > 0
            for _ in range(self.n - 1):
                wider = mask | (H @ mask > 0)
                if np.array_equal(wider, mask):
                    break
                mask = wider
            self.masks[name] = mask @ raw.T > 0 if self.by_weight else mask

    def kept(self, name, J):
        return np.where(self.masks[name], J, 0.0)


class OSTTP(Rule):
    """e of D-RTRL (or of OSTL); L is the target, projected at random."""

    def __init__(self, recurrent: bool = False, matrix: Feedback | None = None) -> None:
        self.inner = OSTL() if recurrent else DRTRL()
        self.recurrent, self.matrix = recurrent, matrix

    def start(self, t):
        self.inner.start(t)

    def advance(self, t):
        self.inner.advance(t)

    def values(self, t):
        target = t.target
        if np.issubdtype(target.dtype, np.integer):
            target = np.eye(t.out.shape[1])[target]
        target = target.reshape(t.batch, -1)
        found = {}
        for n, site, group in t.each_traced():
            signal = through(group, target @ self.matrix(site.group, target.shape[1], group.units))
            if self.recurrent:
                full = np.zeros(len(t.recurrence))
                full[group.index] = signal
                found[n] = full[self.inner.index[n]] @ self.inner.J[n]
            else:
                found[n] = contract(signal, site, self.inner.e[n])
        return found


# --- Unbiased estimates of the influence ---------------------------------------------------------------------------------------

#: Of the passes: keeps the scales finite, and biases nothing.
EPSILON = 1e-7


class UORO(Rule):
    """J is estimated by s (x) theta: hs = H s, th = nu^T F, s = r0 hs + r1 nu, theta = theta / r0 + th / r1.

    ``signs(t)`` gives nu [S] of each step; norms run over all states and over all weights.
    """

    def __init__(self, signs: Callable[[int], Array], epsilon: float = EPSILON) -> None:
        self.signs, self.epsilon = signs, epsilon

    def start(self, t):
        self.steps = 0
        self.s = np.zeros(len(t.recurrence))
        self.theta = {n: np.zeros(t.sites[n].x.shape[1]) for n in t.traced}

    def advance(self, t):
        self.old = self.s, self.theta
        nu = self.signs(self.steps)
        self.steps += 1
        hs = t.recurrence @ self.s
        th = {n: nu @ t.influence[n] for n in self.theta}
        size = norm(np.concatenate(list(self.theta.values())))
        new = norm(np.concatenate(list(th.values())))
        r0 = np.sqrt((size + self.epsilon) / (norm(hs) + self.epsilon))
        r1 = np.sqrt((new + self.epsilon) / (norm(nu) + self.epsilon))
        self.s = r0 * hs + r1 * nu
        self.theta = {n: v / r0 + th[n] / r1 for n, v in self.theta.items()}

    def values(self, t):
        s, theta = self.old
        return {n: t.one_step(n) + (t.past @ s) * v for n, v in theta.items()}


class RankRTRL(Rule):
    """J[:, y, :] for each y as A_y V_y' of rank r, the nearest to H A V' + dh/dy x; of an element-wise weight A alone, exact."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, t):
        self.J = {n: np.zeros((*t.by_y[n].shape, t.sites[n].x.shape[1])) for n in t.traced}
        self.before = self.J

    def advance(self, t):
        self.before, self.J = self.J, {}
        for n, J in self.before.items():
            site = t.sites[n]
            pushed = np.einsum("st,tyw->ysw", t.recurrence, J)
            whole = pushed + np.einsum("sy,yw->ysw", t.by_y[n], site.x)
            a, d, b = np.linalg.svd(whole, full_matrices=False)
            kept = slice(None) if site.elementwise else slice(self.rank)
            self.J[n] = np.einsum("ysr,yr,yrw->syw", a[..., kept], d[:, kept], b[:, kept])

    def values(self, t):
        return {n: t.one_step(n) + np.einsum("s,syw->w", t.past, J) for n, J in self.before.items()}


class KFRTRL(Rule):
    """J of a row of y (an example; a pixel of one) is estimated by u (x) A: u = c1 p1 u + c2 p2 x, A = c1/p1 H A + c2/p2 dh/dy.

    p1 = sqrt(|H A| / |u|), p2 = sqrt(|dh/dy| / |x|), per row. An element-wise weight has no x, and A alone is its J. ``signs(t, name, rows)`` gives c1 and c2, one per row.
    """

    def __init__(
        self, signs: Callable[[int, str, int], tuple[Array, Array]], epsilon: float = EPSILON
    ) -> None:
        self.signs, self.epsilon = signs, epsilon

    def start(self, t):
        self.steps = 0
        self.u = {
            n: np.zeros_like(t.sites[n].x) for n in t.traced
        }  # [Y, W]: the vector of y's row, where y meets it
        self.A = {n: np.zeros_like(t.by_y[n]) for n in t.traced}

    def advance(self, t):
        self.old = dict(self.u), dict(self.A)
        for n in t.traced:
            site = t.sites[n]
            same = site.row[:, None] == site.row  # [Y, Y]

            def over_row(A, same=same):
                return np.sqrt(same @ np.sum(A**2, axis=0))

            def along(u):
                return np.sqrt(np.sum(u**2, axis=1))

            faded_A, dh = t.recurrence @ self.A[n], t.by_y[n]
            if site.elementwise:
                self.u[n], self.A[n] = site.x, faded_A + dh
                continue
            p1 = np.sqrt((over_row(faded_A) + self.epsilon) / (along(self.u[n]) + self.epsilon))
            p2 = np.sqrt((over_row(dh) + self.epsilon) / (along(site.x) + self.epsilon))
            c1, c2 = (np.asarray(c)[site.row] for c in self.signs(self.steps, n, site.row.max() + 1))
            self.u[n] = (c1 * p1)[:, None] * self.u[n] + (c2 * p2)[:, None] * site.x
            self.A[n] = faded_A * (c1 / p1) + dh * (c2 / p2)
        self.steps += 1

    def values(self, t):
        u, A = self.old
        return {n: t.one_step(n) + (t.past @ A[n]) @ u[n] for n in t.traced}


class Dodge(Rule):
    """s = H s + F u with one u for the whole sequence; gradient one_step + (dloss_t/dh_{t-1} . s_{t-1}) u."""

    def __init__(self, direction: Callable[[str], Array]) -> None:
        self.direction = direction

    def start(self, t):
        self.s = np.zeros(len(t.recurrence))
        self.u = {n: np.ravel(self.direction(n)) for n in t.traced}

    def advance(self, t):
        self.before = self.s
        self.s = t.recurrence @ self.s + sum(t.influence[n] @ u for n, u in self.u.items())

    def values(self, t):
        return {n: t.one_step(n) + (t.past @ self.before) * u for n, u in self.u.items()}


class SubsetRTRL(Influence):
    """J = H P J + F; ``weights(step)`` gives the diagonal of P."""

    def __init__(self, weights: Callable[[int], Array]) -> None:
        super().__init__()
        self.weights, self.steps = weights, 0

    def advance(self, t):
        self.before, P = self.J, self.weights(self.steps)
        self.steps += 1
        self.J = {n: t.recurrence @ (P[:, None] * J) + t.influence[n] for n, J in self.before.items()}


class KroneckerSum(KFRTRL):
    """Optimal Kronecker sum: J of a row of y is sum_k u_k (x) A_k; of r + 1 of them r are made.

    By singular values d of the row's sum, with p = min(1, d / tau), sum p = r, z = sqrt(1 - p) and random signs s: the new sum is
    a S (1 - z z^T) S b^T, S = diag(s sqrt(d / p)). ``signs(t, name, rows)`` gives s, r + 1 for each row.
    """

    def __init__(self, rank: int, signs: Callable[[int, str, int], Array]) -> None:
        self.rank, self.signs = rank, signs

    def start(self, t):
        self.steps = 0
        self.u = {n: [np.zeros_like(t.sites[n].x)] * self.rank for n in t.traced}
        self.A = {n: [np.zeros_like(t.by_y[n])] * self.rank for n in t.traced}

    def advance(self, t):
        self.old = dict(self.u), dict(self.A)
        for n in t.traced:
            site = t.sites[n]
            pushed = [t.recurrence @ A for A in self.A[n]]
            if site.elementwise:
                self.u[n], self.A[n] = [site.x], [pushed[0] + t.by_y[n]]
                continue
            u, A = np.array([*self.u[n], site.x]), np.array([*pushed, t.by_y[n]])
            new_u, new_A = np.zeros_like(u[:-1]), np.zeros_like(A[:-1])
            signs = self.signs(self.steps, n, site.row.max() + 1)
            for row in range(site.row.max() + 1):
                (ys,) = np.nonzero(site.row == row)
                flat = A[:, :, ys].reshape(len(A), -1)
                a, d, b = np.linalg.svd(u[:, ys[0]].T @ flat, full_matrices=False)
                a, d, b = a[:, : len(A)], d[: len(A)], b[: len(A)]
                turn = np.array([np.sign(v[np.argmax(np.abs(v))]) or 1.0 for v in a.T])
                d, b = np.where(d > 1e-13 * d[0], d, 0.0), turn[:, None] * b
                mixed = self.mixed(d, signs[row])
                small = mixed[: len(d)] / np.where(d > 0, d, 1.0)[:, None] * (d > 0)[:, None]
                for y in ys:
                    new_u[:, y] = (u[:, y].T @ (flat @ b.T) @ small).T
                new_A[:, :, ys] = (mixed[: len(d)].T @ b).reshape(self.rank, -1, ys.size)
            self.u[n], self.A[n] = list(new_u), list(new_A)
        self.steps += 1

    def mixed(self, d: Array, signs: Array) -> Array:
        """S Z with Z Z^T = 1 - z z^T, by an eigenbasis of it: [r + 1, r]."""
        r = self.rank
        d = np.concatenate([d, np.zeros(r + 1 - len(d))])
        if np.count_nonzero(d) <= r:
            return np.diag(signs * np.sqrt(d))[:, :r]
        m = next(m for m in range(r) if (r - m) * d[m] <= d[m:].sum())
        tau = d[m:].sum() / (r - m)
        p = np.where(np.arange(r + 1) < m, 1.0, d / tau)
        z = np.sqrt(np.maximum(1 - p, 0.0))
        _, basis = np.linalg.eigh(np.outer(z, z))  # the last one is z
        return np.diag(signs * np.sqrt(d / p)) @ basis[:, :r]

    def values(self, t):
        u, A = self.old
        return {
            n: t.one_step(n) + sum((t.past @ A_k) @ u_k for u_k, A_k in zip(u[n], A[n], strict=True))
            for n in t.traced
        }


class KeRNL(Rule):
    """dh_i(t + n)/dh_j(t) = beta_ij k_j^n, both learned from what noise does; ``signs(step)`` gives the noise [S].

    beta and k are of one example: ``unit`` [S] numbers the units of an example, the same in all.
    """

    def __init__(self, kernel: float, rate: float, signs: Callable[[int], Array]) -> None:
        self.kernel, self.rate, self.signs, self.steps = kernel, rate, signs, 0

    def start(self, t):
        S = len(t.recurrence)
        self.example = np.concatenate(
            [np.repeat(np.arange(t.batch), v.size // t.batch) for v in t.states.values()]
        )
        starts = np.cumsum([0, *(v.size // t.batch for v in t.states.values())])
        self.unit = np.concatenate(
            [
                a + np.tile(np.arange(v.size // t.batch), t.batch)
                for a, v in zip(starts, t.states.values(), strict=False)
            ]
        )
        n = S // t.batch
        self.beta, self.k = np.eye(n), np.full(n, self.kernel)
        self.s, self.omega, self.gamma = np.zeros(S), np.zeros(S), np.zeros(S)
        self.e = {m: np.zeros_like(outer(t.sites[m])) for m in t.traced}

    def rows(self, v):
        found = np.zeros((self.example.max() + 1, len(self.beta)))
        found[self.example, self.unit] = v
        return found

    def advance(self, t):
        self.before, self.used = dict(self.e), self.beta
        noise, k = self.signs(self.steps), self.k[self.unit]
        self.steps += 1
        self.s = t.recurrence @ self.s + noise
        self.gamma = k * self.gamma + self.omega
        self.omega = k * self.omega + noise
        omega = self.rows(self.omega)
        error = omega @ self.beta.T - self.rows(self.s)
        for m in t.traced:
            site = t.sites[m]
            units = k[t.groups[site.group].index][:, site.at]
            self.e[m] = units[:, :, None] * self.e[m] + outer(site)
        slope = np.mean(error @ self.beta * self.rows(self.gamma), axis=0)
        self.k = np.clip(self.k - self.rate * slope, 0, 0.999)
        self.beta = self.beta - self.rate * error.T @ omega / len(omega)

    def values(self, t):
        credit = (self.rows(t.past) @ self.used)[self.example, self.unit]
        return {
            m: t.one_step(m) + contract(credit[t.groups[t.sites[m].group].index], t.sites[m], e)
            for m, e in self.before.items()
        }


# --- Windows ----------------------------------------------------------------------------------------------------------------------


def backpropagate(tables: Sequence[StepTables]) -> tuple[Arrays, Array]:
    """Gradient of a window's summed loss with the states at its start constant, and its derivative by those states."""
    total = {n: np.zeros(site.x.shape[1]) for n, site in tables[0].sites.items()}
    total = {n: v @ tables[0].sites[n].raw for n, v in total.items()}
    later = np.zeros(len(tables[0].recurrence))  # dloss of later steps by this step's states
    for t in reversed(tables):
        for n, site in t.sites.items():
            if t.loss is not None:
                total[n] = total[n] + t.one_step(n) @ site.raw
            if n in t.influence:
                total[n] = total[n] + later @ t.influence[n] @ site.raw
        later = later @ t.recurrence + (0.0 if t.past is None else t.past)
    return {n: v.reshape(tables[0].sites[n].shape) for n, v in total.items()}, later


def bptt(tables: Sequence[StepTables], window: int | None = None) -> list[Arrays]:
    """Truncated backpropagation: the gradient of each window of W steps (None: of the whole)."""
    size = window or len(tables)
    return [backpropagate(tables[k : k + size])[0] for k in range(0, len(tables), size)]


def exact_within(rule: Rule, tables: Sequence[StepTables], window: int) -> list[Arrays]:
    """``within="exact"``: backpropagation in each window, and what the trace at its start adds."""
    rule.start(tables[0])
    found = []
    for k in range(0, len(tables), window):
        part = tables[k : k + window]
        total, at_start = backpropagate(part)
        for n in part[0].traced:
            site = part[0].sites[n]
            if isinstance(rule, Influence):
                earlier = at_start[rule.index[n]] @ rule.held()[n]
            else:
                earlier = contract(at_start[part[0].groups[site.group].index], site, rule.held()[n])
            total[n] = total[n] + (earlier @ site.raw).reshape(site.shape)
        found.append(total)
        for t in part:
            rule.advance(t)
    return found


def summed(grads: Sequence[Arrays]) -> Arrays:
    return {n: np.sum([g[n] for g in grads], axis=0) for n in grads[0]}
