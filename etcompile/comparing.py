"""``compare()``: one model, traced and analysed once, lowered for every rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etcompile.comparison import Comparison, RuleRow
from etcompile.compiled import Compiled
from etcompile.compiler import analysed, lower_analysed, opened, requested
from etcompile.cost.cost import Cost
from etcompile.errors import AlgorithmError, EtcompileError, OptionError, UnsupportedError
from etcompile.keywords import refuse_others
from etcompile.paths import patterns_of
from etcompile.registry import Algorithm, Rule, shipped_names
from etcompile.runtime.cost import as_targets, check_run, program_cost
from etcompile.runtime.losses import check_callable
from etcompile.schedule import Schedule, as_schedule

__all__ = ["compare"]

#: How a rule or its schedule says that it cannot run so; any other error is about the loss, and is the caller's to see.
_REFUSALS = (AlgorithmError, OptionError, UnsupportedError)

_KEYWORDS = (
    "rules", "batch_size", "schedule", "within", "exclude", "steps", "chunk", "loss_fn", "targets", "has_aux",
)  # fmt: skip


def compare(
    model: Any,
    *example_inputs: Any,
    rules: Iterable[Any] | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    schedule: Schedule | str | None = None,
    within: str = "rule",
    exclude: str | Iterable[str] = (),
    steps: int | None = None,
    chunk: int | str | None = None,
    loss_fn: Callable | None = None,
    targets: tuple[Any, ...] = (),
    has_aux: bool = False,
    **others: Any,
) -> Comparison:
    """Learning rules side by side for one model: memory, operations, traffic, exactness, and what each leaves out.

    Nothing is run, allocated or compiled by XLA, and the model stays as it is: it may be shapes alone. It is traced and analysed
    once, whatever the number of rules.

    Parameters
    ----------
    model, *example_inputs, batch_size, schedule, within, exclude
        As for :func:`etcompile.compile`.
    rules : sequence of str, rule, dict or list of passes, or a dict of these by label, optional
        What ``compile(algo=...)`` takes, each with its own row. All rules that come with etcompile by default, with their own
        options.
    steps, chunk, loss_fn, targets, has_aux
        The run whose cost is found, as for :meth:`etcompile.Step.cost`: by default one call of ``value_and_grad``, with the mean
        squared difference from a target like the outputs.

    Returns
    -------
    Comparison
        A row for each rule; one that refuses the model, or the run, says why.

    Raises
    ------
    ModelError, InputError, OptionError, AlgorithmError
        For a model that no rule could take, options that make no sense, a rule that does not exist, a loss that fails.

    Examples
    --------
    >>> import etcompile, jax.numpy as jnp
    >>> def leaky(params, state, x):
    ...     h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
    ...     return {"h": h}, h
    >>> model = etcompile.from_function(leaky, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    >>> found = etcompile.compare(model, jnp.ones((2, 3)), rules=["d_rtrl", "pp_prop"])
    >>> [(row.rule, row.exact) for row in found]
    [('d_rtrl', True), ('pp_prop', False)]
    >>> found["pp_prop"].trace_bytes < found["d_rtrl"].trace_bytes
    True
    """
    refuse_others("compare", others, _KEYWORDS)
    how = as_schedule(schedule)
    asked = {
        label: requested(algo, {}, how, within, patterns_of(exclude), None, True)
        for label, algo in _labelled(rules).items()
    }
    steps, chunk = check_run(steps, chunk)
    targets = as_targets(targets)
    if loss_fn is not None:
        check_callable(loss_fn)
    live, inputs, batch_size = opened(model, example_inputs, batch_size)
    with live.unchanged():
        if batch_size is not None:
            live.initialise(batch_size)
        analysis = analysed(live, inputs, patterns_of(exclude))

        def cost(compiled: Compiled) -> Cost:
            return program_cost(live, compiled, inputs, steps, chunk, loss_fn, targets, has_aux)

        rows = tuple(_row(label, lambda r=r: lower_analysed(analysis, r), cost) for label, r in asked.items())
    if rules is None:
        rows = tuple(sorted(rows, key=_order))
    return Comparison(analysis.model.name, rows, steps)


def _row(label: str, lowered: Callable[[], Compiled], cost: Callable[[Compiled], Cost]) -> RuleRow:
    try:
        compiled = lowered()
    except EtcompileError as error:
        return RuleRow(label, refused=_reason(error))
    report = compiled.report()
    try:
        return RuleRow(label, report, cost(compiled))
    except _REFUSALS as error:
        return RuleRow(label, report, refused=_reason(error))


def _reason(error: EtcompileError) -> str:
    """What an error says, in one line: what is wrong, and what was expected."""
    said = str(error).splitlines()[0].rstrip(".")
    return f"{said} (expected {error.expected})" if error.expected else said


def _order(row: RuleRow) -> tuple[Any, ...]:
    cost = float("inf") if row.cost is None else row.cost.bytes_moved
    return bool(row.refused), row.trace_bytes or 0, cost, row.rule


def _labelled(rules: Iterable[Any] | Mapping[str, Any] | None) -> dict[str, Any]:
    """What each row is called, and its ``algo``."""
    if rules is None:
        return {name: name for name in shipped_names()}
    if isinstance(rules, Mapping):
        return {str(label): algo for label, algo in rules.items()}
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise OptionError(
            "rules must be several rules.",
            got=f"rules={rules!r}",
            expected='a list such as ["d_rtrl", "e_prop"], or a dict of rules by label',
        )
    found: dict[str, Any] = {}
    for algo in rules:
        label = wanted = _label(algo)
        count = 1
        while label in found:
            count += 1
            label = f"{wanted} ({count})"
        found[label] = algo
    return found


def _label(algo: Any) -> str:
    """A rule by its name, with its options."""
    if isinstance(algo, Algorithm):
        options = ", ".join(f"{key}={value!r}" for key, value in algo.options)
        return f"{algo.name}({options})" if options else algo.name
    if isinstance(algo, Rule):
        return algo.name
    if isinstance(algo, Mapping):
        return ", ".join(f"{pattern}: {_label(rule)}" for pattern, rule in algo.items())
    if isinstance(algo, (list, tuple)):
        return " + ".join(_label(item) for item in algo)
    return algo if isinstance(algo, str) else str(getattr(algo, "name", algo))
