"""Best-response hypernetworks: the response as a function that was learnt."""

from collections.abc import Callable

from jax import lax

from . import _checks
from ._types import Batches, Carry, HParams, Params, PyTree, Response


def best_response(apply: Callable[[PyTree, HParams], Params], train: Response) -> Response:
    """A response that maps hparams through a hypernetwork, trained on the way.

    `train(hparams, carry, batches) -> (phi, carry)` fits the hypernetwork in a neighbourhood of
    hparams; params = apply(phi, hparams). The derivative is that of `apply` alone, with phi held
    fixed: training is not differentiated, so that the training loss may depend on hparams in ways
    that have no derivative.

    Reference: MacKay et al. 2019 (arXiv 1903.03088); their layers are one choice of `apply`.
    """
    _checks.is_callable("best_response", "apply", apply)
    _checks.is_callable("best_response", "train", train)

    def respond(hparams: HParams, carry: Carry, batches: Batches) -> tuple[Params, Carry]:
        phi, carry = lax.stop_gradient(train(*lax.stop_gradient((hparams, carry, batches))))
        return apply(phi, hparams), carry

    return respond
