"""Import brainstate and leave JAX's settings as they were: its first import sets ``jax_enable_x64`` by its own precision."""

from __future__ import annotations

import jax

_before = dict(jax.config.values)
import brainstate  # noqa: E402, F401

for _name, _value in _before.items():
    if jax.config.values[_name] != _value:
        jax.config.update(_name, _value)
