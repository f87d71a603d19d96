"""The exceptions of etcompile: every mistake a user can make ends in one of these, or in a warning of its class.

A message says where (file and line of the user's model, when there is one), what was got, what was expected,
and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "AlgorithmError",
    "CarryError",
    "CheckpointError",
    "DependencyError",
    "EnvironmentWarning",
    "EtcompileError",
    "EtcompileWarning",
    "ForeignWriteWarning",
    "InputError",
    "ModelError",
    "OptionError",
    "PassError",
    "PlainAttributeWarning",
    "ProgramError",
    "UnsupportedError",
]


#: Letters of what was found; more is nothing that anybody reads.
_LONGEST = 600


class EtcompileError(Exception):
    """Base class of all exceptions raised by etcompile.

    Parameters
    ----------
    message : str
        What went wrong, in one sentence.
    where : str, optional
        ``file:line`` in the user's model.
    got, expected, hint : str, optional
        What was found, what was expected, and what to do. What was found is cut where it is long: it may be an array.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        got: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        got = None if got is None else _short(got)
        self.where, self.got, self.expected, self.hint = where, got, expected, hint
        parts = [message if where is None else f"{where}: {message}"]
        parts += [f"  {label}: {text}" for label, text in _labelled(got, expected, hint) if text]
        super().__init__("\n".join(parts))


class EtcompileWarning(UserWarning):
    """Something that runs, and is probably not what was meant; the message says what to do.

    To have it raised: ``warnings.simplefilter("error", etcompile.EtcompileWarning)``.
    """


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{' '.join(text.split())[:_LONGEST].rstrip()} ... ({len(text)} characters)"


def _labelled(got: str | None, expected: str | None, hint: str | None) -> list[tuple[str, str | None]]:
    return [("got", got), ("expected", expected), ("do", hint)]


class ModelError(EtcompileError, ValueError):
    """The model cannot be compiled as it stands."""


class InputError(EtcompileError, ValueError):
    """An input, target or loss function does not fit the compiled step."""


class CarryError(InputError):
    """The model's states or traces do not fit the call (after a change of batch size, for example)."""


class CheckpointError(EtcompileError, ValueError):
    """A checkpoint does not fit the step, or cannot be read, or one would be written over."""


class DependencyError(EtcompileError, ImportError):
    """A package that an extra of etcompile brings is not installed."""


class OptionError(EtcompileError, TypeError):
    """An option that the algorithm or function does not have, or a value it cannot take."""


class AlgorithmError(EtcompileError, ValueError):
    """An unknown learning rule, or one that this model cannot use."""


class ProgramError(EtcompileError, ValueError):
    """A trace program that breaks the rules of the IR, or text that does not parse."""


class PassError(EtcompileError, RuntimeError):
    """A pass failed, or broke what it declared."""


class UnsupportedError(EtcompileError, NotImplementedError):
    """Something that the chosen schedule or rule cannot compute; the message names one that can."""


class EnvironmentWarning(EtcompileWarning):
    """An entry of ``brainstate.environ`` changed in a way that costs time or credit."""


class ForeignWriteWarning(EtcompileWarning):
    """A state of a compiled model was assigned outside of its step, so its traces may not fit it."""


class PlainAttributeWarning(EtcompileWarning):
    """A plain attribute of a compiled model changed, and the compiled step does not see it."""
