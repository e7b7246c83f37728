"""HDET: hyperparameter-divergent ensemble training (arXiv 2604.24708)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _fan_out, _tree
from .._space import Space
from .._types import Exchange, HParams, Key, Params, PyTree
from . import _controller
from ._replace import random_finite


class HdetState(NamedTuple):
    """State of `hdet`."""

    calls: jax.Array  # int32: outer steps since the last convergence
    total: jax.Array  # [P]: sum of the scores of these steps
    base: _controller.Base


class HdetEvents(NamedTuple):
    """What one outer step did.

    The bases are a schedule, see `hyperjax.schedule`, with the first one put in front, since each
    is in force from the next step on.
    """

    parents: jax.Array  # int32 [P]: whose state a slot holds but for params; its own if untouched
    diverged: jax.Array  # bool [P]: the score, or at a convergence the params, were not finite
    converged: jax.Array  # bool: params were averaged and hyperparameters moved
    score: jax.Array  # [P]: mean over the outer steps since the last convergence
    base: HParams  # constrained values of the centre from now on
    velocity: HParams
    signal: HParams  # of this convergence, in [-width, width]
    bounded: HParams  # bool: the base was stopped at the end of its range


def hdet(
    space: Space,
    *,
    width: float | PyTree = 1 / 9,
    every: int = 1,
    gain: float = 0.5,
    momentum: float = 0.9,
    sigma: float | Literal["running"] = "running",
    update: Literal["log", "linear"] = "log",
    decay: float | PyTree = 0.0,
    warm_up: int = 0,
    params: Callable[[PyTree], Params] = lambda members: members.carry.params,
) -> Exchange:
    """Members spread their hyperparameters around a base, and converge by averaging params.

        training = hj.inner(loss, lambda raw: optax.chain(
            hj.exchange.all_reduce("members"), optax.adam(space.constrain(raw)["lr"])))
        tuner = hj.tune(hj.training_loss(training, loss), optax.set_to_zero())
        together = hj.population(tuner, hj.exchange.hdet(space), axis_name="members")

    Between convergences members differ in nothing but their hyperparameters: gradients are averaged
    over them. (Without `all_reduce` they follow gradients of their own: local SGD with a
    controller, another method.) At a convergence

    - params become the mean over members; optimizer states, equal anyway, stay;
    - the base moves towards the better members (see below);
    - members get new hyperparameters: of P, evenly spaced over 1 -+ `width` times the base, where
      the range is on a log scale, or over -+ `width` around the raw base. The order is drawn anew
      for every scalar.

    The base: with L_r the mean score of member r since the last convergence and x_r its relative
    offset, w = softmax(-L / sigma), signal = sum w_r x_r - mean x_r, velocity <- momentum velocity
    + (1 - momentum) signal, base <- base exp(gain velocity - decay). `score` is meant to be the
    training loss (`training_loss`), on a batch that all members share: then differences are due to
    the hyperparameters and not to the luck of the draw, which matters more than anything else here.

    A member that diverged is never averaged. It takes the mean of the params of the others and, as
    its optimizer may be lost as well, all else from one of them; for the base it counts as the
    worst. If all have, nothing moves; `diverged` says so.

    Args:
      space: members' hyperparameters are raw values of it. Whatever is in it is tuned; a width of 0
        keeps a hyperparameter where it is.
      width: of the spread, one number or one per range; 1/9 in the paper. With 0 everywhere members
        stay equal, and this is data parallelism.
      every: outer steps between convergences.
      gain, momentum: of the base.
      sigma: the difference of scores that counts. "running" is the standard deviation over members,
        averaged with `momentum`, so that the scale of the loss does not matter (nor, for long, a
        loss that explodes); the paper fixes 0.1 and its code 0.002.
      update: "log", or the "linear" of the paper, base <- base exp(-decay) + gain velocity with the
        signal in units of the value. There old velocity can push a shrinking base below zero; it
        is stopped at the end of its range, and `bounded` says so.
      decay: subtracted from log base (or the raw base) per convergence: log(start / end) / K goes
        from `start` to `end` in K of them. (In the authors' code the ratio is upside down.)
      warm_up: convergences before the base first moves.
      params: where members keep their params.

    On a log scale base and members stay inside the range. Members must all go on for as long: with
    `steps` in the population's `init`, those that have finished would keep hyperparameters that the
    controller takes for moved. Raises ValueError for numbers outside
    their ranges, or a width that the range cannot hold, TypeError for what is no Space.
    """
    conf = _controller.settings("hdet", space, width, gain, momentum, sigma, update, decay, warm_up)
    _checks.positive_int("hdet", "every", every)
    _checks.is_callable("hdet", "params", params)

    def init(members):
        size = jax.tree.leaves(members)[0].shape[0]
        total = jnp.zeros(size, jnp.result_type(float))
        return HdetState(jnp.zeros((), jnp.int32), total, _controller.begin(conf, members.hparams))

    def apply(key, state, members, score):
        # Inside shard_map all varies as the whole does, in either branch.
        like = key, state, members, score
        _, state, members, score = _tree.vary_like(like, like)
        total = state.total + score.astype(state.total.dtype)
        calls = state.calls + 1
        mean = total / calls
        wait = lambda: _wait(conf, HdetState(calls, total, state.base), members, mean)
        converge = lambda: _converge(conf, params, key, state.base, members, mean)
        waiting, due = (lambda f=f: _tree.vary_like(f(), like) for f in (wait, converge))
        return due() if every == 1 else lax.cond(calls == every, due, waiting)

    return Exchange(init, apply)


def _wait(conf, state: HdetState, members, score):
    own = jnp.arange(score.shape[0], dtype=jnp.int32)
    base = state.base
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), base.raw)
    events = HdetEvents(
        own, ~jnp.isfinite(score), jnp.asarray(False), score, conf.space.constrain(base.raw),
        base.velocity, _tree.zeros_like(base.raw), none,
    )  # fmt: skip
    return members, state, events


def _converge(conf, where, key, base, members, score):
    reseed, shuffle = jax.random.split(key)
    own = jnp.arange(score.shape[0], dtype=jnp.int32)
    # Params may have gone after the last loss was taken.
    sound = jnp.isfinite(score) & jax.vmap(_tree.all_finite)(where(members))
    score = jnp.where(sound, score, jnp.nan)
    parents = jnp.where(sound, own, random_finite(reseed, score, own.shape))
    parents = jnp.where(sound.any(), parents, own)
    base, report = _controller.follow(conf, shuffle, base, members.hparams, score)
    # A copy of everything only if it is needed.
    members = lax.cond(sound.all(), lambda: members, lambda: _tree.take(members, parents))
    members = _tree.replace_at(where, members, _fan_out.average(where(members), sound))
    members = members._replace(hparams=base.assigned)
    state = HdetState(jnp.zeros((), jnp.int32), jnp.zeros_like(score), base)
    events = HdetEvents(
        parents, ~sound, jnp.asarray(True), score, conf.space.constrain(base.raw),
        base.velocity, report.signal, report.bounded,
    )  # fmt: skip
    return members, state, events


def scatter(key: Key, params: Params, size: int, scale: float = 0.01) -> Params:
    """`size` copies of `params` with noise, leaves [size, ...]: HDET's warm initialisation.

    Every leaf with d entries gets normal noise of deviation `scale` |leaf|_2 / sqrt(d), so that
    its norm is about `scale` times that of the leaf. Raises ValueError for a negative scale.
    """
    _checks.positive_int("scatter", "size", size)
    _checks.number("scatter", "scale", scale)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def one(key, x):
        deviation = scale * jnp.sqrt(jnp.mean(x * x))
        return x[None] + deviation * jax.random.normal(key, (size, *x.shape), x.dtype)

    return tree.unflatten([one(k, jnp.asarray(x)) for k, x in zip(keys, leaves, strict=True)])
