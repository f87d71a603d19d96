"""Passes, and the manager that runs, checks and times them."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etcompile.errors import EtcompileError, OptionError, PassError
from etcompile.ir.program import TraceProgram
from etcompile.ir.verifier import verify
from etcompile.keywords import named_arguments

__all__ = ["EFFECTS", "Pass", "PassManager", "PassRecord"]

#: What a pass may declare about the gradients: nothing changes, they are approximated, or they are others.
EFFECTS = ("gradients", "approximates", "changes")


@runtime_checkable
class Pass(Protocol):
    """A pure function from program to program.

    Implement it as a frozen dataclass whose fields are its options. ``preserves`` is ``"gradients"`` for an optimisation
    and ``"approximates"`` or ``"changes"`` for a learning rule.
    """

    @property
    def name(self) -> str: ...

    @property
    def preserves(self) -> str: ...

    def __call__(self, program: TraceProgram) -> TraceProgram: ...


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did: seconds, equations before and after, and whether the program changed."""

    name: str
    seconds: float
    before: int
    after: int
    changed: bool


#: Gradients of a program on random inputs, by parameter; used to check what passes declare.
GradientRunner = Callable[[TraceProgram], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class PassManager:
    """Runs passes in order, verifying the program that each returns.

    Parameters
    ----------
    print_after : {None, "changes", "all", "diff"}
        Print the program after every pass, or only after those that changed it; ``"diff"``: of each of these the lines that it
        took away, put in or changed, as a unified diff.
    check : bool
        Also run the program before and after each pass that declares ``preserves = "gradients"`` and compare; and
        compare a program that claims to be exact, after the rule and after it was put into windows, with backpropagation
        through time.
    tolerance : float
        Largest relative difference of gradients that ``check`` accepts.
    emit : callable
        Where printed programs go.
    """

    print_after: str | None = None
    check: bool = False
    tolerance: float = 1e-5
    emit: Callable[[str], Any] = print

    def __post_init__(self) -> None:
        if self.print_after not in (None, "changes", "all", "diff"):
            raise OptionError(
                "print_after must be None, 'changes', 'all' or 'diff'.", got=repr(self.print_after)
            )

    def run(
        self,
        program: TraceProgram,
        passes: Sequence[Pass],
        gradients: GradientRunner | None = None,
        backpropagation: Callable[[], Mapping[str, Any]] | None = None,
    ) -> tuple[TraceProgram, tuple[PassRecord, ...]]:
        """Run ``passes`` on ``program``; returns the program and one record per pass.

        Raises
        ------
        PassError
            Naming the pass, the passes before it, and the equation at fault.
        """
        records: list[PassRecord] = []
        ran: tuple[TraceProgram, Mapping[str, Any]] | None = None  # the last program checked, its gradients
        for number, item in enumerate(passes):
            _check_pass(item)
            started = time.perf_counter()
            try:
                new = item(program)
            except EtcompileError:
                raise
            except Exception as error:
                raise _failure(item, records, f"{type(error).__name__}: {error}") from error
            if not isinstance(new, TraceProgram):
                raise _failure(item, records, f"it returned a {type(new).__name__} instead of a TraceProgram")
            if new is not program:  # that one was verified after the pass before
                self._verified(new, item, records)
            if self.check and item.preserves == "gradients" and gradients is not None and new != program:
                # What one pass returned is what the next is given: run it once.
                old = ran[1] if ran is not None and ran[0] == program else gradients(program)
                ran = new, gradients(new)
                self._compare(item, records, old, ran[1])
            claims = new.exact and (not number or getattr(item, "keeps_exact", False))
            if self.check and claims and gradients and backpropagation:
                ran = new, gradients(new)
                self._compare(
                    item,
                    records,
                    backpropagation(),
                    ran[1],
                    "it claims to be exact, but differs from backpropagation through time in",
                )
            seconds = time.perf_counter() - started
            changed = new != program
            records.append(
                PassRecord(item.name, seconds, len(program.equations), len(new.equations), changed)
            )
            if self.print_after == "diff" and changed:
                self.emit(f"# after {item.name}\n{_difference(program, new)}")
            elif self.print_after == "all" or (self.print_after == "changes" and changed):
                self.emit(f"# after {item.name}\n{new}")
            program = new
        return program, tuple(records)

    def _verified(self, program: TraceProgram, item: Pass, records: Sequence[PassRecord]) -> None:
        try:
            verify(program)
        except EtcompileError as error:
            raise _failure(item, records, f"the program is not well formed after it. {error}") from error

    def _compare(
        self,
        item: Pass,
        records: Sequence[PassRecord],
        old: Mapping[str, Any],
        new: Mapping[str, Any],
        complaint: str = "it declares preserves='gradients', but changes",
    ) -> None:
        import numpy as np

        for path, before in old.items():
            a, b = np.asarray(before), np.asarray(new[path])
            scale = max(float(np.abs(a).max(initial=0.0)), 1e-30)
            difference = float(np.abs(a - b).max(initial=0.0)) / scale
            if not difference <= self.tolerance:
                raise _failure(
                    item,
                    records,
                    f"{complaint} the gradient of {path} by {difference:.2g} (relative)",
                )


PassManager.__init__ = named_arguments("PassManager")(PassManager.__init__)


def _check_pass(item: Any) -> None:
    if not isinstance(item, Pass):
        raise OptionError(
            "algo holds something that is not a pass.",
            got=repr(item),
            expected="objects with a name, a declaration `preserves`, and a call TraceProgram -> TraceProgram",
        )
    if item.preserves not in EFFECTS:
        raise OptionError(
            f"pass {item.name} declares preserves={item.preserves!r}.",
            expected=" or ".join(map(repr, EFFECTS)),
        )


def _difference(old: TraceProgram, new: TraceProgram) -> str:
    """Two programs as a unified diff."""
    lines = difflib.unified_diff(
        str(old).splitlines(), str(new).splitlines(), old.name, new.name, lineterm=""
    )
    return "\n".join(lines)


def _failure(item: Pass, records: Sequence[PassRecord], message: str) -> PassError:
    before = ", ".join(r.name for r in records) or "no other pass"
    return PassError(f"pass {item.name} (after {before}): {message}")
