"""Lines in reports and errors are the user's own, whatever library made the operation."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import etcompile
from etcompile.frontend.user_code import user_line

LAYER = "def mix(h, w):\n    return h @ w\n"
CELL = (
    "import jax.numpy as jnp\n"
    "def cell(p, s, x):\n"
    "    h = jnp.tanh(mix(s['h'], p['w']) + x)\n"
    "    return {'h': h}, h\n"
)


def module(text, name, **known):
    exec(compile(text, name, "exec"), known)
    return known


@pytest.fixture
def layer():
    return module(LAYER, "/somewhere/site-packages/some_layers/dense.py")["mix"]


def cut(cell):
    model = etcompile.from_function(cell, {"w": jnp.eye(3)}, {"h": jnp.zeros(3)})
    return etcompile.compile(model, jnp.ones(3))


def test_a_cut_inside_of_any_installed_layer_has_the_users_line(layer):
    def cell(p, s, x):
        h = jnp.tanh(layer(s["h"], p["w"]) + x)
        return {"h": h}, h

    step = cut(cell)
    line = cell.__code__.co_firstlineno + 1
    assert step.program.header.cuts[0].source == f"test_source_lines.py:{line} (dense.py:2)"
    assert "dense.py" not in str(step.report())
    assert f"test_source_lines.py:{line}" in str(step.report())


def test_code_in_a_library_is_told_from_the_users_own_package_where_both_are_installed():
    installed = "/somewhere/site-packages/"
    frames = [(installed + "equinox/nn/_linear.py", 98), (installed + "my_lab/models.py", 12)]
    assert user_line(frames) == "models.py:12 (_linear.py:98)"
    assert user_line(frames[:1]) == "_linear.py:98"
    assert user_line([*frames, ("/home/me/train.py", 3)]) == "train.py:3 (_linear.py:98)"
    assert user_line([("<ipython-input-3-aa>", 7)]) == "<ipython-input-3-aa>:7"
    assert user_line([("<frozen importlib>", 7)]) is None


def test_an_installed_package_alone_is_the_users_own(layer):
    cell = module(CELL, "/somewhere/site-packages/my_lab/models.py", mix=lambda h, w: h @ w)["cell"]
    assert cut(cell).program.header.cuts[0].source.startswith(("test_source_lines.py", "models.py:3"))
