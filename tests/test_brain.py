"""The whole-brain tool, on a thousandth of a brain."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "brain" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def connectome():
    found = module("connectome")
    yield found
    del sys.modules["connectome"]


def test_the_synthetic_connectome(connectome):
    c = connectome.fly(0.01, seed=3)
    assert (c.neurons, c.connections, c.regions) == (1274, 147_000, 68)
    assert (np.diff(c.receivers) >= 0).all() and set(np.unique(c.signs)) == {-1.0, 1.0}
    for ends in (c.senders, c.receivers):
        degrees = np.sort(np.bincount(ends, minlength=c.neurons))
        assert degrees[-1] > 8 * np.median(degrees)  # heavy tails
    again = connectome.fly(0.01, seed=3)
    assert (again.senders == c.senders).all() and (again.synapses == c.synapses).all()
    assert (connectome.fly(0.01, seed=4).senders != c.senders).any()


def test_a_connectome_of_transmitters(connectome):
    """Cells 0 and 2 release GABA and acetylcholine, 3 glutamate; 1 is a muscle. Gap junctions are no synapses."""
    none = np.zeros((4, 4))
    gaba, choline, glutamate = none.copy(), none.copy(), none.copy()
    gaba[0, [1, 2]] = 5, 1
    choline[2, [1, 3]] = 2, 3
    glutamate[3, 0] = 4
    matrices = {"Glutamate": glutamate, "GABA": gaba, "Generic_GJ": none + 1, "Acetylcholine": choline}
    table = {"nodes": ["a", "m", "b", "c"], "connections": {k: v.tolist() for k, v in matrices.items()}}
    c = module("worm").read(table)  # numbered b, a, c, m
    found = set(zip(c.senders.tolist(), c.receivers.tolist(), c.synapses.tolist(), strict=True))
    assert found == {(1, 3, 5.0), (1, 0, 1.0), (0, 3, 2.0), (0, 2, 3.0), (2, 1, 4.0)}
    assert c.signs.tolist() == [1.0, -1.0, 1.0, 1.0] and c.region.tolist() == [0, 1, 2, 3]
    assert (np.diff(c.receivers) >= 0).all()


def test_a_small_brain_learns(tmp_path):
    command = [sys.executable, ROOT / "tools" / "brain", "--scale", "0.001", "--updates", "30", "--window", "40",
               "--settle", "300", "--rules", "e_prop", "--out", tmp_path]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "127 neurons, 14,700 connections, all of which learn" in done.stdout
    found = json.loads((tmp_path / "e_prop.json").read_text())
    assert np.shape(found["before"]) == np.shape(found["after"]) == (300, 68)
    before, after = (np.mean(found[name][100:], 0) - found["targets"] for name in ("before", "after"))
    assert np.square(after).mean() < 0.75 * np.square(before).mean()
    assert found["predicted_bytes"] > found["trace_bytes"] > 0 and found["peak_bytes"] > 1e8
    assert (tmp_path / "e_prop.png").stat().st_size > 10_000
