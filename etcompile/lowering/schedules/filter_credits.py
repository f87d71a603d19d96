"""Credits that meet filtered presynaptic values in a chunk, as credits of what is filtered.

A filter z_t = d z_{t-1} + x_t is the same for all weights of a site, so it can be taken of the credits instead:

    sum_t z_t (x) q_t = sum_t x_t (x) p_t + z_0 (x) d p_1,    p_t = q_t + d p_{t+1}

With p all that meets x, filtered or not, is in one product over time, where z would take another one. As for traces
(:mod:`etcompile.lowering.schedules.recurrence`), p is the program's own equations transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, made_from
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.schedules.recurrence import value_key

__all__ = ["FilterCredits", "Met"]

Array = Any


@dataclasses.dataclass(frozen=True)
class Met:
    """Credits by what they meet.

    Attributes
    ----------
    steps : dict of str to array
        Credits of all steps, by the value that each meets.
    start : dict of str to array
        Credits by the filter that each meets as it was before the chunk.
    """

    steps: dict[str, Array]
    start: dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class FilterCredits:
    """The filters of one site.

    Parameters
    ----------
    context : Context
        Knows program and model, but no step.
    site : str
    """

    context: Context
    site: str

    def __call__(self, credits: Sequence[Mapping[str, Array]]) -> list[Met]:
        """For each of several sums of products over time the same with fewer products, where filters can be taken of credits.

        Each has credits of all steps, time on axis 0, by the value that they meet (:func:`value_key`).
        """
        named = [self._by_one_name(each) for each in credits]
        found = [Met(each, {}) for each in named]
        chosen = [k for k, each in enumerate(named) if self._pays(each)]
        if chosen:
            for k, met in zip(chosen, self._transposed([named[k] for k in chosen]), strict=True):
                found[k] = met
        return found

    def _pays(self, credits: Mapping[str, Array]) -> bool:
        """Whether there are fewer products then. Where x has one number for an element of y, nothing is a product."""
        if self.context.model.sites[self.site].unfiltered:
            return any(map(self._is_filter, credits))
        if math.prod(self.context.model.sites[self.site].contracted) == 1:
            return False
        return len(self._named(self._sources(self._needed(credits)), credits)) < len(credits)

    def _named(self, sources: Iterable[str], credits: Iterable[str]) -> set[str]:
        """What credits meet in the end: sources, and values that are no filters."""
        return {self._one_name(key) for key in (*sources, *(k for k in credits if not self._is_filter(k)))}

    def _transposed(self, credits: Sequence[Mapping[str, Array]]) -> list[Met]:
        needed = self._needed({key for each in credits for key in each})
        carried = [e.name for e in needed if e.name in self.context.program.carried]
        of_filters = [{k: v for k, v in each.items() if self._is_filter(k)} for each in credits]

        def like(each: Mapping[str, Array], steps: bool) -> Any:
            value = next(iter(each.values()))
            dtype = jnp.result_type(*each.values())
            return jax.ShapeDtypeStruct(value.shape if steps else value.shape[1:], dtype)

        sources = [{key: like(each, True) for key in self._sources(needed)} for each in of_filters]
        start = [{name: like(each, False) for name in carried} for each in of_filters]

        def one(before: list[dict[str, Array]], now: list[dict[str, Array]]) -> Any:
            kept, outs = [], []
            for was, given, asked in zip(before, now, of_filters, strict=True):
                late = {key.removesuffix("'"): v for key, v in given.items() if key.endswith("'")}
                found = evaluate(self.context, needed, given, {**was, **late})
                kept.append({name: found[name] for name in was})
                outs.append(
                    {key: found[key] if key in found else was[key.removesuffix("'")] for key in asked}
                )
            return kept, outs

        def run(sources: list[dict[str, Array]], start: list[dict[str, Array]]) -> list[dict[str, Array]]:
            return lax.scan(one, start, sources)[1]

        asked = [
            {key: v.astype(jnp.result_type(*each.values())) for key, v in each.items()} for each in of_filters
        ]
        by_source, by_start = jax.linear_transpose(run, sources, start)(asked)
        met = []
        for each, of_source, of_start in zip(credits, by_source, by_start, strict=True):
            steps = {key: v for key, v in each.items() if not self._is_filter(key)}
            for key, v in of_source.items():
                name = self._one_name(key)
                steps[name] = steps[name] + v if name in steps else v
            met.append(Met(steps, of_start))
        return met

    # -- the program ----------------------------------------------------------------------------------------------

    @cached_property
    def _filters(self) -> dict[str, Equation]:
        """Values of the site that are sums of such values, and numbers times one."""
        return {
            e.name: e
            for e in self.context.program.equations
            if KINDS[e.type.kind].filtered and e.type.of == self.site and self._linear(e)
        }

    def _linear(self, e: Equation) -> bool:
        alike = all(self.context.program.equation(ref.name).type == e.type for ref in e.refs)
        return alike and (bool(OPS[e.op].terms) or (bool(OPS[e.op].power) and len(e.refs) == 1))

    def _is_filter(self, key: str) -> bool:
        return key.removesuffix("'") in self._filters

    def _needed(self, keys: Iterable[str]) -> list[Equation]:
        """The filters that these values are made of, in the program's order."""
        names = made_from(self._filters.values(), (key.removesuffix("'") for key in keys))
        return [e for name, e in self._filters.items() if name in names]

    def _sources(self, filters: Iterable[Equation]) -> list[str]:
        """What filters are made of that is none."""
        read = (ref for e in filters for ref in e.refs if ref.name not in self._filters)
        return list(dict.fromkeys(map(value_key, read)))

    def _by_one_name(self, credits: Mapping[str, Array]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for key, v in credits.items():
            name = self._one_name(key)
            found[name] = found[name] + v if name in found else v
        return found

    def _one_name(self, key: str) -> str:
        """Of a presynaptic value and the same as an array the first."""
        return self._twins.get(key, key)

    @cached_property
    def _twins(self) -> dict[str, str]:
        of_site = [e for e in self.context.program.equations if e.type.of == self.site and not e.refs]
        plain = next((e for e in of_site if KINDS[e.type.kind].as_array), None)
        if plain is None:
            return {}
        as_array = KINDS[plain.type.kind].as_array
        return {e.name: plain.name for e in of_site if e.op == as_array}
