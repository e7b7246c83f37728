"""The stochastic algorithms by their papers' names: settings of `single_loop`."""

from collections.abc import Callable

import optax

from .. import _checks
from .._types import HParams, Key, Loss, Scalar, Tuner
from ._adjoint_rules import descent, neumann_series, together
from ._rates import Rate, sgd
from ._single_loop import single_loop
from ._variance_reduction import saga, storm

Project = Callable[[HParams], HParams]


def _same(hparams: HParams) -> HParams:
    return hparams


def soba(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    hparams_rate: Rate,
    project: Project = _same,
) -> Tuner:
    """One gradient step of params, adjoint vector and hparams at the same time.

    `split.train` is one batch, [1, ...]; the state, the report and the errors are those of
    `single_loop`. Rates are numbers, traced or not, or functions of the step number; with constant
    ones it stalls at a floor that the noise sets, with ones like k^-1/2 it goes on.

    Dagreou et al. 2022 (arXiv 2201.13409), whose v has the other sign.
    """
    return single_loop(
        loss,
        score,
        params_optimizer=sgd("soba", "params_rate", params_rate),
        hparams_optimizer=sgd("soba", "hparams_rate", hparams_rate),
        adjoint=together(adjoint_rate),
        project=project,
    )


def saba(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    hparams_rate: Rate,
    train_blocks: int,
    valid_blocks: int,
    project: Project = _same,
) -> Tuner:
    """`soba` with a SAGA memory for each of its five stochastic terms; see `saga` for its size.

    `split.train` is a `Block(number [1], batch [1, ...])` and `split.valid` a `Block`, of data that
    is cut into `train_blocks` and `valid_blocks` once and for all: draw the numbers, uniformly and
    independently, and not the rows. With constant rates it converges to a stationary point,
    linearly where F is strongly convex.

    Dagreou et al. 2022 (arXiv 2201.13409).
    """
    return single_loop(
        loss,
        score,
        params_optimizer=sgd("saba", "params_rate", params_rate),
        hparams_optimizer=sgd("saba", "hparams_rate", hparams_rate),
        adjoint=together(adjoint_rate),
        reduction=saga(train_blocks, valid_blocks),
        project=project,
    )


def ma_soba(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    hparams_rate: Rate,
    average: float | Scalar = 0.9,
    project: Project = _same,
) -> Tuner:
    """`soba` whose hparams follow h <- average h + (1 - average) direction, from h = 0.

    Chen, Xiao and Balasubramanian 2023 (arXiv 2306.12067), whose step takes the h before this
    direction has entered: theirs comes one step later. Raises ValueError unless 0 <= `average` < 1.
    """
    _below_one("ma_soba", "average", average)
    return single_loop(
        loss,
        score,
        params_optimizer=sgd("ma_soba", "params_rate", params_rate),
        hparams_optimizer=optax.chain(
            optax.ema(average, debias=False),  # pyright: ignore[reportArgumentType]
            sgd("ma_soba", "hparams_rate", hparams_rate),
        ),
        adjoint=together(adjoint_rate),
        project=project,
    )


def amigo(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    hparams_rate: Rate,
    inner_steps: int,
    adjoint_steps: int,
    project: Project = _same,
) -> Tuner:
    """`inner_steps` of params, `adjoint_steps` of the adjoint, both warm, then one of hparams.

    `split.train` is [inner_steps + adjoint_steps + 1, ...] in this order, the last for J'v, or
    [1, ...]. A function of the step number for `params_rate` counts inner steps.

    Arbel and Mairal 2022 (arXiv 2111.14580).

    Raises ValueError unless `inner_steps` is a positive integer.
    """
    return single_loop(
        loss,
        score,
        params_optimizer=sgd("amigo", "params_rate", params_rate),
        hparams_optimizer=sgd("amigo", "hparams_rate", hparams_rate),
        adjoint=descent(adjoint_rate, adjoint_steps),
        inner_steps=_checks.positive_int("amigo", "inner_steps", inner_steps),
        project=project,
    )


def stocbio(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    hparams_rate: Rate,
    inner_steps: int,
    terms: int,
    project: Project = _same,
) -> Tuner:
    """`inner_steps` of params, then a hypergradient by a Neumann series on batches of its own.

    `split.train` is [inner_steps + terms, ...]: the inner steps, terms - 1 Hessians, J'v; or
    [1, ...]. The series is adjoint_rate times the sum of `terms` addends: the paper's Q is
    terms - 1, its eta `adjoint_rate`, and the leading factor, which some code omits, is there.

    Ji, Yang and Liang 2021 (arXiv 2010.07962), Algorithm 2 and equation 6.

    Raises ValueError unless `inner_steps` is a positive integer.
    """
    return single_loop(
        loss,
        score,
        params_optimizer=sgd("stocbio", "params_rate", params_rate),
        hparams_optimizer=sgd("stocbio", "hparams_rate", hparams_rate),
        adjoint=neumann_series(adjoint_rate, terms),
        inner_steps=_checks.positive_int("stocbio", "inner_steps", inner_steps),
        project=project,
    )


def ttsa(
    loss: Loss,
    score: Loss,
    *,
    params_rate: float | Scalar,
    adjoint_rate: Rate,
    hparams_rate: float | Scalar,
    terms: int,
    key: Key | None = None,
    project: Project = _same,
) -> Tuner:
    """Two time scales: one step of params at params_rate k^-2/5, one of hparams at k^-3/5 of its.

    k = 1, 2, ... `split.train` is [1 + terms, ...]: the step of params, terms - 1 Hessians, J'v;
    or [1, ...]. Where the paper draws the number of factors in one addend of the Neumann series,
    the default sums all `terms` of them: the mean of the draw, at the cost that a scan has anyway.
    With a `key` it is drawn, see `neumann_series`.

    Hong, Wai, Wang and Yang 2023 (arXiv 2007.05170), the rates of the weakly convex case.
    """
    rates = (("params_rate", params_rate), ("hparams_rate", hparams_rate))
    for name, value in rates:
        if callable(value):
            raise TypeError(f"ttsa: `{name}` must be a number, which the method lets decay.")
        _checks.number("ttsa", name, value)
    return single_loop(
        loss,
        score,
        params_optimizer=optax.sgd(_decay(params_rate, 0.4)),
        hparams_optimizer=optax.sgd(_decay(hparams_rate, 0.6)),
        adjoint=neumann_series(adjoint_rate, terms, key),
        inner_steps=1,
        project=project,
    )


def mrbo(
    loss: Loss,
    score: Loss,
    *,
    params_rate: Rate,
    adjoint_rate: Rate,
    hparams_rate: Rate,
    terms: int,
    momentum: Rate,
    project: Project = _same,
) -> Tuner:
    """Recursive momentum for params and hparams, which move together; Neumann series anew.

    `split.train` is [terms, ...]: terms - 1 Hessians, then the batch of g_p and J'v; or [1, ...].
    Everything is looked at twice, here and where the step before was. `momentum`, in [0, 1], is
    the weight of the present draw alone: 1 takes no notice of the past.

    Yang, Ji and Liang 2021 (arXiv 2106.04692), Algorithm 1. There the rates fall like k^-1/3 and
    the momenta, one for each block, like k^-2/3: pass functions for that; here one serves both.
    """
    return single_loop(
        loss,
        score,
        params_optimizer=sgd("mrbo", "params_rate", params_rate),
        hparams_optimizer=sgd("mrbo", "hparams_rate", hparams_rate),
        adjoint=neumann_series(adjoint_rate, terms),
        reduction=storm(momentum),
        project=project,
    )


def _decay(rate: float | Scalar, exponent: float) -> optax.Schedule:
    return lambda count: rate * (count + 1.0) ** -exponent


def _below_one(where: str, name: str, value: float | Scalar) -> None:
    known = _checks.number(where, name, value)
    if known is not None and known >= 1:
        raise ValueError(f"{where}: `{name}` must be within [0, 1); got {value!r}.")
