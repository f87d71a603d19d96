"""
Writing a rule
==============

A learning rule is a function that writes equations, in the words of its paper. This one is e-prop's trace with
a learning signal of which only the sign counts.
"""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

import etcompile
from etcompile import extend

# %%
# The equations:
#
# .. math::
#
#    e_t = D_t\, e_{t-1} + f_t \otimes x_t \qquad \bar e_t = \kappa\, \bar e_{t-1} + e_t
#    \qquad g_t = \operatorname{sign}(L_t)\, \bar e_t
#
# No op for ``sign`` ships. A new op is a row of the table of ops: what it takes and gives, and how it is evaluated.

if "sign_of" not in extend.OPS:
    extend.register_op(
        "sign_of",
        "T -> T",
        "sign_of(a)",
        "the sign of every number",
        evaluate=lambda context, equation, args: jax.tree.map(jnp.sign, args[0]),
        by_row=True,
    )


@etcompile.algorithm(
    "sign_e_prop",
    preserves="changes",
    leaves_out="only the sign of the learning signal counts",
)
def sign_e_prop(p, kappa=0.8):
    """E-prop with the sign of the learning signal."""
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        filtered = p.recur(decay=kappa, inject=e)
        p.gradient(r, p.contract(p.op("sign_of", p.signal(r.group)), filtered))


# %%
# It is compiled like any other rule; its options are arguments of ``compile``, and its program can be read.


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(2, 4)
        self.readout = brainstate.nn.Linear(4, 1)

    def update(self, x):
        return self.readout(self.cell(x))


step = etcompile.compile(Net(), jnp.ones((3, 2)), algo="sign_e_prop", batch_size=3, kappa=0.7)
print(step.program)

# %%
# Its oracle
# ----------
#
# A rule is tested against its equations in plain numpy, on a model that can be differentiated by hand.
# Here h' = 0.9 h + x w, so D = 0.9, f = 1, and L is the derivative of the loss by h.

rng = np.random.default_rng(0)
w, xs, ys = rng.normal(size=(2, 3)), rng.normal(size=(7, 4, 2)), rng.normal(size=(7, 4, 3))


def leaky(params, h, x):
    h = 0.9 * h + x @ params["w"]
    return h, h


model = etcompile.from_function(leaky, {"w": jnp.asarray(w, "float32")}, jnp.zeros((4, 3), "float32"))
step = etcompile.compile(model, jnp.asarray(xs[0], "float32"), algo="sign_e_prop", kappa=0.7)
run = step.value_and_grad(lambda out, y: jnp.sum((out - y) ** 2))

h, e, filtered = np.zeros((4, 3)), np.zeros((4, 2, 3)), np.zeros((4, 2, 3))
for x, y in zip(xs, ys):
    h = 0.9 * h + x @ w
    e = 0.9 * e + x[:, :, None]
    filtered = 0.7 * filtered + e
    wanted = (np.sign(2 * (h - y))[:, None, :] * filtered).sum(0)
    _, grads = run(jnp.asarray(x, "float32"), jnp.asarray(y, "float32"))
    np.testing.assert_allclose(grads["w"], wanted, rtol=1e-4)
print("equal to numpy at each of", len(xs), "steps")
