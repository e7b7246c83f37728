"""The loss met while training, as a score."""

from jax import lax

from . import _checks, _tree
from ._inner import Inner
from ._types import Carry, Estimate, Estimator, HParams, Loss, Params, Split


def training_loss(training: Inner, loss: Loss) -> Estimator:
    """The mean of `loss(params, hparams, batch)` over the inner steps, each taken before its step.

    For members that learn by exchange alone: the gradient is zero. `split.valid` is not looked at.
    Given the loss that `training` descends, compiled code computes it once, as a by-product of the
    gradient. Each member has its own loss, also where gradients are averaged over members.

    Raises TypeError at trace time if the loss is not a real scalar.
    """
    _checks.has_functions("training_loss", "training", training, ("init", "step"))
    loss = _checks.scalar_loss("training_loss", "loss", loss)

    def init(params: Params, hparams: HParams) -> Carry:
        return _tree.strong(training.init(params, hparams))

    def estimate(hparams: HParams, carry: Carry, split: Split) -> tuple[Estimate, Carry]:
        _checks.count_steps("training_loss", split.train)

        def step(state, batch):
            return training.step(state, hparams, batch), loss(state.params, hparams, batch)

        carry, losses = lax.scan(step, carry, split.train)
        return Estimate(losses.mean(), _tree.zeros_like(hparams), ()), carry

    return Estimator(init, estimate)
