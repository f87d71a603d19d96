"""What may lie between weight, state and readout: norms, rolls, gates, gathers, convolutions, old states."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from .base import case, cat
from .written import drive, weights, written

sigmoid = jax.nn.sigmoid
DENSE = {"U": (3, 4), "W": (4, 4), "b": (4,), "V": (4, 2)}
FEEDFORWARD = {"U": (3, 4), "b": (4,), "V": (4, 2)}


# --- Norms, softmax, roll, inhibition -------------------------------------------------------------------------------


def layer_norm(y, cut):
    return (y - cut(jnp.mean(y, -1, keepdims=True))) * jax.lax.rsqrt(
        cut(jnp.var(y, -1, keepdims=True)) + 1e-3
    )


def rms_norm(y, cut):
    return y * jax.lax.rsqrt(cut(jnp.mean(y * y, -1, keepdims=True)) + 1e-3)


def softmax(y, cut):
    e = jnp.exp(y)
    return e / cut(jnp.sum(e, -1, keepdims=True))


@case("norm")
def layer_norm_recurrent(batch, dtype):
    def body(p, s, x, *, cut, put):
        y = layer_norm(drive(p, x, s["h"], cut), cut) * p["gain"] + p["shift"]
        h = put("h", 0.6 * s["h"] + jnp.tanh(y))
        return {"h": h}, h @ p["V"]

    params = weights(**DENSE, gain=(4,), shift=(4,))
    return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("norm")
def layer_norm_feedforward(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", p["a"] * s["h"] + layer_norm(x @ p["U"] + p["b"], cut))
        return {"h": h}, h @ p["V"]

    return written(body, weights(**FEEDFORWARD, a=(4,)), {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("norm")
def layer_norm_after_the_state(batch, dtype):
    """A norm between state and readout costs no exactness."""

    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + p["b"]))
        return {"h": h}, layer_norm(h, lambda v: v) @ p["V"]

    return written(body, weights(**FEEDFORWARD, a=(4,)), {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("norm")
def rms_norm_recurrent(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", 0.5 * s["h"] + jnp.tanh(rms_norm(drive(p, x, s["h"], cut), cut) * p["gain"]))
        return {"h": h}, h @ p["V"]

    return written(body, weights(**DENSE, gain=(4,)), {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("norm")
def softmax_between(batch, dtype):
    def body(p, s, x, *, cut, put, softmax=softmax):
        h = put("h", 0.7 * s["h"] + softmax(drive(p, x, s["h"], cut), cut))
        return {"h": h}, h @ p["V"]

    def model(p, s, x, *, cut, put):
        return body(p, s, x, cut=cut, put=put, softmax=lambda y, cut: jax.nn.softmax(y))

    return written(
        body, weights(**DENSE), {"h": (4,)}, exact=False, batch=batch, dtype=dtype, model_body=model
    )


@case("norm")
def log_softmax_between(batch, dtype):
    def body(
        p, s, x, *, cut, put, log_softmax=lambda y, cut: y - cut(jax.nn.logsumexp(y, -1, keepdims=True))
    ):
        h = put("h", 0.7 * s["h"] + 0.2 * log_softmax(x @ p["U"] + p["b"], cut))
        return {"h": h}, h @ p["V"]

    def model(p, s, x, *, cut, put):
        return body(p, s, x, cut=cut, put=put, log_softmax=lambda y, cut: jax.nn.log_softmax(y))

    return written(
        body, weights(**FEEDFORWARD), {"h": (4,)}, exact=False, batch=batch, dtype=dtype, model_body=model
    )


@case("roll")
def roll_between(batch, dtype):
    """The output of a weight rolled along the units: still one position per element."""

    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + jnp.roll(x @ p["U"] + p["b"], 1, -1)))
        return {"h": h}, h @ p["V"]

    return written(body, weights(**FEEDFORWARD, a=(4,)), {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("roll")
def roll_between_recurrent(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(0.5 * s["h"] + jnp.roll(drive(p, x, s["h"], cut), 2, -1)))
        return {"h": h}, h @ p["V"]

    return written(body, weights(**DENSE), {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("roll")
def roll_of_the_state(batch, dtype):
    """The state reaches its own position and a neighbour's: the own one is kept."""

    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + 0.5 * jnp.roll(cut(s["h"]), 1, -1) + x @ p["U"]))
        return {"h": h}, h @ p["V"]

    return written(
        body, weights(U=(3, 4), V=(4, 2), a=(4,)), {"h": (4,)}, exact=False, batch=batch, dtype=dtype
    )


@case("inhibition")
def mean_field_inhibition(batch, dtype):
    def body(p, s, x, *, cut, put):
        inhibition = p["k"] * jnp.mean(cut(s["h"]), -1, keepdims=True)
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + p["b"] - inhibition))
        return {"h": h}, h @ p["V"]

    params = weights(**FEEDFORWARD, a=(4,), k=(4,))
    return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("inhibition")
def global_inhibition_of_one_strength(batch, dtype):
    """A scalar weight on the mean: all units read the one product, so the weight has a trace for each; the mean is cut."""

    def body(p, s, x, *, cut, put):
        inhibition = p["k"] * cut(jnp.mean(s["h"], -1, keepdims=True))
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + p["b"] - inhibition))
        return {"h": h}, h @ p["V"]

    params = weights(**FEEDFORWARD, a=(4,), k=jnp.asarray(0.8))
    return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


# --- Gates ----------------------------------------------------------------------------------------------------------


def gated(pieces, width=12):
    def build(batch, dtype):
        def body(p, s, x, *, cut, put):
            f, i, u = pieces(drive(p, x, s["h"], cut))
            h = put("h", sigmoid(f) * s["h"] + sigmoid(i) * jnp.tanh(u))
            return {"h": h}, h @ p["V"]

        params = weights(U=(3, width), W=(4, width), b=(width,), V=(4, 2))
        return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype)

    return build


case("gates", name="gates_split")(gated(lambda y: jnp.split(y, 3, axis=-1)))
case("gates", name="gates_slice")(gated(lambda y: (y[..., :4], y[..., 8:], y[..., 4:8])))
case("gates", name="gates_strided")(gated(lambda y: (y[..., ::3], y[..., 1::3], y[..., 2::3])))
case("gates", name="gates_reshape")(
    gated(lambda y: tuple(jnp.moveaxis(y.reshape(*y.shape[:-1], 4, 3), -1, 0)))
)
case("gates", name="gates_stack")(
    gated(lambda y: tuple(jnp.stack([y[..., :4], y[..., 4:8], y[..., 8:]], axis=1)[:, k] for k in range(3)))
)
case("gates", name="gates_tile")(
    gated(lambda y: tuple(jnp.tile(y, (1, 2))[..., k : k + 4] for k in (12, 4, 8)))
)
case("gates", name="gates_partly_unused", batch=2)(
    gated(lambda y: (y[..., :4], y[..., 4:8], y[..., 8:12]), width=14)
)
case("gates", name="gates_reversed")(gated(lambda y: (y[..., 3::-1], y[..., 4:8], y[..., 8:])))


@case("gates")
def gates_of_the_input(batch, dtype):
    """A gated linear recurrence whose gates see the input only: nothing is cut."""

    def body(p, s, x, *, cut, put):
        f, u = jnp.split(x @ p["U"] + p["b"], 2, axis=-1)
        f = sigmoid(f)
        h = put("h", f * s["h"] + (1 - f) * jnp.tanh(u))
        return {"h": h}, h @ p["V"]

    return written(
        body, weights(U=(3, 8), b=(8,), V=(4, 2)), {"h": (4,)}, exact=True, batch=batch, dtype=dtype
    )


@case("gates")
def selective_state_space(batch, dtype):
    """One step size, and one input, for several states of a channel."""

    def body(p, s, x, *, cut, put):
        dt = jax.nn.softplus(x @ p["Wdt"] + p["bdt"])[..., None]
        u = (x @ p["Wu"])[..., None]
        h = put("h", jnp.exp(-dt * jax.nn.softplus(p["A"])) * s["h"] + dt * p["B"] * u)
        return {"h": h}, jnp.sum(h * p["C"], -1) @ p["V"]

    params = weights(Wdt=(3, 4), bdt=(4,), Wu=(3, 4), A=(4, 2), B=(4, 2), C=(4, 2), V=(4, 2))
    return written(body, params, {"h": (4, 2)}, exact=True, batch=batch, dtype=dtype)


# --- States and states ----------------------------------------------------------------------------------------------


@case("states")
def states_in_one_array(batch, dtype):
    """Potential and adaptation side by side."""

    def body(p, s, x, *, cut, put):
        v, a = s["s"][..., 0], s["s"][..., 1]
        v = p["k"] * v + x @ p["U"] + p["b"] - 0.5 * a
        s = put("s", jnp.stack([v, 0.9 * a + 0.2 * jnp.tanh(v)], -1))
        return {"s": s}, s[..., 0] @ p["V"]

    params = weights(**FEEDFORWARD, k=(4,))
    return written(body, params, {"s": (4, 2)}, exact=True, batch=batch, dtype=dtype)


@case("states")
def shift_register(batch, dtype):
    """A delay of three steps before a leaky unit."""

    def body(p, s, x, *, cut, put):
        old = s["buffer"]
        y = jnp.tanh(x @ p["U"] + p["b"])
        buffer = put("buffer", jnp.concatenate([y[..., None, :], old[..., :-1, :]], -2))
        h = put("h", p["k"] * s["h"] + old[..., -1, :])
        return {"buffer": buffer, "h": h}, h @ p["V"]

    params = weights(**FEEDFORWARD, k=(4,))
    return written(body, params, {"buffer": (3, 4), "h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("states")
def states_multiplied(batch, dtype):
    def body(p, s, x, *, cut, put):
        g = put("g", 0.8 * s["g"] + 0.3 * s["h"])
        h = put("h", jnp.tanh(x @ p["U"] + p["b"] + p["k"] * s["h"] * s["g"]))
        return {"h": h, "g": g}, (h * g) @ p["V"]

    params = weights(**FEEDFORWARD, k=(4,))
    return written(body, params, {"h": (4,), "g": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("states")
def states_multiplied_recurrent(batch, dtype):
    def body(p, s, x, *, cut, put):
        y = drive(p, x, s["h"] * s["g"], cut)
        h = put("h", jnp.tanh(y) * s["g"])
        g = put("g", sigmoid(h + p["k"] * s["g"]))
        return {"h": h, "g": g}, h @ p["V"]

    params = weights(**DENSE, k=(4,))
    return written(body, params, {"h": (4,), "g": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("states")
def chain_of_three_states(batch, dtype):
    """A cascade of filters, the first learned, the last read."""

    def body(p, s, x, *, cut, put):
        a = put("a", p["d"] * s["a"] + x @ p["U"])
        b = put("b", 0.7 * s["b"] + jnp.tanh(a))
        c = put("c", 0.9 * s["c"] + sigmoid(b) * s["a"])
        return {"a": a, "b": b, "c": c}, c @ p["V"]

    params = weights(U=(3, 4), V=(4, 2), d=(4,))
    return written(body, params, dict.fromkeys("abc", (4,)), exact=True, batch=batch, dtype=dtype)


@case("states")
def readout_of_the_old_state(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + p["b"]))
        return {"h": h}, s["h"] @ p["V"]

    return written(body, weights(**FEEDFORWARD, a=(4,)), {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("states")
def readout_of_old_and_new_state(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(0.5 * s["h"] + drive(p, x, s["h"], cut)))
        return {"h": h}, cat(h, s["h"] * h) @ p["V"]

    params = weights(U=(3, 4), W=(4, 4), b=(4,), V=(8, 2))
    return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("states")
def second_layer_reads_the_old_first(batch, dtype):
    """A delay of one step between the layers."""

    def body(p, s, x, *, cut, put):
        first = put("first", jnp.tanh(p["a"] * s["first"] + x @ p["U"]))
        second = put("second", jnp.tanh(0.5 * s["second"] + cut(s["first"]) @ p["W"] + p["b"]))
        return {"first": first, "second": second}, cat(first, second) @ p["V"]

    params = weights(U=(3, 4), a=(4,), W=(4, 5), b=(5,), V=(9, 2))
    groups = (("first",), ("second",))
    return written(
        body, params, {"first": (4,), "second": (5,)}, groups=groups, exact=False, batch=batch, dtype=dtype
    )


@case("states")
def independent_layers(batch, dtype):
    """Two recurrences that meet in the readout only: two groups, exact."""

    def body(p, s, x, *, cut, put):
        fast = put("fast", jnp.tanh(p["a"] * s["fast"] + x @ p["U"]))
        slow = put("slow", 0.9 * s["slow"] + x @ p["W"])
        return {"fast": fast, "slow": slow}, cat(fast, slow * slow) @ p["V"]

    params = weights(U=(3, 4), a=(4,), W=(3, 5), V=(9, 2))
    groups = (("fast",), ("slow",))
    return written(
        body, params, {"fast": (4,), "slow": (5,)}, groups=groups, exact=True, batch=batch, dtype=dtype
    )


@case("states")
def short_term_state(batch, dtype):
    """A recurrence that its author did not call hidden."""

    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(0.5 * s["h"] + drive(p, x, s["h"], cut)))
        return {"h": h}, h @ p["V"]

    return written(
        body,
        weights(**DENSE),
        {"h": (4,)},
        exact=False,
        batch=batch,
        dtype=dtype,
        kind=brainstate.ShortTermState,
    )


@case("states")
def leaky_readout(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + p["b"]))
        r = put("r", 0.8 * s["r"] + cut(h) @ p["V"])
        return {"h": h, "r": r}, r

    return written(
        body,
        weights(**FEEDFORWARD, a=(4,)),
        {"h": (4,), "r": (2,)},
        groups=(("h",), ("r",)),
        exact=False,
        batch=batch,
        dtype=dtype,
    )


@case("states")
def leaky_readout_of_the_input(batch, dtype):
    def body(p, s, x, *, cut, put):
        r = put("r", 0.8 * s["r"] + x @ p["V"] + p["b"])
        return {"r": r}, r

    return written(body, weights(V=(3, 2), b=(2,)), {"r": (2,)}, exact=True, batch=batch, dtype=dtype)


@case("states")
def filtered_input_is_not_hidden(batch, dtype):
    """No parameter reaches the filter, so it is data, and a weight may spread it without any loss."""

    def body(p, s, x, *, cut, put):
        trace = 0.7 * s["trace"] + 0.5 * x
        h = put("h", jnp.tanh(p["a"] * s["h"] + trace @ p["U"] + p["b"]))
        return {"trace": trace, "h": h}, h @ p["V"]

    return written(
        body,
        weights(**FEEDFORWARD, a=(4,)),
        {"trace": (3,), "h": (4,)},
        groups=(("h",),),
        exact=True,
        batch=batch,
        dtype=dtype,
    )


@case("states")
def step_counter(batch, dtype):
    """An integer state beside the hidden one."""

    def body(p, s, x, *, cut, put):
        n = s["n"] + 1
        warm = jnp.where(n % 3 == 0, 0.2, 0.9)
        h = put("h", jnp.tanh(warm * s["h"] * p["a"] + x @ p["U"] + p["b"]))
        return {"n": n, "h": h}, h @ p["V"]

    return written(
        body,
        weights(**FEEDFORWARD, a=(4,)),
        {"n": lambda b: jnp.asarray(0), "h": (4,)},
        groups=(("h",),),
        exact=True,
        batch=batch,
        dtype=dtype,
        kind=brainstate.ShortTermState,
    )


@case("states")
def states_of_rank_three(batch, dtype):
    def body(p, s, x, *, cut, put):
        y = jnp.einsum("...i,imn->...mn", x, p["U"]) + jnp.einsum("...mn,mnkl->...kl", cut(s["h"]), p["W"])
        h = put("h", jnp.tanh(p["a"] * s["h"] + y + p["b"]))
        return {"h": h}, jnp.einsum("...mn,mno->...o", h, p["V"])

    params = weights(U=(3, 2, 3), W=(2, 3, 2, 3), a=(2, 3), b=(3,), V=(2, 3, 2))
    return written(body, params, {"h": (2, 3)}, exact=False, batch=batch, dtype=dtype)


@case("states")
def batched_weights_per_head(batch, dtype):
    """A weight per head (a dot with a batch axis), the recurrence within the head."""

    def body(p, s, x, *, cut, put):
        y = jnp.einsum("...i,hij->...hj", x, p["U"]) + jnp.einsum("...hi,hij->...hj", cut(s["h"]), p["W"])
        h = put("h", jnp.tanh(0.4 * s["h"] + y))
        return {"h": h}, h.reshape(*h.shape[:-2], 6) @ p["V"]

    params = weights(U=(2, 3, 3), W=(2, 3, 3), V=(6, 2))
    return written(body, params, {"h": (2, 3)}, exact=False, batch=batch, dtype=dtype)


# --- Gathers, convolutions, sparse sums -------------------------------------------------------------------------------


@case("gather")
def embedding(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + p["E"][x]))
        return {"h": h}, h @ p["V"]

    return written(
        body,
        weights(E=(5, 4), a=(4,), V=(4, 2)),
        {"h": (4,)},
        exact=True,
        batch=batch,
        dtype=dtype,
        x_shape=(),
        x_integers=5,
    )


@case("gather")
def embedding_before_a_weight(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(0.5 * s["h"] + drive(p, cut(p["E"][x]), s["h"], cut)))
        return {"h": h}, h @ p["V"]

    return written(
        body,
        weights(**DENSE, E=(5, 3)),
        {"h": (4,)},
        exact=False,
        batch=batch,
        dtype=dtype,
        x_shape=(),
        x_integers=5,
    )


def convolution(x, kernel, groups=1):
    """Channels last, same size out."""
    spatial = "HW"[: x.ndim - 2]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,) * len(spatial),
        "SAME",
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
    )


def convolutional(size, channels_in, channels, recurrent, groups=1, kernel=3):
    window = (kernel,) * len(size)

    def build(batch, dtype):
        def body(p, s, x, *, cut, put):
            y = convolution(x, p["K"], groups) + p["b"]
            if recurrent:
                y = y + convolution(cut(s["h"]), p["R"], groups)
            h = put("h", jnp.tanh(p["a"] * s["h"] + y))
            return {"h": h}, h.reshape(h.shape[0], -1) @ p["V"]

        params = weights(
            K=(*window, channels_in // groups, channels),
            b=(channels,),
            a=(channels,),
            V=(int(np.prod(size)) * channels, 2),
            **({"R": (*window, channels // groups, channels)} if recurrent else {}),
        )
        return written(
            body,
            params,
            {"h": (*size, channels)},
            exact=not recurrent,
            batch=batch,
            dtype=dtype,
            x_shape=(*size, channels_in),
        )

    return build


case("convolution", batch=2, name="conv1d")(convolutional((5,), 2, 3, False))
case("convolution", batch=2, name="conv1d_recurrent")(convolutional((5,), 2, 3, True))
case("convolution", batch=2, name="conv2d")(convolutional((3, 4), 2, 2, False, kernel=2))
case("convolution", batch=2, name="conv2d_recurrent")(convolutional((3, 3), 1, 2, True))
case("convolution", batch=2, name="conv1d_grouped")(convolutional((4,), 4, 4, False, groups=2))
case("convolution", batch=2, name="conv1d_depthwise_recurrent")(convolutional((4,), 4, 4, True, groups=4))

# Every presynaptic unit reaches several others and not itself.
ROWS = np.array([1, 2, 0, 3, 3, 1, 0, 2, 1])
COLUMNS = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])
ROWS_IN = np.array([0, 1, 2, 3, 0, 2, 1])
COLUMNS_IN = np.array([0, 0, 1, 1, 2, 2, 2])


def sparse(w, x, rows, columns, size):
    """A sparse matrix with values `w` times x, summed by segments."""
    return jnp.moveaxis(jax.ops.segment_sum(jnp.moveaxis(w * x[..., columns], -1, 0), rows, size), 0, -1)


@case("sparse")
def sparse_segment_sum(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + sparse(p["w"], x, ROWS_IN, COLUMNS_IN, 4)))
        return {"h": h}, h @ p["V"]

    params = weights(w=(7,), a=(4,), V=(4, 2))
    return written(body, params, {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("sparse")
def sparse_segment_sum_recurrent(batch, dtype):
    def body(p, s, x, *, cut, put):
        y = sparse(p["w"], cut(s["h"]), ROWS, COLUMNS, 4) + x @ p["U"]
        h = put("h", jnp.tanh(p["a"] * s["h"] + y))
        return {"h": h}, h @ p["V"]

    params = weights(w=(9,), U=(3, 4), a=(4,), V=(4, 2))
    return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype)
