"""Split over devices, everything computes the numbers of one device, and no trace travels.

Devices are host devices, and a process must be told their number before it starts, so each test runs programs of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import brainstate
import jax
import jax.numpy as jnp
import pytest
from shared import shared

import etcompile

HERE = Path(__file__).parent


def program(name, *arguments):
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(HERE / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )


def last_line(process):
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out.strip().splitlines()[-1]


#: Groups of `sharding_run.py` that one process runs: what one device computes they share.
GROUPS = ("models", "rules", "drivers", "later", "limits")


@shared
def output(*groups):
    return json.loads(last_line(program("sharding_run.py", *groups)))


def results(group):
    found = output(*(GROUPS if group in GROUPS else (group,)))[group]
    failed = "\n".join(f"{name}: {value}" for name, value in found.items() if isinstance(value, str))
    assert found and not failed, failed
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("eight devices")
@pytest.mark.parametrize("group", GROUPS)
def test_eight_devices_compute_the_numbers_of_one(group):
    found = results(group)
    assert {name: value for name, value in found.items() if not value < 1e-10} == {}


@pytest.mark.slow
def test_no_collective_brings_as_much_as_a_trace():
    """All-reduces add up what devices computed; what moves otherwise is of the size of states, inputs and weights."""
    found = results("collectives")
    assert {name: share for name, share in found.items() if not 0 < share < 1} == {}


@pytest.mark.slow
def test_two_processes_compute_the_numbers_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [program("sharding_process.py", str(k), port) for k in range(2)]
    try:
        assert [float(last_line(p)) < 1e-10 for p in processes] == [True, True]
    finally:
        for process in processes:
            process.kill()


def one_device():
    return jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "data"}, "no mesh to split over"),
        ({"mesh": "8"}, "must be a jax.sharding.Mesh"),
        ({"mesh": one_device}, "what is split over its axes"),
        ({"mesh": one_device, "batch": "rows"}, "no axis 'rows'"),
        ({"mesh": one_device, "units": ("data", "rows")}, "no axis 'rows'"),
        ({"mesh": one_device, "batch": 0}, "batch must name axes"),
        ({"mesh": one_device, "units": ["model"]}, "units must name axes"),
        ({"mesh": one_device, "units": ()}, "units must name axes"),
        ({"mesh": one_device, "batch": "data", "units": ("model", "data")}, "one thing only"),
    ],
)
def test_schedules_that_make_no_sense(options, message):
    made = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(etcompile.OptionError, match=message):
        etcompile.Schedule(**made)


def single(params, state, x):
    h = jnp.tanh(x @ params["w"] + state["h"])
    return {"h": h}, h


def test_a_batch_axis_is_needed_to_split_it():
    model = etcompile.from_function(single, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros(4)})
    with pytest.raises(etcompile.ModelError, match="no example axis"):
        etcompile.compile(
            model, jnp.ones(3), schedule=etcompile.Schedule(mesh=one_device(), batch="data", units="model")
        )
    step = etcompile.compile(
        model, jnp.ones(3), schedule=etcompile.Schedule(mesh=one_device(), units="model")
    )
    assert "trace e0 [3, 4@model]" in step.report().devices


def test_the_report_names_what_is_split():
    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.readout = brainstate.nn.LSTMCell(3, 4), brainstate.nn.Linear(4, 2)

        def update(self, x):
            return self.readout(self.cell(x))

    schedule = etcompile.Schedule(mesh=one_device(), batch="data", units="model")
    step = etcompile.compile(Net(), jnp.ones((6, 3)), batch_size=6, schedule=schedule)
    report = step.report()
    assert "mesh={'data': 1, 'model': 1}" in repr(step)
    assert report.to_dict()["devices"][0] == "mesh data=1, model=1"
    assert "state cell.c [6@data, 4@model]" in report.devices
    assert "parameter cell.W.weight.weight [7, 16@model]" in report.devices
    assert all(line in str(report) for line in report.devices)
    plain = etcompile.compile(Net(), jnp.ones((6, 3)), batch_size=6)
    assert plain.report().devices == () and "mesh" not in repr(plain)
