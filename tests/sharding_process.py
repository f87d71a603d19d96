"""One of two processes with two host devices each, which compute together what one device computes alone.

python tests/sharding_process.py NUMBER PORT: prints the difference to one device.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import brainstate
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from sharding_models import EXAMPLES, compiled, data, difference, over, square


def run(schedule):
    """Gradients and losses in chunks and step by step, and weights after learning; time first, then examples."""
    xs, ys = data("gru")
    step = compiled("gru", schedule)
    if schedule is not None:  # each process brings its half of the examples
        half = EXAMPLES // 2
        mine = slice(half * jax.process_index(), half * (jax.process_index() + 1))
        sharding = NamedSharding(schedule.mesh, PartitionSpec(None, "data"))
        xs, ys = (jax.make_array_from_process_local_data(sharding, v[:, mine], v.shape) for v in (xs, ys))
    found = [step.scan_value_and_grad(square, chunk=chunk)(xs, ys) for chunk in (1, 3)]
    losses = step.learn(square, optax.adam(1e-2))(xs, ys)
    params = jax.tree.map(lambda s: s.value, step.param_states)
    return found, losses, params, step.traces


def main(number, port):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    brainstate.environ.set(precision=64)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    found = run(over((2, 2)))
    assert not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(found))
    whole = multihost_utils.process_allgather(found, tiled=True)
    wanted = run(None)
    print(difference(whole, jax.tree.map(np.asarray, wanted)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
