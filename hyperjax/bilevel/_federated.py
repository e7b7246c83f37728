"""Federated averaging, with learning rates of server and clients that follow hypergradients.

Wang, Wang, Li, FedHyper, ICLR 2024 (arXiv 2310.03156); McMahan et al. 2017 (arXiv 1602.05629).

A step subtracts a rate times a direction, so its derivative in the rate is minus that direction;
the loss after it has the derivative -<gradient, direction>. Every rule of the paper adds such an
inner product to a rate, and only differs in which gradient and which direction.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Batch, Batches, Loss, Params, PyTree, Scalar, Split, Tuner
from ._common import Calls, calls, settle

_AS_IT_IS, _GRADIENT = optax.sgd(1.0), optax.identity()


class Rates(NamedTuple):
    """The learning rates of a round."""

    server: Scalar  # alpha, of the server's step; 1 in federated averaging
    client: Scalar  # beta, with which clients begin a round


class Clients(NamedTuple):
    """The data of those that take part in a round."""

    batches: Batches  # leaves [clients, local steps, ...]
    examples: jax.Array  # [clients], >= 0: how many each one has, its weight in the average


class Signal(NamedTuple):
    """What a rule for a rate may look at; all scalars."""

    product: Scalar  # <gradient, last direction>: minus the derivative of the loss in the rate
    steps: jax.Array  # int32: how many there were before this one
    square: Scalar  # |d|^2 of this step's direction d, before an optimizer has changed it
    squares: Scalar  # the mean of |d_i|^2 over the clients of which d is the average


Rule = Callable[[Scalar, Signal], Scalar]


class FederatedState(NamedTuple):
    params: Params
    hparams: Rates
    last: Params  # direction of the server's last step, in units of alpha; zero at first
    opt_state: PyTree
    rounds: jax.Array  # int32 scalar


class FederatedInfo(NamedTuple):
    calls: Calls
    server: Scalar  # alpha of this round's step; `Metrics.hparams` has the one before
    rates: jax.Array  # [clients]: beta at the end of each client's training
    diverged: jax.Array  # [clients] bool: not finite, and left out of the average


# -------------------------------------------------------------------------------------- rules


def fixed_rate(rate: Scalar, signal: Signal) -> Scalar:
    """The rule by which a rate stays: federated averaging."""
    del signal
    return rate


def hypergradient_rate(low: float | Scalar, high: float | Scalar, *, scale=1.0) -> Rule:
    """rate <- clip(rate + scale <gradient, last direction>, low, high).

    The rule of FedHyper; there scale is 1 and the bounds are 1 / gamma and gamma, with gamma 3 for
    the server and 10 for clients. For clients absolute bounds of the size of a rate are our
    advice: the sum has no scale, and without a cap rates go to where training diverges. All three
    numbers may be traced. Raises ValueError if `low` and `high` are known and not 0 <= low <= high,
    or for a `scale` that is not a number >= 0.
    """
    where = "hypergradient_rate"
    _checks.number(where, "scale", scale)
    least, most = (_checks.number(where, n, v) for n, v in (("low", low), ("high", high)))
    if least is not None and most is not None and least > most:
        raise ValueError(f"{where}: `low` must not exceed `high`; got {low!r} and {high!r}.")
    return lambda rate, signal: jnp.clip(rate + scale * signal.product, low, high)


def decaying_rate(factor: float | Scalar, *, every: int = 1) -> Rule:
    """The rate times `factor` after every `every` steps: exponential decay, or decay in steps.

    Raises ValueError unless `factor` is a number >= 0 and `every` a positive integer.
    """
    _checks.number("decaying_rate", "factor", factor)
    _checks.positive_int("decaying_rate", "every", every)
    return lambda rate, signal: jnp.where((signal.steps + 1) % every == 0, factor * rate, rate)


def extrapolated_rate(eps: float | Scalar = 1e-3) -> Rule:
    """max(1, mean_i |d_i|^2 / (2 (|d|^2 + eps))), for the server.

    FedExP (Jhunjhunwala, Wang, Joshi, ICLR 2023, arXiv 2301.09604): the more clients disagree, the
    longer the step along their average.

    Raises ValueError unless `eps` is a number >= 0.
    """
    _checks.number("extrapolated_rate", "eps", eps)
    return lambda rate, signal: jnp.maximum(1, signal.squares / (2 * (signal.square + eps)))


# --------------------------------------------------------------------------------------- init


def federated(
    loss: Loss,
    score: Loss,
    *,
    server: Rule = fixed_rate,
    client: Rule = fixed_rate,
    local: Rule = fixed_rate,
    optimizer: optax.GradientTransformation = _AS_IT_IS,
    direction: optax.GradientTransformation = _GRADIENT,
) -> Tuner:
    """A tuner whose step is one round: clients train, the server averages and steps.

    With w the server's parameters, d_i = w - w_i what client i made of them in K local steps and
    d the average of d_i weighted by numbers of examples,

        client, k = 1..K:   beta <- local(beta, <g_k, u_(k-1)> + <g_k, d_last> / K)
                            w_i <- w_i - beta u_k
        server:             alpha <- server(alpha, <d, d_last>),    w <- w - alpha d
        next round:         beta <- client(beta, <d, d_last>)

    where `rule(rate, product)` stands for a `Rule`, g_k is the client's gradient and u_k the
    direction made of it. In the terms of FedHyper (Eqs. 16, 18 and 20):

        FedAvg   nothing but defaults
        G        server=hypergradient_rate(1 / 3, 3)
        SL       client=hypergradient_rate(low, high)
        CL       local=hypergradient_rate(low, high)

    and any of them together. The second product of CL has the sign of minus a derivative too: had
    the last round's clients used another beta at the same gradients, d_last would have grown in
    proportion to it. Its exact factor would be alpha / beta; 1 / K is the paper's.

    Rates of the server are remembered from round to round, as the paper has it; the authors' code
    makes the list of client rates anew each round, so that its SL does nothing.

    `init(params, Rates(alpha, beta))`. `split.train` is a `Clients`: clients keep nothing but
    their data from one round to the next, so that the data of a round says who takes part.
    `split.valid` is for the score, which only reports. Both losses get `Rates` as hparams.

    Args:
      server, client, local: rules for alpha, for beta between rounds, for beta within a round.
        Every client begins a round with the server's beta.
      optimizer: of the server, on d as the gradient; alpha scales its update. By default the
        update is -d. `optax.adam(0.01, eps=1e-3)` is FedAdam, `optax.adagrad` FedAdagrad (Reddi
        et al. 2021, arXiv 2003.00295); d_last above is then the direction it took.
      direction: of the clients, begun anew each round: `optax.trace(0.5)` is momentum.

    A client whose parameters or rate are not finite is left out of the average and reported in
    `FederatedInfo.diverged`; a round without any other moves nothing, and `Metrics.finite` is
    False. `Metrics.grad_norm` is |<d, d_last>|. Under jit, with the axis of clients sharded over
    devices, each device trains its own clients.

    Raises TypeError unless hparams are `Rates` and `split.train` is `Clients`, and ValueError if
    leaves of the latter disagree about the number of clients or of steps, or if `examples` are
    known and one of them is negative or NaN.
    """
    score = _checks.scalar_loss("federated", "score", score)
    gradient = jax.grad(_checks.scalar_loss("federated", "loss", loss))
    for name, rule in (("server", server), ("client", client), ("local", local)):
        _checks.is_callable("federated", name, rule)
    for name, part in (("optimizer", optimizer), ("direction", direction)):
        _checks.has_functions("federated", name, part, ("init", "update"))

    def init(params: Params, hparams: Rates) -> FederatedState:
        _is_a("hparams", hparams, Rates)
        _checks.differentiable("federated", "params", params)
        hparams = jax.tree.map(jnp.asarray, hparams)
        _checks.differentiable("federated", "hparams", hparams)
        zeros = _tree.zeros_like(params)
        rounds = jnp.zeros((), jnp.int32)
        state = FederatedState(params, hparams, zeros, optimizer.init(params), rounds)
        return _tree.strong(state)

    def step(state: FederatedState, split: Split):
        clients, steps = _sizes(split.train)
        train = lambda batches: _train(gradient, direction, local, state, batches)
        ends, rates = jax.vmap(train)(split.train.batches)
        moves = jax.tree.map(lambda w, end: w[None] - end, state.params, ends)
        moves, weights, sound = _sound(moves, rates, split.train.examples)
        average = jax.tree.map(lambda x: jnp.sum(_rows(weights, x) * x, 0), moves)
        counted = weights > 0  # a client without examples has no say here either
        squares = jnp.where(counted, jax.vmap(_tree.dot)(moves, moves), 0).sum() / counted.sum()
        moved, product = _serve(optimizer, server, client, state, average, squares)
        info = FederatedInfo(
            calls(values=1, gradients=clients * steps), moved.hparams.server, rates, ~sound
        )
        value = score(state.params, state.hparams, split.valid)
        return settle(value, product, moved, state, info)

    return Tuner(init, step)


# --------------------------------------------------------------------------------------- step


def _train(gradient, direction, rule: Rule, state: FederatedState, batches: Batches):
    """One client's training from the server's parameters: where it ends, and at which rate."""
    steps = jax.tree.leaves(batches)[0].shape[0]

    def step(carry, batch: Batch):
        params, inner, last, rate, count = carry
        g = gradient(params, state.hparams, batch)
        square = _tree.dot(g, g)
        product = _tree.dot(g, last) + _tree.dot(g, state.last) / steps
        rate = rule(rate, Signal(product, count, square, square)).astype(rate.dtype)
        u, inner = direction.update(g, inner, params)
        carry = _tree.axpy(-rate, u, params), inner, u, rate, count + 1
        return _tree.cast_like(carry, started), None

    zeros = _tree.zeros_like(state.params)
    started = state.params, direction.init(state.params), zeros, state.hparams.client
    started = _tree.strong((*started, jnp.zeros((), jnp.int32)))
    started = _tree.vary_like(started, (state, batches))
    (params, _, _, rate, _), _ = lax.scan(step, started, batches)
    return params, rate


def _sound(moves: Params, rates: jax.Array, examples: jax.Array):
    """Moves with zeros for those that are not finite, weights of sum 1, and who was finite."""
    sound = jax.vmap(_tree.all_finite)((moves, rates))
    # Zeros, because a weight of zero does not undo a NaN.
    moves = _tree.where(sound, moves, _tree.zeros_like(moves))
    weights = jnp.where(sound, jnp.asarray(examples).astype(rates.dtype), 0)
    return moves, weights / weights.sum(), sound  # NaN if nobody is left: `settle` sees it


def _serve(optimizer, server: Rule, client: Rule, state: FederatedState, average, squares):
    """The server's step along the average, and the product that its rules go by."""
    updates, opt_state = optimizer.update(average, state.opt_state, state.params)
    taken = _tree.cast_like(_tree.scale(-1, updates), state.last)
    product = _tree.dot(average, state.last)
    signal = Signal(product, state.rounds, _tree.dot(average, average), squares)
    rates = Rates(server(state.hparams.server, signal), client(state.hparams.client, signal))
    rates = _tree.cast_like(rates, state.hparams)
    params = _tree.axpy(-rates.server, taken, state.params)
    opt_state = _tree.cast_like(opt_state, state.opt_state)
    return FederatedState(params, rates, taken, opt_state, state.rounds + 1), product


def _rows(weights: jax.Array, x: jax.Array) -> jax.Array:
    return weights.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _is_a(name: str, value, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"federated: `{name}` must be a `bilevel.{kind.__name__}`; got {type(value).__name__}."
        )


def _sizes(train) -> tuple[int, int]:
    """The numbers of clients and of local steps."""
    _is_a("split.train", train, Clients)
    named = jax.tree_util.tree_leaves_with_path(train.batches)
    sizes = {jnp.shape(x)[:2] for _, x in named}
    faults = len(sizes) != 1 or any(len(size) < 2 or 0 in size for size in sizes)
    if faults or jnp.shape(train.examples) != next(iter(sizes))[:1]:
        listing = ", ".join(f"{_checks.path(k)}: {_checks.describe(x)}" for k, x in named)
        raise ValueError(
            "federated: leaves of `split.train.batches` must be [clients, local steps, ...], at "
            "least one of each, and `split.train.examples` [clients]; got "
            f"{listing or 'no leaves'} and {_checks.describe(train.examples)}."
        )
    known = _checks.entries(train.examples)
    if known is not None and not np.all(known >= 0):  # a NaN fails too
        raise ValueError(
            f"federated: `split.train.examples` must be >= 0; got {known.tolist()}. A client that "
            "is to have no say has 0 examples."
        )
    ((clients, steps),) = sizes
    return clients, steps
