"""What an agent's outputs mean: actor-critic with actions of a kind or real ones, and Q-learning.

A method makes actions of outputs, says what an observation is worth, and gives the one number whose online gradient goes into the
eligibility trace. All are functions of one agent and one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import InputError, OptionError

__all__ = ["METHODS", "ActorCritic", "Choice", "GaussianActorCritic", "Method", "QLearning", "method_of"]

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """What an agent did: its action, what it held the moment to be worth, and what becomes of the trace before.

    Attributes
    ----------
    action : array
    value : array, shape ()
        V(o_t), or Q(o_t, a_t).
    keeps : bool array, shape ()
        Whether the trace of the steps before is kept.
    """

    action: Array
    value: Array
    keeps: Array


class Method(Protocol):
    """A method of temporal-difference learning, of one agent at one step."""

    def choose(self, key: Array, out: Any, count: Array) -> Choice:
        """An action drawn with a random key, at step number ``count``."""
        ...

    def worth(self, out: Any) -> Array:
        """What the outputs say that an observation is worth: the bootstrap of the step before."""
        ...

    def objective(self, out: Any, action: Array, sign: Array) -> Array:
        """The number whose gradient goes into the trace; ``sign`` is that of the error."""
        ...


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """Outputs ``(logits, value)``: objective ``critic V + log pi(a) + entropy sgn(delta) H(pi)``."""

    entropy: float = 0.0
    critic: float = 1.0

    def choose(self, key: Array, out: Any, count: Array) -> Choice:
        logits, value = self._heads(out)
        return Choice(jax.random.categorical(key, logits).astype(jnp.int32), value, jnp.array(True))

    def worth(self, out: Any) -> Array:
        return self._heads(out)[1]

    def objective(self, out: Any, action: Array, sign: Array) -> Array:
        logits, value = self._heads(out)
        logs = jax.nn.log_softmax(logits)
        spread = -jnp.sum(jnp.exp(logs) * logs)
        return self.critic * value + logs[action] + self.entropy * sign * spread

    def _heads(self, out: Any) -> tuple[Array, Array]:
        logits, value = _pair(out, "(logits, value)")
        return _vector(logits, "the logits of the actions"), _number(value)


@dataclasses.dataclass(frozen=True)
class GaussianActorCritic:
    """Outputs ``((mean, spread), value)`` with a normal policy of standard deviation ``softplus(spread)``."""

    entropy: float = 0.0
    critic: float = 1.0

    def choose(self, key: Array, out: Any, count: Array) -> Choice:
        mean, deviation, value = self._heads(out)
        drawn = mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)
        return Choice(drawn, value, jnp.array(True))

    def worth(self, out: Any) -> Array:
        return self._heads(out)[2]

    def objective(self, out: Any, action: Array, sign: Array) -> Array:
        mean, deviation, value = self._heads(out)
        log = -0.5 * ((action - mean) / deviation) ** 2 - jnp.log(deviation) - 0.5 * jnp.log(2 * jnp.pi)
        spread = 0.5 + 0.5 * jnp.log(2 * jnp.pi) + jnp.log(deviation)
        return self.critic * value + jnp.sum(log) + self.entropy * sign * jnp.sum(spread)

    def _heads(self, out: Any) -> tuple[Array, Array, Array]:
        policy, value = _pair(out, "((mean, spread), value)")
        mean, spread = _pair(policy, "((mean, spread), value)")
        mean = _vector(mean, "the mean of the action")
        return mean, jnp.broadcast_to(jax.nn.softplus(spread), mean.shape), _number(value)


@dataclasses.dataclass(frozen=True)
class QLearning:
    """Outputs: a value for each action; actions greedy but for a share ``epsilon``; Watkins's Q(lambda)."""

    epsilon: float | Callable[[Array], Array] = 0.1

    def choose(self, key: Array, out: Any, count: Array) -> Choice:
        values = self._values(out)
        share = self.epsilon(count) if callable(self.epsilon) else self.epsilon
        by_chance, which = jax.random.split(key)
        greedy = jnp.argmax(values)
        drawn = jax.random.randint(which, (), 0, values.shape[0])
        action = jnp.where(jax.random.uniform(by_chance) < share, drawn, greedy)
        # A trace tells of what the greedy policy did: one that was left credits no earlier step.
        return Choice(action.astype(jnp.int32), values[action], values[action] == values[greedy])

    def worth(self, out: Any) -> Array:
        return jnp.max(self._values(out))

    def objective(self, out: Any, action: Array, sign: Array) -> Array:
        return self._values(out)[action]

    def _values(self, out: Any) -> Array:
        return _vector(out, "the values of the actions")


#: By the name that ``learn_td(method=...)`` takes.
METHODS: dict[str, type[Any]] = {
    "actor_critic": ActorCritic,
    "gaussian_actor_critic": GaussianActorCritic,
    "q": QLearning,
}


def method_of(name: Any, options: dict[str, Any]) -> Method:
    """The method of a name, with its options; any object with the three functions is one."""
    made: Any = name
    own = all(callable(getattr(name, part, None)) for part in ("choose", "worth", "objective"))
    if not own and not (isinstance(name, str) and name in METHODS):
        raise OptionError(
            "there is no such method of temporal-difference learning.",
            got=f"method={name!r}",
            expected=f"one of {', '.join(map(repr, METHODS))}, or an object with choose, worth and objective",
        )
    known = () if own else tuple(f.name for f in dataclasses.fields(METHODS[name]))
    for option, value in options.items():
        if option not in known:
            raise OptionError(
                f"method {name!r} has no option {option!r}.",
                got=f"{option}={value!r}",
                expected=f"one of {', '.join(known)}" if known else "no options",
            )
        if not (option == "epsilon" and callable(value)):
            _check_number(option, value)
    return made if own else METHODS[made](**options)


def _check_number(name: str, value: Any) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not (0 <= number < np.inf and (name != "epsilon" or number <= 1)):
        raise OptionError(
            f"{name} is out of range.",
            got=f"{name}={value!r}",
            expected="a number in [0, 1], or a function of the number of steps"
            if name == "epsilon"
            else "a number that is not negative",
        )


def _pair(out: Any, expected: str) -> tuple[Any, Any]:
    if not (isinstance(out, (tuple, list)) and len(out) == 2):
        raise InputError(
            "the model's outputs are not those of an actor and a critic.",
            got=f"{type(out).__name__}, shapes {jax.tree.map(jnp.shape, out)} of one agent",
            expected=expected,
            hint="return both from the model's update(); method='q' learns from the values of actions alone.",
        )
    return out[0], out[1]


def _vector(value: Any, what: str) -> Array:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None or len(shape) != 1 or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"{what} must be a vector of real numbers for each agent.",
            got=type(value).__name__ if shape is None else f"{dtype} of shape {shape}",
            expected="shape (actions,) behind the batch axis",
            hint="a batch axis is known as one where states, inputs and outputs share it, and examples do not mix.",
        )
    return value


def _number(value: Any) -> Array:
    shape = getattr(value, "shape", None)
    if shape not in ((), (1,)):
        raise InputError(
            "the value must be one number for each agent.",
            got=type(value).__name__ if shape is None else f"shape {shape}",
            expected="shape () or (1,) behind the batch axis",
        )
    return jnp.reshape(value, ())
