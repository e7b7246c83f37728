"""Recurrent cells whose weights are arrays or `Gated`, and their scans over time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from ._layers import dense
from ._rules import Gated, Weight


class RecurrentWeights(NamedTuple):
    """The weights of a recurrent cell; k is 4 for `lstm`, 3 for `gru`. The body is `recurrent`."""

    input: Weight  # [in, k hidden]
    state: Weight  # [hidden, k hidden]
    bias: Weight | None = None  # [k hidden]


class LSTMState(NamedTuple):
    """What an LSTM carries along the sequence."""

    hidden: jax.Array  # [..., hidden]
    cell: jax.Array  # [..., hidden]


def lstm_cell(
    state: LSTMState, x: jax.Array, weights: RecurrentWeights
) -> tuple[LSTMState, jax.Array]:
    """One step of a long short-term memory: x [..., in] -> (state, hidden [..., hidden]).

    With the last axis of the weights in the order input, forget, candidate, output,

        i, f, o = sigmoid(.),  g = tanh(.)  of  x W + h U + b,
        c <- f c + i g,  h <- o tanh(c).

    A positive forget bias belongs into `weights.bias`. Raises ValueError for shapes or dtypes that
    do not fit.
    """
    width = _check("lstm_cell", weights, 4)
    inputs = dense(x, weights.input, weights.bias)
    return _lstm(_fitting("lstm_cell", state, _zeros(inputs, width)), inputs, weights.state)


def lstm(
    x: jax.Array, weights: RecurrentWeights, state: LSTMState | None = None
) -> tuple[LSTMState, jax.Array]:
    """`lstm_cell` over time: [..., time, in] -> (last state, hidden [..., time, hidden]).

    The products with the inputs are taken for all times at once, before the scan. `state` is where
    to start, zeros by default. Raises ValueError for shapes or dtypes that do not fit.
    """
    width = _check("lstm", weights, 4)
    return _scan("lstm", _lstm, _zeros, x, weights, state, width)


def gru_cell(
    state: jax.Array, x: jax.Array, weights: RecurrentWeights
) -> tuple[jax.Array, jax.Array]:
    """One step of a gated recurrent unit: x [..., in] -> (state, state [..., hidden]).

    The unit of Cho et al. 2014 (arXiv 1406.1078) with the reset gate behind the matrix. With the
    last axis of the weights in the order reset, update, candidate,

        r, u = sigmoid(x W_ru + h U_ru + b_ru),  c = tanh(x W_c + b_c + r (h U_c)),
        h <- u h + (1 - u) c.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    width = _check("gru_cell", weights, 3)
    inputs = dense(x, weights.input, weights.bias)
    like = _zeros(inputs, width).hidden
    return _gru(_fitting("gru_cell", state, like), inputs, weights.state)


def gru(
    x: jax.Array, weights: RecurrentWeights, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`gru_cell` over time: [..., time, in] -> (last state, states [..., time, hidden]).

    The products with the inputs are taken for all times at once, before the scan. `state` is where
    to start, zeros by default. Raises ValueError for shapes or dtypes that do not fit.
    """
    width = _check("gru", weights, 3)
    zeros = lambda inputs, width: _zeros(inputs, width).hidden
    return _scan("gru", _gru, zeros, x, weights, state, width)


def _lstm(state: LSTMState, inputs: jax.Array, weight: Weight) -> tuple[LSTMState, jax.Array]:
    parts = jnp.split(inputs + dense(state.hidden, weight), 4, axis=-1)
    entry, forget, output = (jax.nn.sigmoid(parts[k]) for k in (0, 1, 3))
    cell = forget * state.cell + entry * jnp.tanh(parts[2])
    hidden = output * jnp.tanh(cell)
    return LSTMState(hidden, cell), hidden


def _gru(state: jax.Array, inputs: jax.Array, weight: Weight) -> tuple[jax.Array, jax.Array]:
    x, h = jnp.split(inputs, 3, axis=-1), jnp.split(dense(state, weight), 3, axis=-1)
    reset, update = jax.nn.sigmoid(x[0] + h[0]), jax.nn.sigmoid(x[1] + h[1])
    candidate = jnp.tanh(x[2] + reset * h[2])
    state = update * state + (1 - update) * candidate
    return state, state


def _scan(
    where: str,
    step: Callable,
    zeros: Callable,
    x: jax.Array,
    weights: RecurrentWeights,
    state: Any,
    width: int,
) -> tuple[Any, jax.Array]:
    if jnp.ndim(x) < 2:
        raise ValueError(
            f"{where}: `x` is {_checks.describe(x)}, expected [..., time, in]; for one time there "
            f"is `{where}_cell`."
        )
    inputs = dense(x, weights.input, weights.bias)
    start = zeros(inputs[..., 0, :], width)
    if state is not None:
        start = _fitting(where, state, start)
    start = _tree.vary_like(start, (inputs, weights.state, start))
    move = lambda state, now: step(state, now, weights.state)
    state, hidden = lax.scan(move, start, jnp.moveaxis(inputs, -2, 0))
    return state, jnp.moveaxis(hidden, 0, -2)


def _zeros(inputs: jax.Array, width: int) -> LSTMState:
    """A state for the inputs of one time, [..., k width]."""
    zeros = lambda: jnp.zeros((*inputs.shape[:-1], width), inputs.dtype)
    return LSTMState(zeros(), zeros())


def _fitting(where: str, state: Any, like: Any) -> Any:
    """`state`, which is not to be broadcast."""
    _checks.same_tree(where, "state", state, "one that fits `x` and `weights`", like)
    return state


def _check(where: str, weights: RecurrentWeights, parts: int) -> int:
    """The width of the state."""
    state, entry = weights.state, weights.input
    shape = jnp.shape(state.base if isinstance(state, Gated) else state)
    inputs = jnp.shape(entry.base if isinstance(entry, Gated) else entry)
    if len(shape) != 2 or shape[1] != parts * shape[0] or inputs[1:] != shape[1:]:
        raise ValueError(
            f"{where}: `weights.input` and `weights.state` have shapes {inputs} and {shape}, "
            f"expected (in, {parts} hidden) and (hidden, {parts} hidden)."
        )
    return shape[0]
