"""Settings shared by all tests: float64 everywhere, and the test helpers importable by name."""

from __future__ import annotations

import gc
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if metadata.version("jaxlib").startswith("0.10."):
    # The tests compile far more than they run, and this XLA compiles twice as fast with its older emitters.
    # Later ones know no such flag, and stop at an unknown one.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

# They run tiny programs once, so LLVM need not make them fast, and one module for each is enough. What XLA does with
# them, fusion and copies included, stays.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 " + os.environ.get("XLA_FLAGS", "")
)
# Nobody reads tracebacks in the compiled programs of tests.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import brainstate
import jax
from shared import forget_if_much

jax.config.update("jax_enable_x64", True)
brainstate.environ.set(precision=64)
# Tracing makes millions of small objects and hardly a circle of them.
gc.set_threshold(100_000, 20, 50)


def pytest_addoption(parser):
    parser.addoption(
        "--random-models",
        type=int,
        default=int(os.environ.get("ETCOMPILE_RANDOM_MODELS", "200")),
        help="how many random models the property tests draw",
    )
    parser.addoption(
        "--random-steps",
        type=int,
        default=int(os.environ.get("ETCOMPILE_RANDOM_STEPS", "300")),
        help="how many random step functions of users' operations the tests draw",
    )
    parser.addoption(
        "--every-rule",
        action="store_true",
        help="run every rule in chunks on every model of the zoo, where otherwise they take turns",
    )


def pytest_configure(config):
    # hypothesis reads its settings at decoration time, before fixtures exist.
    os.environ["ETCOMPILE_RANDOM_MODELS"] = str(config.getoption("--random-models"))
    os.environ["ETCOMPILE_RANDOM_STEPS"] = str(config.getoption("--random-steps"))
    if config.getoption("--every-rule"):
        os.environ["ETCOMPILE_EVERY_RULE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With `--dist loadgroup`, tests of one model run in one process: they share what is `shared` of it."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name = getattr(params.get("case"), "name", None) or params.get("name")
        if isinstance(name, str):
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(autouse=True)
def _fresh_random_key():
    brainstate.random.seed(0)


def pytest_runtest_teardown():
    """A process that compiles thousands of functions would run out of maps of memory."""
    forget_if_much()
