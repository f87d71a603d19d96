"""Rules beside each other, for one model: the result of :func:`etcompile.compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from etcompile.cost.cost import Cost
from etcompile.extras import from_extra
from etcompile.report import Report

if TYPE_CHECKING:
    import pandas
    import rich.table

__all__ = ["Comparison", "RuleRow"]


@dataclasses.dataclass(frozen=True)
class RuleRow:
    """One rule in a comparison.

    Attributes
    ----------
    rule : str
        Its name, with the options that were given.
    report : Report or None
        What it does on the model; None where it refuses the model.
    cost : Cost or None
        What a run takes; None where the rule refuses the model or the run.
    refused : str
        Why, in the words of the error; empty for a rule that can be used.
    """

    rule: str
    report: Report | None = None
    cost: Cost | None = None
    refused: str = ""

    @property
    def exact(self) -> bool | None:
        """Whether gradients equal backpropagation through time; None where the rule refuses the model."""
        return None if self.report is None else self.report.exact

    @property
    def gradient(self) -> str:
        """What its gradient is, in words."""
        return "" if self.report is None else self.report.verdict

    @property
    def another(self) -> bool:
        """Whether its gradient is none of the loss, by intent."""
        return self.report is not None and self.report.another

    @property
    def trace_bytes(self) -> int | None:
        """Bytes that it carries from step to step beside the model's states."""
        return None if self.report is None else self.report.trace_bytes

    @property
    def leaves_out(self) -> str:
        """What its gradient leaves out: what the rule itself loses, and where credit ends at cuts."""
        if self.report is None:
            return ""
        cuts = len(self.report.cuts)
        said = f"credit through {cuts} cut{'s' if cuts > 1 else ''}" if cuts else ""
        return "; ".join(filter(None, (self.report.leaves_out, said)))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain strings and numbers; None where the rule refuses the model."""
        cost = self.cost
        return {
            "rule": self.rule,
            "exact": self.exact,
            "gradient": self.gradient,
            "trace_bytes": self.trace_bytes,
            "peak_bytes": cost and cost.peak_bytes,
            "flops": cost and cost.flops,
            "transcendentals": cost and cost.transcendentals,
            "bytes_moved": cost and cost.bytes_moved,
            "cuts": None if self.report is None else len(self.report.cuts),
            "leaves_out": self.leaves_out,
            "refused": self.refused,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Learning rules for one model, before anything runs; a sequence of rows.

    It prints as a table, shows itself in notebooks and to ``rich.print``, and becomes a :meth:`to_dataframe`.

    Attributes
    ----------
    model : str
    rows : tuple of RuleRow
        Rules by the bytes of their traces, then by the memory traffic of a step; refused ones last. In the order asked for
        where rules were named.
    steps : int or None
        Steps of the sequence whose cost was looked at; None for one call of ``value_and_grad``.
    """

    model: str
    rows: tuple[RuleRow, ...]
    steps: int | None = None

    @property
    def batch(self) -> int | None:
        """Examples; None where the model has no batch axis, or no cost was found."""
        return next((row.cost.batch for row in self.rows if row.cost is not None), None)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RuleRow]:
        return iter(self.rows)

    def __getitem__(self, rule: str | int) -> RuleRow:
        """A row by its number, or by its rule."""
        if isinstance(rule, int):
            return self.rows[rule]
        found = next((row for row in self.rows if row.rule == rule), None)
        if found is None:
            raise KeyError(f"{rule!r} is not among {', '.join(row.rule for row in self.rows)}")
        return found

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Rows as plain dictionaries, by rule."""
        return {row.rule: row.to_dict() for row in self.rows}

    def to_dataframe(self) -> pandas.DataFrame:
        """The table with a row for each rule, numbers as numbers.

        Raises
        ------
        DependencyError
            Where pandas is not installed.
        """
        pandas = from_extra("table", "pandas", "a DataFrame needs pandas; to_dict() needs nothing.")
        return pandas.DataFrame([row.to_dict() for row in self.rows]).set_index("rule")

    def __str__(self) -> str:
        from etcompile.comparison_views import comparison_text

        return comparison_text(self)

    __repr__ = __str__

    def __rich__(self) -> rich.table.Table:
        from etcompile.comparison_views import comparison_rich

        return comparison_rich(self)

    def _repr_html_(self) -> str:
        from etcompile.comparison_views import comparison_html

        return comparison_html(self)
