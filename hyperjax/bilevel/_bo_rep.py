"""BO-REP: hparams move a set distance per step, params only now and then."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Batches, HParams, Loss, Params, Scalar, Tuner
from ._adjoint_rules import together
from ._rates import Rate, check_rate, sgd
from ._single_loop import single_loop, within

WHERE = "bo_rep"


def bo_rep(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    distance: Rate,
    inner_steps: int = 3,
    every: int = 2,
    radius: float | Scalar | None = None,
    momentum: float | Scalar = 0.9,
    project: Callable[[HParams], HParams] = lambda hparams: hparams,
) -> Tuner:
    """Normalized momentum for hparams: a setting of `single_loop`, where the errors are described.

    m <- momentum m + (1 - momentum) (f_h - J'v), hparams <- hparams - distance m / |m|, 2-norm; so
    that a score whose curvature grows with its gradient, as that of recurrent networks may, cannot
    throw them far. The solution in params then moves little per step, and params follow it only at
    every `every`-th: `inner_steps` steps within `radius` of where they are (None: anywhere). The
    adjoint vector takes one step each time. Begin with params from `refine`.

    `split.train` is [inner_steps + 1, ...], the last for H v and J'v, or [1, ...]; the first are
    not looked at in the steps between. Where m is exactly zero, as at first where the score does
    not depend on hparams, hparams stay.

    Args:
      params_rate, adjoint_rate: step sizes; functions count inner steps and steps.
      distance: eta, in the units of hparams, 2-norm over all leaves.
      momentum: beta, within [0, 1).

    Hao, Gong and Liu 2024 (arXiv 2401.09587). They draw the batches of H v and J'v apart.

    Raises ValueError for a momentum outside [0, 1) or `inner_steps` that are not a positive
    integer.
    """
    check_rate(WHERE, "distance", distance)
    known = _checks.number(WHERE, "momentum", momentum)
    if known is not None and known >= 1:
        raise ValueError(f"{WHERE}: `momentum` must be within [0, 1); got {momentum!r}.")
    return single_loop(
        loss,
        score,
        params_optimizer=sgd(WHERE, "params_rate", params_rate),
        hparams_optimizer=optax.chain(
            optax.ema(momentum, debias=False),  # pyright: ignore[reportArgumentType]
            optax.stateless(lambda updates, params: _unit(updates)),
            optax.sgd(distance),
        ),
        adjoint=together(adjoint_rate),
        inner_steps=_checks.positive_int(WHERE, "inner_steps", inner_steps),
        every=every,
        radius=radius,
        project=project,
    )


def refine(
    loss: Loss,
    params: Params,
    hparams: HParams,
    batches: Batches,
    *,
    rate: float | Scalar,
    radius: float | Scalar,
    epochs: int,
) -> Params:
    """Params near the minimizer of the loss for these hparams: where `bo_rep` begins.

    Epochs of equal length, of SGD at `rate` within a ball around the epoch's start, whose radius
    is `radius` at first, at least the distance to the minimizer, and halves from one to the next.
    An epoch ends at the mean of its iterates. `batches` are [steps, ...], dealt out in their order;
    `epochs` has to divide steps. Nothing here can leave a distance of 2 `radius`: a radius that is
    too small shows in the gradient that is left.

    Raises ValueError at trace time for numbers out of range.

    Hao, Gong and Liu 2024 (arXiv 2401.09587), initialization refinement, after Hazan and Kale 2014
    (JMLR 15, 2489-2512), from whom the mean is taken.
    """
    loss = _checks.scalar_loss("refine", "loss", loss)
    _checks.differentiable("refine", "params", params)
    _checks.number("refine", "rate", rate)
    _checks.number("refine", "radius", radius, positive=True)
    _checks.positive_int("refine", "epochs", epochs)
    steps = _checks.count_steps("refine", batches)
    if steps % epochs:
        raise ValueError(
            f"refine: `epochs` must divide the number of batches; got {epochs} for {steps}."
        )
    length = steps // epochs

    def epoch(start: Params, x):
        batches, size = x

        def one(carry, batch):
            point, mean = carry
            grad = jax.grad(loss)(point, hparams, batch)
            point = within(size, start, _tree.axpy(-rate, grad, point))
            return (point, _tree.axpy(1 / length, point, mean)), None

        carry = start, _tree.vary_like(_tree.zeros_like(start), start)
        return lax.scan(one, carry, batches)[0][1], None

    start = _tree.vary_like(_tree.strong(params), (params, hparams))
    cut = jax.tree.map(lambda x: jnp.reshape(x, (epochs, length, *x.shape[1:])), batches)
    return lax.scan(epoch, start, (cut, radius * 0.5 ** jnp.arange(epochs)))[0]


def _unit(direction: HParams) -> HParams:
    size = _tree.norm(direction)
    return _tree.scale(1 / jnp.where(size > 0, size, 1), direction)
