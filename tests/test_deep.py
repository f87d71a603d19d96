"""What ``make deep`` compares: its stacks, its approximations of the influence on layers above, and its page."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import etcompile

pytest.importorskip("optax")
RULES = Path(__file__).resolve().parents[1] / "tools" / "rules"


@pytest.fixture(scope="module")
def tools():
    """Modules of tools/rules by name, out of the way of others."""
    names = (
        "tasks",
        "earlier",
        "replicas",
        "models",
        "training",
        "stacks",
        "cross_layer",
        "deep_measure",
        "deep_page",
    )
    before = {name: sys.modules.pop(name, None) for name in names}
    found = {}
    for name in names:
        spec = importlib.util.spec_from_file_location(name, RULES / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name, module in before.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module


def stack_of(tools, kind, depth=3):
    return tools["stacks"].Stack(kind, depth, units=3, inputs=2, outputs=2)


def sequences():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(7, 2, 2))), jnp.asarray(rng.random((7, 2, 2)) > 0.5, float)


def largest_gap(tools, stack, approximation):
    """Between an approximation and plain backpropagation, over the largest entry of each weight's gradient."""
    weights = jax.tree.map(lambda w: w.astype(float), stack.start(0))
    xs, ys = sequences()
    true = jax.grad(lambda w: stack.losses(w, xs, ys, tools["training"].loss))(weights)
    found = jax.jit(lambda w: approximation(stack, w, xs, ys))(weights)
    return max(float(jnp.abs(found[n] - true[n]).max() / jnp.abs(true[n]).max()) for n in found)


def test_one_filter_for_each_layer_is_exact_where_all_units_decay_alike_and_nothing_else_bends(tools):
    leaky = tools["stacks"].Kind(
        "leaky", "leaky", 1, 1, lambda c, h, y: (0.8 * h[0] + y[0],), lambda h: h[0], 1.0
    )
    assert largest_gap(tools, stack_of(tools, leaky), tools["cross_layer"].filtered) < 1e-6


@pytest.mark.parametrize("name", ["lru", "rg_lru", "lif"])
def test_what_is_carried_is_counted_as_the_compiler_counts_it(tools, name):
    stack = stack_of(tools, tools["stacks"].KINDS[name])
    model = etcompile.from_function(stack.step, stack.start(0), jax.tree.map(jnp.float32, stack.zeros(2)))
    step = etcompile.compile(model, jnp.zeros((2, 2), jnp.float32))
    assert step.report().trace_bytes == tools["cross_layer"].trace_bytes(stack, 2)
    assert step.report().between_layers
    ranked = etcompile.compile(model, jnp.zeros((2, 2), jnp.float32), algo="rank_rtrl", rank=2)
    assert ranked.report().trace_bytes == tools["deep_measure"]._carried(stack, 2)["rank 2"]


def test_the_page(tools):
    measured = tools["deep_measure"]
    cell = measured.Cell(
        "lif",
        2,
        "copy",
        updates=3,
        units=4,
        batch=16,
        losses=[[2.0, 1.0]],
        activity=[[0.1, 0.2]],
        layers={label: [[0.5, 1.0]] for label in measured.LABELS},
        whole={label: [0.75] for label in measured.LABELS},
        carried=dict.fromkeys(measured.LABELS, 2048),
        held={"window 5": 1024},
        alike={"4": {"rank 1": 2.4}},
    )
    page = f"before\n{tools['deep_page'].BEGIN}\nold\n{tools['deep_page'].END}\nafter\n"
    training = measured.Training("lif", 4, "copy", 3, {"d_rtrl": [0.5, 0.7], "bptt": [0.9, 0.9]})
    found = ({("lif", 2, "copy"): cell}, {("lif", 4, "copy"): training})
    text = tools["deep_page"].render(page, *found)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| copy after a delay | LIF | 2 | 0.75 |" in text and "| 2 (2) |" in text
    assert "| copy after a delay | LIF | 4 | 0.60 ± 0.10 | 0.90 ± 0.00 |" in text
    assert tools["deep_page"].render(text, *found) == text


def test_the_page_keeps_what_is_not_measured_again(tools):
    measured, render = tools["deep_measure"], tools["deep_page"].render
    made = {
        (kind, depth, "copy"): measured.Cell(
            kind,
            depth,
            "copy",
            updates=3,
            units=4,
            batch=16,
            losses=[[2.0, 1.0]],
            layers={label: [[0.5] * depth] for label in measured.LABELS},
            whole={label: [0.75] for label in measured.LABELS},
            carried=dict.fromkeys(measured.LABELS, 2048),
            alike={"4": {"rank 1": 2.4}},
        )
        for kind, depth in (("lru", 2), ("lru", 8), ("rg_lru", 2))
    }
    training = {("rg_lru", 4, "copy"): measured.Training("rg_lru", 4, "copy", 3, {"bptt": [0.9]})}
    whole = render("", made, training)
    some = {key: cell for key, cell in made.items() if key[1] == 2}
    assert render(render("", some, training), {("lru", 8, "copy"): made["lru", 8, "copy"]}, {}) == whole
