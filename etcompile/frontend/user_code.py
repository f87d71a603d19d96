"""Which line of code is the user's own."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterable

__all__ = ["called_from", "is_users", "user_frame", "user_line", "warn"]

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STANDARD = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    if path
)
_INSTALLED = tuple(os.sep + name + os.sep for name in ("site-packages", "dist-packages"))
#: Libraries from whose parts people build models. Any installed package counts as a library; these do so too where they are
#: installed from a checkout, and where no other package is in sight.
_KNOWN = (
    "jax", "jaxlib", "numpy", "brainstate", "saiunit", "brainunit", "braintools", "brainpy", "brainpy_state", "brainevent",
    "braintrace", "flax", "equinox", "haiku", "optax", "diffrax", "lineax", "optimistix", "spyx", "snnax", "snntorch",
    "jaxtyping", "chex", "einops", "dm_pix", "penzai", "keras",
)  # fmt: skip
#: Where brainstate calls the ``update`` of any module.
_CALLS = os.path.join("brainstate", "nn", "_module.py")
#: Where it traces.
_TRACES = os.path.join("brainstate", "transform", "_make_jaxpr.py")
#: Code typed into an interpreter has no file.
_TYPED = ("<stdin>", "<ipython-input")


def user_line(frames: Iterable[tuple[str, int]]) -> str | None:
    """``file:line`` of the first frame, innermost first, in the user's own code.

    The line of a library that it called stands behind it in brackets. Where every frame is a library's, the first one of
    a package that is not known for layers is taken for the user's own package, installed; else the last one, which is the
    layer that the user took.
    """
    library = package = layer = None
    for name, number in frames:
        if _is_machinery(name):
            continue
        text = f"{os.path.basename(name)}:{number}"
        known = _is_known(name)
        if not known and not any(part in name for part in _INSTALLED):
            return text if library is None else f"{text} ({library})"
        library = library or text
        if not known and package is None:
            package = text if library == text else f"{text} ({library})"
        if not name.endswith(_CALLS):
            layer = text if library == text else f"{text} ({library})"
    return package or layer or library


def user_frame(error: Exception) -> str | None:
    """``file:line`` of the innermost frame that is neither ours nor a library's."""
    frames = [(f.filename, f.lineno or 0) for f in reversed(traceback.extract_tb(error.__traceback__))]
    found = user_line(frames)
    return None if found is None else found.split(" (")[0]


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line from which this package was called."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def called_from(depth: int) -> str:
    """The module whose code runs so many calls above the one of this function; empty where there is none."""
    frame = inspect.currentframe()
    for _ in range(depth):
        frame = frame and frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")


def is_users(name: str) -> bool:
    """Whether a file is neither ours nor a library's."""
    return not _is_machinery(name) and not _is_known(name) and not any(part in name for part in _INSTALLED)


def _is_machinery(name: str) -> bool:
    """Frames that never say where in a model something is: ours, those of tracing and Python's own."""
    if name.startswith("<"):
        return not name.startswith(_TYPED)
    if name.endswith(_TRACES) or name.startswith((_HERE, *_roots(("jax", "jaxlib", "numpy")))):
        return True
    return name.startswith(_STANDARD) and not any(part in name for part in _INSTALLED)


def _is_known(name: str) -> bool:
    return any(
        part + package + os.sep in name for part in _INSTALLED for package in _KNOWN
    ) or name.startswith(_roots(_KNOWN))


def _roots(packages: Iterable[str]) -> tuple[str, ...]:
    """Folders of those packages that are in use."""
    modules = [sys.modules.get(name) for name in packages]
    files = [getattr(module, "__file__", None) for module in modules]
    return tuple(os.path.dirname(file) + os.sep for file in files if file)
