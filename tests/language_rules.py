"""Rules of nobody's that say what rules can say and those that ship mostly do not, each with the same in plain numpy."""

from __future__ import annotations

import numpy as np
from numpy_rules import DRTRL, contract, faded, loss_by_shown, outer

import etcompile

__all__ = ["FILTERED", "PRODUCTS", "Filtered", "Products"]


@etcompile.algorithm("products", preserves="changes", leaves_out="a rule of the tests")
def PRODUCTS(p):
    """Activity in products with traces; a local error; a mean of what a group shows, which a reset leaves alone."""
    for r in p.relations:
        g = r.group
        s, B = p.shown(g), p.random_projection(g)
        mean, e = p.carry("drive", g, lasting=True), p.carry("trace", r)
        p.define(mean, 0.5 * mean.prev + (s - p.constant(g, 0.1)))
        p.define(e, p.scale(0.3 * p.state(g), e.prev) + p.scale(mean, p.outer(r)))
        drive = p.project(p.read(s, B) - p.target(), B) + p.shown_signal(g)
        p.gradient(r, p.contract(p.spread(drive) * p.derivative(g), e), within="outside")


@etcompile.algorithm("filtered_loss", preserves="changes", leaves_out="a rule of the tests")
def FILTERED(p, gamma=0.8):
    """What each step's loss asks of a trace, filtered, once for each example and once for the whole weight."""
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        L = p.signal(r.group)
        m, G = p.learning_carry("trace", r), p.learning_carry("gradient", r.site)
        p.define(m, gamma * m.prev + p.scale(L, e))
        p.define(G, gamma * G.prev + p.contract(L, e))
        p.gradient(r, p.contract(p.spread(p.constant(r.group, 0.5)), m) + 2.0 * G, within="outside")


class Products(DRTRL):
    """`products` in numpy."""

    def __init__(self, matrix):
        self.matrix = matrix

    def start(self, t):
        super().start(t)
        self.mean = dict.fromkeys(t.groups, 0.0)

    def advance(self, t):
        for n in t.groups:
            self.mean[n] = 0.5 * self.mean[n] + t.groups[n].shown - 0.1
        for n, site, group in t.each_traced():
            h = np.concatenate([v.ravel() for v in t.states.values()])[group.index]
            mean = self.mean[site.group][site.at]
            self.e[n] = 0.3 * h[:, site.at, None] * self.e[n] + mean[:, None] * outer(site)

    def values(self, t):
        found = {}
        for n, site, group in t.each_traced():
            B = self.matrix(site.group, t.target.shape[1], group.units)
            error = group.shown.reshape(t.batch, -1) @ B.T - t.target
            drive = (error @ B).ravel() + loss_by_shown(group)
            found[n] = contract(drive * group.show, site, self.e[n])
        return found


class Filtered(DRTRL):
    """`filtered_loss` in numpy; ``gradient`` is asked at steps with a loss alone."""

    def start(self, t):
        super().start(t)
        self.m = {n: np.zeros(e.shape[2]) for n, e in self.e.items()}

    def advance(self, t):
        for n in t.traced:
            site = t.sites[n]
            self.e[n] = faded(t.groups[site.group], site, self.e[n]) + outer(site)

    def values(self, t):
        for n in t.traced:
            site = t.sites[n]
            self.m[n] = 0.8 * self.m[n] + contract(t.groups[site.group].signal, site, self.e[n])
        return {n: 2.5 * m for n, m in self.m.items()}
