"""Settings shared by all tests: float64 everywhere, and the test helpers importable by name."""

from __future__ import annotations

import functools
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
import numpy_evaluation
from shared import forget_if_much
from without_programs import without_programs

without_programs()
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
        "--random-units",
        type=int,
        default=int(os.environ.get("ETCOMPILE_RANDOM_UNITS", "18")),
        help="how many random models with packed states, delays and matrix states are held against patterns of Jacobians",
    )
    parser.addoption(
        "--random-units-from",
        type=int,
        default=int(os.environ.get("ETCOMPILE_RANDOM_UNITS_FROM", "0")),
        help="the number of the first of them, to draw them in several runs",
    )
    parser.addoption(
        "--every-rule",
        action="store_true",
        help="run every rule in chunks on every model of the zoo, where otherwise they take turns",
    )
    parser.addoption(
        "--by-xla",
        action="store_true",
        help="compile the programs that tests run by numpy, since the numbers are the question and not what XLA makes of them",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="a few tests of every folder, on three models of the zoo: two minutes",
    )


#: With `--quick`: files of tests, and models where a test runs on every one.
QUICK = frozenset(
    [
        "chunks",
        "errors",
        "exactness",
        "failed_calls",
        "graph",
        "ir",
        "layers",
        "losses",
        "nn_names",
        "oracles",
        "progress",
        "report_text",
        "reset",
        "rule_mistakes",
        "checkpoints",
        "viz",
        "viz_cli",
        "within_step",
        "zoo",
    ]
)
QUICK_MODELS = frozenset({"lstm", "gru_no_batch", "lif_exponential"})


def pytest_configure(config):
    # hypothesis reads its settings at decoration time, before fixtures exist.
    os.environ["ETCOMPILE_RANDOM_MODELS"] = str(config.getoption("--random-models"))
    os.environ["ETCOMPILE_RANDOM_STEPS"] = str(config.getoption("--random-steps"))
    os.environ["ETCOMPILE_RANDOM_UNITS"] = str(config.getoption("--random-units"))
    os.environ["ETCOMPILE_RANDOM_UNITS_FROM"] = str(config.getoption("--random-units-from"))
    if config.getoption("--every-rule"):
        os.environ["ETCOMPILE_EVERY_RULE"] = "1"
    if config.getoption("--by-xla"):
        os.environ["ETCOMPILE_BY_XLA"] = "1"


def pytest_ignore_collect(collection_path, config):
    """With `--quick`, files of which nothing runs are not imported either."""
    if (
        config.getoption("--quick")
        and collection_path.match("test_*.py")
        and not _is_quick_file(collection_path)
    ):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """With `--dist loadgroup`, tests of one model run in one process: they share what is `shared` of it."""
    for item in items:
        if (name := _model(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(name))
    if config.getoption("--quick"):
        left = [item for item in items if not _is_quick(item)]
        items[:] = [item for item in items if _is_quick(item)]
        config.hook.pytest_deselected(items=left)


def _model(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = getattr(params.get("case"), "name", None) or params.get("name")
    return name if isinstance(name, str) else None


def _is_quick_file(path):
    return path.stem.removeprefix("test_") in QUICK


@functools.cache
def _other_models():
    from zoo import CASES  # after the settings above

    return {case.name for case in CASES} - QUICK_MODELS


def _is_quick(item):
    return (
        _is_quick_file(item.path)
        and item.get_closest_marker("slow") is None
        and _model(item) not in _other_models()
    )


@pytest.fixture
def by_numpy(request):
    """What a test jits is traced, and run by numpy: it takes a third less time."""
    with numpy_evaluation.by_numpy(on=request.node.get_closest_marker("by_xla") is None):
        yield


@pytest.fixture(autouse=True)
def _fresh_random_key():
    brainstate.random.seed(0)


def pytest_runtest_teardown():
    """A process that compiles thousands of functions would run out of maps of memory."""
    forget_if_much()
