"""The tasks of ``make rl``, beside those that they are written after, and its page."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tools():
    """Modules of tools/rl by name, out of the way of others."""
    names = ("environment", "worlds", "models", "settings", "measure", "page")
    before = {name: sys.modules.pop(name, None) for name in names}
    found = {}
    for name in names:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "rl" / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_the_maze_asks_for_what_its_start_showed(tools):
    maze, key = tools["worlds"].TMaze(3), jax.random.key(0)
    for k in range(8):
        seen, state = maze.reset(jax.random.fold_in(key, k))
        sign = int(np.argmax(seen[:2]))
        assert seen[:3].tolist() == [sign == 0, sign == 1, 0] and set(np.abs(seen[3:]).tolist()) == {1.0}
        seen, state, reward, ends, late, _ = maze.step(key, state, 1)  # turns in the corridor
        assert (float(reward), bool(ends), seen[sign]) == (pytest.approx(-0.1), False, 1)
        for _ in range(3):
            seen, state, reward, ends, late, _ = maze.step(key, state, 0)
            assert (float(reward), bool(ends), float(seen[:2].sum())) == (0, False, 0)
        assert seen[2] == 1
        seen, state, reward, ends, late, _ = maze.step(key, state, 0)  # no way on
        assert (float(reward), bool(ends)) == (pytest.approx(-0.1), False)
        for action in (1, 2):
            _, _, reward, ends, _, _ = maze.step(key, state, action)
            assert (float(reward), bool(ends)) == (1 if action == 1 + sign else -1, True)


def test_the_chain_is_that_of_gymnax(tools):
    gymnax = pytest.importorskip("gymnax")
    env, params = gymnax.make("MemoryChain-bsuite")
    params, chain = params.replace(memory_length=4), tools["worlds"].MemoryChain(4)
    signs = set()
    for k in range(6):
        key = jax.random.key(k)
        seen, theirs = env.reset(key, params)
        ours = jnp.array(0), theirs.context[0]
        signs.add(int(ours[1]))
        for time in range(5):
            action = (k + time) % 2
            found, theirs, reward, ends, _ = env.step_env(key, theirs, action, params)
            mine, ours, value, over, _ = chain.step(key, ours, action)
            np.testing.assert_allclose(mine, found, atol=1e-7)
            assert (float(value), bool(over)) == (float(reward), bool(ends))
        assert over
    assert signs == {0, 1}


def test_the_pole_is_that_of_gymnasium(tools):
    gymnasium = pytest.importorskip("gymnasium")
    env, pole = gymnasium.make("CartPole-v1").unwrapped, tools["worlds"].MaskedCartPole()
    first, _ = env.reset(seed=0)
    state = jnp.asarray(env.state), jnp.array(0)
    for k in range(200):
        action = int(k % 3 == 0)
        found, _, ends, _, _ = env.step(action)
        seen, state, reward, over, late, _ = pole.step(None, state, action)
        np.testing.assert_allclose(seen, [found[0] / 2.4, found[2] / (12 * np.pi / 180)], rtol=1e-5)
        assert (bool(over), reward, bool(late)) == (ends, 1.0, False)
        if ends:
            break
    assert ends and k > 5


def test_a_cell_and_its_page(tools):
    settings, measure, page = tools["settings"], tools["measure"], tools["page"]
    few = dataclasses.replace(settings.QUICK, pieces=2, shorter=500, agents=2)
    told = []
    with jax.enable_x64(False), brainstate.environ.context(precision=32):
        result = measure.measure(settings.TASKS["chain-2"], "LRU", "d_rtrl", few, told.append)
    assert result.exact and np.asarray(result.curves).shape == (1, 2, 2)
    assert sum(told) == result.steps == 2 * few.steps(settings.TASKS["chain-2"])
    text = (ROOT / "docs" / "reinforcement.md").read_text()
    cell = result.task, result.model, result.rule
    written, picture = page.render(text, {cell: result.cell()}, few)
    assert (
        "| memory chain, 2 steps | 0.5 |" in written
        and "empty were not measured, nor were T-maze, corridor 10" in written
    )
    assert written.partition(page.BEGIN)[0] == text.partition(page.BEGIN)[0]
    assert picture.count("<polyline") == 1


def test_cells_stay_where_they_are_not_measured_anew(tools, tmp_path):
    measure = tools["measure"]
    cells = {
        ("chain-2", "GRU", "one step"): measure.Cell(
            "chain-2", "GRU", "one step", 3e-3, 10, 4000, 6.5, 0.75, 0.01, [0.5, 0.75], [0.02, 0.01]
        ),
        ("maze-10", "LRU", "d_rtrl"): measure.Cell(
            "maze-10", "LRU", "d_rtrl", 1e-2, 10, 8000, 9.0, 1.0, 0.0, [1.0], [0.0]
        ),
    }
    file = tmp_path / "cells.json"
    assert measure.kept(file) == {}
    measure.keep(cells, file)
    assert measure.kept(file) == cells and len(file.read_text().splitlines()) == 4
