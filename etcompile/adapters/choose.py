"""Modules of other frameworks given to ``compile`` as they are."""

from __future__ import annotations

from typing import Any

from etcompile.adapters.equinox import equinox_model
from etcompile.adapters.linen import linen_model
from etcompile.adapters.nir import nir_model
from etcompile.adapters.nnx import nnx_model

__all__ = ["as_model"]

#: Each makes a model of a module of its framework and of the shapes of its inputs; None for what is none of its modules.
_FRAMEWORKS = (equinox_model, nnx_model, linen_model, nir_model)


def as_model(model: Any, inputs: tuple[Any, ...]) -> Any:
    """A model of a module of another framework; anything else as it is.

    Raises
    ------
    ModelError
        Where it is not clear how the module is called; it says which function makes a model of it.
    """
    made = (adapt(model, inputs) for adapt in _FRAMEWORKS)
    return next((m for m in made if m is not None), model)
