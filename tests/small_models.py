"""Small models, each with one thing that few models have: a primitive, a dtype, a shape, a kind of output.

Every builder returns ``(fn, params, state, xs)`` for `etcompile.from_function`, with time on axis 0 of the inputs. The names
are those of the tests. They are alive: a trained parameter reaches a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

STEPS = 7
SMALL: dict[str, Callable] = {}


def small(build):
    """Add a builder to `SMALL`, under its name."""
    SMALL[build.__name__] = build
    return build


def draw(seed, *shape, dtype=jnp.float64, scale=0.5):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def cell(update, out=lambda h: h, n=4, dtype=jnp.float64, state=None):
    """A leaky cell of n units for two examples, whose drive goes through ``update(params, h, drive)``."""
    params = {"w": draw(1, 3, n, dtype=dtype), "b": draw(2, n, dtype=dtype)}
    start = {"h": draw(3, 2, n, dtype=dtype) if state is None else state}

    def fn(params, state, x):
        h = update(params, state["h"], x @ params["w"])
        return {"h": h}, out(h)

    return fn, params, start, draw(4, STEPS, 2, 3, dtype=dtype)


# -- shapes -----------------------------------------------------------------------------------------------------------


@small
def state_without_axes():
    def fn(p, s, x):
        h = jnp.tanh(p["a"] * s["h"] + p["w"] * x)
        return {"h": h}, 2 * h

    return fn, {"a": draw(1), "w": draw(2)}, {"h": draw(3)}, draw(4, STEPS)


@small
def two_states_without_axes():
    def fn(p, s, x):
        v = 0.9 * s["v"] + p["c"] * s["u"] + jnp.dot(x, p["w"])
        u = jnp.tanh(p["d"] * s["u"] - 0.5 * s["v"])
        return {"v": v, "u": u}, v * u

    params = {"w": draw(1, 3), "c": draw(2), "d": draw(5)}
    return fn, params, {"v": draw(3), "u": draw(6)}, draw(4, STEPS, 3)


@small
def scalar_beside_units():
    def fn(p, s, x):
        g = jnp.tanh(0.5 * s["g"] + jnp.dot(x, p["w"]))
        h = p["a"] * s["h"] + g * p["b"]
        return {"g": g, "h": h}, h

    params = {"w": draw(1, 3), "a": draw(2, 4), "b": draw(5, 4)}
    return fn, params, {"g": draw(3), "h": draw(6, 4)}, draw(4, STEPS, 3)


@small
def size_zero_axis():
    def fn(p, s, x):
        h = jnp.tanh(0.5 * s["h"] + x @ p["w"])
        e = 0.5 * s["e"] + x @ p["v"]
        return {"h": h, "e": e}, h

    params = {"w": draw(1, 3, 4), "v": draw(2, 3, 0)}
    return fn, params, {"h": draw(3, 2, 4), "e": draw(3, 2, 0)}, draw(4, STEPS, 2, 3)


@small
def one_example_one_unit():
    def fn(p, s, x):
        h = jnp.tanh(s["h"] @ p["u"] + x @ p["w"])
        return {"h": h}, h

    return fn, {"w": draw(1, 1, 1), "u": draw(2, 1, 1)}, {"h": draw(3, 1, 1)}, draw(4, STEPS, 1, 1)


@small
def no_batch_recurrent():
    def fn(p, s, x):
        h = jnp.tanh(p["u"] @ s["h"] + p["w"] @ x)
        return {"h": h}, p["o"] @ h

    params = {"w": draw(1, 4, 3), "u": draw(2, 4, 4), "o": draw(5, 2, 4)}
    return fn, params, {"h": draw(3, 4)}, draw(4, STEPS, 3)


# -- inputs and outputs --------------------------------------------------------------------------------------------------


@small
def outputs_in_a_dict_with_none_and_integers():
    def out(h):
        return {"h": h, "winner": jnp.argmax(h, -1), "on": h > 0, "nothing": None, "empty": {}}

    return cell(lambda p, h, d: jnp.tanh(0.8 * h + d + p["b"]), out)


@small
def integer_input():
    def fn(p, s, x):
        h = jnp.tanh(0.5 * s["h"] + p["w"][x])
        return {"h": h}, h

    return fn, {"w": draw(1, 5, 4)}, {"h": draw(3, 2, 4)}, jnp.asarray([[0, 1], [2, 3], [4, 4]] * 3)[:STEPS]


@small
def boolean_input():
    def fn(p, s, x):
        h = jnp.where(x[:, None], jnp.tanh(0.5 * s["h"] + p["w"]), 0.9 * s["h"])
        return {"h": h}, h

    return fn, {"w": draw(1, 4)}, {"h": draw(3, 2, 4)}, draw(4, STEPS, 2) > 0


# -- dtypes -----------------------------------------------------------------------------------------------------------


def mixed(weights, states, inputs):
    def build():
        def fn(p, s, x):
            h = jnp.tanh(0.5 * s["h"] + x @ p["w"] + s["h"] @ p["u"] + p["b"]).astype(states)
            return {"h": h}, h

        params = {"w": draw(1, 3, 4, dtype=weights), "u": draw(2, 4, 4, dtype=weights)}
        params["b"] = draw(5, 4, dtype=weights)
        return fn, params, {"h": draw(3, 2, 4, dtype=states)}, draw(4, STEPS, 2, 3, dtype=inputs)

    return build


for _w, _s, _x in (
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16"),
    ("float16", "float16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float32", "float64", "float32"),
    ("float64", "float32", "float32"),
):
    SMALL[f"weights_{_w}_states_{_s}_inputs_{_x}"] = mixed(_w, _s, _x)


@small
def preferred_element_type():
    def fn(p, s, x):
        drive = jnp.einsum("bi,io->bo", x, p["w"], preferred_element_type=jnp.float32)
        again = jnp.einsum("bi,io->bo", s["h"], p["u"], preferred_element_type=jnp.float32)
        h = (0.5 * s["h"].astype(jnp.float32) + jnp.tanh(drive + again)).astype(jnp.bfloat16)
        return {"h": h}, h.astype(jnp.float32)

    params = {"w": draw(1, 3, 4, dtype=jnp.bfloat16), "u": draw(2, 4, 4, dtype=jnp.bfloat16)}
    start = {"h": draw(3, 2, 4, dtype=jnp.bfloat16)}
    return fn, params, start, draw(4, STEPS, 2, 3, dtype=jnp.bfloat16)


@small
def states_of_two_dtypes_and_counters():
    def fn(p, s, x):
        a = 0.5 * s["a"] + x @ p["w"]
        b = jnp.tanh(0.7 * s["b"] + a.astype(jnp.float32) * p["g"])
        on = jnp.where(s["on"], b, 0.5 * b)
        state = {"a": a, "b": on, "n": s["n"] + 1, "on": ~s["on"]}
        return state, on + 0 * s["n"]

    params = {"w": draw(1, 3, 4), "g": draw(2, 4, dtype=jnp.float32)}
    state = {"a": draw(3, 2, 4), "b": draw(5, 2, 4, dtype=jnp.float32)}
    state.update(n=jnp.int32(0), on=jnp.array(True))
    return fn, params, state, draw(4, STEPS, 2, 3)


@small
def complex64_beside_float64():
    def fn(p, s, x):
        z = p["a"] * s["z"] + (x @ p["w"]).astype(jnp.complex64)
        r = 0.5 * s["r"] + z.real.astype(jnp.float64) * p["b"]
        return {"z": z, "r": r}, r + jnp.abs(z)

    a = (draw(1, 4) + 1j * draw(2, 4)).astype(jnp.complex64)
    z = (draw(3, 2, 4) + 1j * draw(6, 2, 4)).astype(jnp.complex64)
    params = {"a": a, "w": draw(5, 3, 4), "b": draw(8, 4)}
    return fn, params, {"z": z, "r": draw(7, 2, 4)}, draw(4, STEPS, 2, 3)


# -- primitives with a program or a linear map inside ---------------------------------------------------------------------


def spd(h):
    return jnp.eye(4) * 3 + 0.1 * h[:, :, None] * h[:, None, :]


@small
def linear_solve():
    return cell(
        lambda p, h, d: jnp.linalg.solve(jnp.eye(4) + 0.1 * jnp.outer(p["b"], p["b"]), (0.5 * h + d).T).T
    )


@small
def linear_solve_of_states():
    return cell(lambda p, h, d: jnp.linalg.solve(spd(h), (0.5 * h + d + p["b"])[..., None])[..., 0])


@small
def cholesky_of_states():
    return cell(lambda p, h, d: 0.5 * h + jnp.linalg.cholesky(spd(jnp.tanh(d + p["b"])))[:, :, 0])


@small
def triangular_solve():
    def update(p, h, d):
        a = jnp.tril(spd(h))
        return lax.linalg.triangular_solve(a, (0.5 * h + d)[..., None], left_side=True, lower=True)[..., 0]

    return cell(update)


@small
def eigenvalues():
    return cell(lambda p, h, d: 0.5 * h + 0.1 * jnp.linalg.eigvalsh(spd(h) + jnp.diag(jnp.arange(4.0))) + d)


@small
def singular_values():
    return cell(
        lambda p, h, d: (
            0.5 * h + 0.1 * jnp.linalg.svd(spd(h) + jnp.diag(jnp.arange(4.0)), compute_uv=False) + d
        )
    )


@small
def qr_of_states():
    return cell(lambda p, h, d: 0.5 * h + d + 0.1 * jnp.linalg.qr(spd(h))[1][:, 0])


@small
def determinant():
    return cell(lambda p, h, d: 0.5 * h + d + 0.01 * jnp.linalg.slogdet(spd(h))[1][:, None])


@small
def fft_of_states():
    return cell(lambda p, h, d: 0.5 * h + d + 0.1 * jnp.fft.irfft(jnp.fft.rfft(h) * 0.5, n=4))


@small
def custom_root():
    def update(p, h, d):
        def f(y):
            return y + 0.1 * y**3 - (0.5 * h + d + p["b"])

        def newton(f, y):
            for _ in range(20):
                y = y - f(y) / (1 + 0.3 * y**2)
            return y

        return lax.custom_root(f, h, newton, lambda g, y: y / g(jnp.ones_like(y)))

    return cell(update)


@small
def custom_linear_solve():
    def update(p, h, d):
        def matvec(v):
            return 2 * v + 0.1 * jnp.tanh(p["b"]) * v

        solve = lambda mv, b: b / mv(jnp.ones_like(b))  # noqa: E731
        return lax.custom_linear_solve(matvec, 0.5 * h + d, solve, solve)

    return cell(update)


@small
def reduce_with_a_function():
    return cell(lambda p, h, d: 0.5 * h + d + lax.reduce(0.1 * h, 0.0, lambda a, b: a + b, (1,))[:, None])


@small
def reduce_with_a_product():
    def update(p, h, d):
        return 0.5 * h + d + 0.1 * lax.reduce(1 + 0.1 * h, 1.0, lax.mul, (1,))[:, None]

    return cell(update)


@small
def reduce_windows():
    def update(p, h, d):
        pooled = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")
        summed = lax.reduce_window(d, 0.0, lax.add, (1, 3), (1, 1), "SAME")
        return 0.5 * pooled + summed + p["b"]

    return cell(update)


@small
def cumulative():
    def update(p, h, d):
        return (
            0.4 * h + 0.2 * lax.cumlogsumexp(d, 1) + 0.1 * lax.cummax(h, 1) + 0.1 * jnp.cumprod(p["b"] + d, 1)
        )

    return cell(update)


@small
def top_k():
    return cell(lambda p, h, d: 0.5 * h + d + p["b"] + 0.1 * lax.top_k(h, 4)[0])


@small
def approx_max_k():
    return cell(lambda p, h, d: 0.5 * h + d + p["b"] + 0.1 * lax.approx_max_k(h.astype(jnp.float32), 4)[0])


@small
def sort_of_several():
    def update(p, h, d):
        a, b = lax.sort((h, d + p["b"]), dimension=1, num_keys=1)
        return 0.5 * a + 0.3 * b

    return cell(update)


@small
def argsort_and_take():
    def update(p, h, d):
        order = jnp.argsort(h, axis=1)
        return 0.5 * jnp.take_along_axis(h, order, axis=1) + d + p["b"]

    return cell(update)


@small
def scatters():
    def update(p, h, d):
        h = h.at[:, 1].multiply(0.5).at[:, 2].max(d[:, 2]).at[:, 0].min(d[:, 1]).at[:, 3].add(d[:, 3])
        return h.at[:, jnp.array([0, 0, 1])].add(0.1 * d[:, :3]).at[:, 0].set(p["b"][0] + d[:, 0])

    return cell(update)


@small
def scatter_at_a_traced_index():
    def update(p, h, d):
        k = jnp.argmax(h[0])
        return (0.5 * h + d).at[:, k].add(p["b"][k]).at[:, k].mul(0.5)

    return cell(update)


@small
def dynamic_slices():
    def update(p, h, d):
        k = jnp.argmax(h[0])
        piece = lax.dynamic_slice(d, (0, k), (2, 2))
        return lax.dynamic_update_slice(0.5 * h + d + p["b"], piece, (0, 3 - k))

    return cell(update)


@small
def clamp_and_bits():
    def update(p, h, d):
        sign = lax.bitcast_convert_type(h, jnp.int64) < 0
        return lax.clamp(-1.0, jnp.where(sign, 0.5 * h, 0.7 * h) + d + p["b"], 1.0)

    return cell(update)


@small
def special_functions():
    def update(p, h, d):
        safe = 1.5 + jnp.tanh(d)
        gamma = jax.scipy.special.gammainc(2.0, safe) + jax.scipy.special.gammainc(safe, 1.0)
        return (
            0.4 * h
            + 0.1 * lax.erf_inv(jnp.tanh(h) * 0.5)
            + gamma * p["b"]
            + jax.scipy.special.betainc(2.0, 3.0, 0.5 + 0.2 * jnp.tanh(d))
        )

    return cell(update)


@small
def random_numbers():
    def fn(p, s, x):
        key, now = jax.random.split(s["key"])
        noise = jax.random.normal(now, (2, 4)) + jax.random.gamma(now, 2.0, (2, 4))
        h = 0.5 * s["h"] + x @ p["w"] + p["b"] * noise + jax.random.bernoulli(now, 0.5, (2, 4))
        bits = lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (4,))[1]
        return {"h": h + 0 * bits.astype(h.dtype), "key": key}, h

    params = {"w": draw(1, 3, 4), "b": draw(2, 4)}
    return fn, params, {"h": draw(3, 2, 4), "key": jax.random.key(0)}, draw(4, STEPS, 2, 3)


@small
def random_gamma_of_states():
    def fn(p, s, x):
        key, now = jax.random.split(s["key"])
        h = 0.5 * s["h"] + x @ p["w"] + 0.1 * jax.random.gamma(now, 1.5 + jnp.tanh(s["h"]))
        return {"h": h, "key": key}, h

    return fn, {"w": draw(1, 3, 4)}, {"h": draw(3, 2, 4), "key": jax.random.PRNGKey(0)}, draw(4, STEPS, 2, 3)


@small
def barrier_of_two_shapes():
    def update(p, h, d):
        h, b = lax.optimization_barrier((h, p["b"]))
        d, total = lax.optimization_barrier((d, jnp.sum(h)))
        return jnp.tanh(0.5 * h + d + b) + 0.01 * total

    return cell(update)


@small
def custom_vmap():
    @jax.custom_batching.custom_vmap
    def squash(v):
        return jnp.tanh(v)

    @squash.def_vmap
    def _(size, batched, v):
        return jnp.tanh(v), batched[0]

    return cell(lambda p, h, d: squash(0.5 * h + d + p["b"]))


@small
def custom_derivatives():
    @jax.custom_vjp
    def forward(v, w):
        return v * w

    forward.defvjp(lambda v, w: (v * w, (v, w)), lambda res, g: (g * res[1], (g * res[0]).sum(0)))

    @jax.custom_jvp
    def squash(v):
        return jnp.tanh(v)

    squash.defjvp(lambda p, t: (jnp.tanh(p[0]), t[0] * (1 - jnp.tanh(p[0]) ** 2)))
    return cell(lambda p, h, d: squash(forward(0.5 * h, p["b"]) + d))


@small
def while_of_a_state():
    """No trained parameter enters the loop, whose carry is a state that is not hidden."""

    def fn(p, s, x):
        n, r = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.9 * c[1] + 0.1), (0, s["r"]))
        h = 0.5 * s["h"] + x @ p["w"] + p["b"] * r
        return {"h": h, "r": r}, h

    params = {"w": draw(1, 3, 4), "b": draw(2, 4)}
    return fn, params, {"h": draw(3, 2, 4), "r": draw(5, 2, 4)}, draw(4, STEPS, 2, 3)


@small
def while_of_an_input():
    def fn(p, s, x):
        y = lax.while_loop(lambda c: jnp.sum(c) > 1, lambda c: 0.5 * c, jnp.abs(x))
        h = 0.5 * s["h"] + y @ p["w"]
        return {"h": h}, h

    return fn, {"w": draw(1, 3, 4)}, {"h": draw(3, 2, 4)}, draw(4, STEPS, 2, 3)


@small
def conditions_and_switches():
    def update(p, h, d):
        return lax.switch(
            jnp.argmax(h[0]) % 3,
            [lambda v: jnp.tanh(v), lambda v: 0.5 * v, lambda v: v * p["b"]],
            0.5 * h + d,
        )

    return cell(update)


@small
def vmapped_cell():
    def update(p, h, d):
        return jax.vmap(lambda hh, dd: jnp.tanh(hh @ jnp.diag(p["b"]) + dd))(h, d)

    return cell(update)


@small
def vmapped_conditions():
    def update(p, h, d):
        one = lambda v: lax.cond(jnp.sum(v) > 0, jnp.tanh, lambda v: 0.5 * v, v)  # noqa: E731
        return jax.vmap(one)(0.5 * h + d + p["b"])

    return cell(update)


@small
def scan_inside():
    def update(p, h, d):
        return lax.scan(lambda c, x: (0.5 * c + jnp.tanh(p["b"] * c) + x, None), h, jnp.stack([d, d]))[0]

    return cell(update)


@small
def jit_and_remat():
    return cell(lambda p, h, d: jax.checkpoint(jax.jit(lambda v: jnp.tanh(v) * p["b"]))(0.5 * h + d))


@small
def a_factor_of_zero():
    """The recurrent factor is zero exactly, so are parts of the traces of rules that keep norms."""
    return cell(lambda p, h, d: jnp.tanh(0.0 * h + (0.0 * d) @ jnp.eye(4) + p["b"] * h))


@small
def zero_input():
    fn, params, state, xs = cell(lambda p, h, d: jnp.tanh(0.5 * h + d + p["b"]))
    return fn, params, state, 0 * xs


@small
def no_reach_of_the_weight():
    def fn(p, s, x):
        h = jnp.tanh(0.5 * s["h"] + p["b"] + 0.0 * lax.stop_gradient(x @ p["w"]))
        return {"h": h}, h

    return fn, {"w": draw(1, 3, 4), "b": draw(2, 4)}, {"h": draw(3, 2, 4)}, draw(4, STEPS, 2, 3)


@small
def convolution():
    def fn(p, s, x):
        y = lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        h = jnp.tanh(0.5 * s["h"] + y)
        return {"h": h}, h

    return fn, {"k": draw(1, 3, 2, 3)}, {"h": draw(3, 2, 4, 3)}, draw(4, STEPS, 2, 4, 2)


@small
def einsum_of_states():
    return cell(lambda p, h, d: 0.5 * h + d + 0.1 * jnp.einsum("bi,bj,j->bi", h, h, p["b"]))
