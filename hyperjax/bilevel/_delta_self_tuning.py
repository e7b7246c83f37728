"""Delta-STN: self-tuning networks, centred and linearized (Bae and Grosse 2020, 2010.13514)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _tree
from .._types import Batch, HParams, Loss, Params, PyTree, Scalar, Tuner
from ..hypernet import BestResponse, Hypernet
from ._gaussian import Draw, Gaussian
from ._self_tuning import Outer, SelfTuningState, advance, check, descend, first, over_groups


class DeltaOptimizers(NamedTuple):
    """States of the two optimizers of `delta_self_tuning`."""

    base: PyTree  # state of `optimizer`
    response: PyTree  # of `response_optimizer`


def delta_self_tuning(
    predict: Callable[[Params, HParams, Batch], PyTree],
    objective: Callable[[PyTree, HParams, Batch], Scalar],
    score: Loss,
    net: Hypernet,
    optimizer: optax.GradientTransformation,
    *,
    outer: optax.GradientTransformation,
    response_optimizer: optax.GradientTransformation | None = None,
    spread: optax.GradientTransformation | None = None,
    entropy: float | Scalar = 1e-3,
    warm_up: int = 0,
) -> Tuner:
    """`self_tuning` whose base weights are trained at the current hyperparameters, unperturbed.

    The training loss is objective(predict(params, hparams, batch), hparams, batch). With m the
    means, and a draw z = m + d, it differs from `self_tuning` in four ways:

    1. The hypernetwork sees d, so that its base *is* the weights at m, and its response carries
       the derivative there.
    2. Every training batch takes two gradients: the base follows the loss at d = 0 and m, with
       dropout and augmentation of m; the response follows the loss at z.
    3. In the latter, predictions are linearized in d around the base (one `jax.jvp`), so that the
       response learns a derivative and nothing else. What `predict` takes from `hparams`, such as
       masks, is that of z.
    4. The score is that of the full prediction at d.

    Args:
      predict: any tree of floating-point arrays, of (params, raw hyperparameters, batch).
        Penalties on weights belong to `objective`: let `predict` return the weights as well.
      objective: a real scalar.
      net: linear in hyperparameters (`structured` with rules other than a gate with activation).
        `hypernet.gate(scale=0.0)` begins, as the authors do, without any answer.
      response_optimizer: for the response; None: `optimizer`.

    The other arguments, `init`, `step` and metrics are those of `self_tuning`; the model's params
    are `state.params.base`. The authors use SGD at 1e-2 with momentum 0.9 for both parts, RMSprop
    at 1e-2 for means and scales, and five training batches a step. Equations from their released
    code, since the paper was out of reach.

    Raises what `self_tuning` raises, ValueError for a hypernetwork that is not linear, TypeError
    for predictions that are not floating point.
    """
    where = "delta_self_tuning"
    answer = optimizer if response_optimizer is None else response_optimizer
    check(where, net, optimizer, outer, spread, entropy, warm_up)
    _checks.has_functions(where, "response_optimizer", answer, ("init", "update"))
    _checks.is_callable(where, "predict", predict)
    score = _checks.scalar_loss(where, "score", score)
    if not net.linear:
        raise ValueError(
            f"{where}: `net` must be linear in hyperparameters, with params in `phi.base`; take "
            "`hypernet.structured` with rules without an activation."
        )
    objective = _checks.scalar_loss(where, "objective", objective)

    def at_mean(base: Params, distribution: Gaussian, draw: Draw) -> Scalar:
        mean = distribution.mean
        one = lambda batch: objective(predict(base, mean, batch), mean, batch)
        return jnp.mean(jax.vmap(one)(draw.data))

    def linearized(response: PyTree, base: Params, distribution: Gaussian, draw: Draw) -> Scalar:
        phi, mean = BestResponse(base, response), distribution.mean

        def near(z, batch):
            out = lambda d: predict(net.apply(phi, d), z, batch)
            d = _tree.sub(z, mean)
            there, change = jax.jvp(out, (_tree.zeros_like(d),), (d,))
            _checks.differentiable(where, "predict's result", there)
            return objective(jax.tree.map(jnp.add, there, change), z, batch)

        return over_groups(where, near, distribution, draw)

    def fit(state: SelfTuningState, draws: Draw) -> tuple[BestResponse, PyTree, Scalar]:
        distribution = lax.stop_gradient(state.hparams)

        def one(carry, draw):
            phi, states = carry
            base, response = phi
            plain = lambda base: at_mean(base, distribution, draw)
            turned = lambda response: linearized(response, phi.base, distribution, draw)
            base, base_state, value = descend(optimizer, plain, base, states.base)
            response, response_state, _ = descend(answer, turned, response, states.response)
            carry = BestResponse(base, response), DeltaOptimizers(base_state, response_state)
            return carry, value

        (phi, states), values = lax.scan(one, (state.params, state.params_state), draws)
        return phi, states, jnp.mean(values)

    def init(params: BestResponse, hparams: Gaussian) -> SelfTuningState:
        if not isinstance(params, BestResponse):
            raise TypeError(
                f"{where}: `params` must be a BestResponse, from `net.init`; got "
                f"{type(params).__name__}."
            )
        states = DeltaOptimizers(optimizer.init(params.base), answer.init(params.response))
        return first(where, params, hparams, states, outer, spread)

    def at(z, mean, phi, batch):
        return score(net.apply(phi, _tree.sub(z, lax.stop_gradient(mean))), z, batch)

    moving = Outer(at, outer, spread, entropy, warm_up)
    return Tuner(init, lambda state, split: advance(where, moving, fit, 2, state, split))
