"""Problems with known answers, in float64, and the responses that are tested on them.

Every loss takes an `axis`: None, or the name of the mesh axis over which the data is split inside
`shard_map`; the mean over data is then a `pmean`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, PartitionSpec

import hyperjax as hj

STEPS = 60  # of ridge: see `ridge`
CONTRACTION = 0.5
ROWS, FEATURES = 40, 5  # ROWS is a multiple of the 8 devices

# Half as long to compile, without optimizations.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

# For tests that compare every bit of what two programs made: with the fusions that users get, which
# conftest switches off. Without them one function was seen to round differently in each.
fused_jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})


class Problem(NamedTuple):
    loss: Callable
    score: Callable
    inner: hj.Inner
    params: Any  # where training starts
    hparams: Any
    split: hj.Split


def mesh(name: str) -> Mesh:
    """Eight CPU devices along one axis."""
    return jax.make_mesh((8,), (name,), axis_types=(AxisType.Auto,))


def shard(split: hj.Split, name: str) -> hj.Split:
    """Where the leaves of a split lie when the data is divided: train has the steps in front."""
    rows = lambda axes: lambda x: PartitionSpec(*axes) if x.ndim >= len(axes) else PartitionSpec()
    return hj.Split(
        jax.tree.map(rows((None, name)), split.train), jax.tree.map(rows((name,)), split.valid)
    )


def mean(x: jax.Array, axis: str | None) -> jax.Array:
    return jnp.mean(x) if axis is None else lax.pmean(jnp.mean(x), axis)


def repeat(tree: Any, steps: int) -> Any:
    """The same batch for every step: leaves [steps, ...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), tree)


def last(batches: Any) -> Any:
    return jax.tree.map(lambda x: x[-1], batches)


def objective(response, problem: Problem, init: Callable | None = None) -> Callable:
    """score(response(hparams), hparams), training anew from `problem.params`."""
    init = problem.inner.init if init is None else init

    def value(hparams, split=problem.split):
        params, _ = response(hparams, init(problem.params, hparams), split.train)
        return problem.score(params, hparams, split.valid)

    return value


def regression(seed: int, rows: int = ROWS, features: int = FEATURES):
    """Two sets (x, y) from one linear model with noise."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=features)
    sets = []
    for _ in range(2):
        x = rng.normal(size=(rows, features))
        sets.append((jnp.asarray(x), jnp.asarray(x @ weights + 0.5 * rng.normal(size=rows))))
    return sets


# -------------------------------------------------------------------- ridge, one l2 per feature


def ridge(axis=None, *, steps: int = STEPS, square=jnp.square, keyed: bool = False) -> Problem:
    """loss = |x w - y|^2 / 2n + sum_i exp(h_i) w_i^2 / 2, with a score that also depends on h.

    The Hessian of the loss has its eigenvalues in [0.9, 2.4] for all hparams that tests use, so
    that descent at rate 0.6 contracts by CONTRACTION per step: 60 steps leave 1e-18 of the error.

    keyed: a PRNG key in the batch, the same at each step, adds noise to the labels.
    """
    train, valid = regression(0)
    if keyed:
        train = (*train, jax.random.key(7))
    hparams = jnp.asarray(np.random.default_rng(1).normal(size=FEATURES) * 0.2 - 0.5)

    def residual(w, batch):
        x, y, *key = batch
        return x @ w - (y + label_noise(*key) if key else y)

    def loss(w, h, batch):
        return 0.5 * mean(square(residual(w, batch)), axis) + 0.5 * jnp.sum(jnp.exp(h) * w**2)

    def score(w, h, batch):
        direct = 0.05 * jnp.sum(h**2) + 0.1 * jnp.sum(h * w)
        return 0.5 * mean(residual(w, batch) ** 2, axis) + direct

    inner = hj.inner(loss, lambda _: optax.sgd(0.6))
    split = hj.Split(repeat(train, steps), valid)
    return Problem(loss, score, inner, jnp.zeros(FEATURES), hparams, split)


def label_noise(key: jax.Array) -> jax.Array:
    return 0.3 * jax.random.normal(key, (ROWS,))


class Answers(NamedTuple):
    """What a response and its score come to, in closed form."""

    params: np.ndarray
    jacobian: np.ndarray  # of params in hparams
    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    data: np.ndarray  # gradient in the training labels


def ridge_answers(hparams, split: hj.Split) -> Answers:
    """By the normal equations A w = x'y / n with A = x'x / n + diag(e), e = exp(h), in numpy.

    Derivatives along h_j, with D_j = e_j (unit matrix at j): A w_j = -D_j w, and once more
    A w_jk = -(D_k w_j + D_j w_k + [j = k] D_j w). With u = A^-1 (gradient of the score in w), a
    sum over w_jk is one over the right-hand sides.
    """
    (x, y), _ = ridge_data(split)
    h, n = np.asarray(hparams), len(y)
    e = np.exp(h)
    a = x.T @ x / n + np.diag(e)
    w = np.linalg.solve(a, x.T @ y / n)
    jacobian = -np.linalg.solve(a, np.diag(e * w))

    u = np.linalg.solve(a, ridge_score_slope(w, h, split))
    cross = (u * e)[:, None] * jacobian  # [k, j]: u'D_k w_j
    hessian = ridge_score_curvature(jacobian, split) - cross - cross.T - np.diag(u * e * w)
    return Answers(
        params=w,
        jacobian=jacobian,
        value=ridge_score(w, h, split),
        gradient=-e * w * u + 0.1 * h + 0.1 * w,
        hessian=hessian,
        data=x @ u / n,
    )


def ridge_data(split: hj.Split):
    x, y, *key = last(split.train)
    y = np.asarray(y) + (np.asarray(label_noise(*key)) if key else 0)
    return (np.asarray(x), y), tuple(map(np.asarray, split.valid))


def ridge_score(w, h, split):
    xv, yv = map(np.asarray, split.valid)
    return 0.5 * np.mean((xv @ w - yv) ** 2) + 0.05 * np.sum(h**2) + 0.1 * np.sum(h * w)


def ridge_score_slope(w, h, split):
    """Gradient of the score in w."""
    xv, yv = map(np.asarray, split.valid)
    return xv.T @ (xv @ w - yv) / len(yv) + 0.1 * np.asarray(h)


def ridge_score_curvature(jacobian, split):
    """Hessian of the score in h if w were affine in h with this Jacobian."""
    xv, yv = map(np.asarray, split.valid)
    through = jacobian.T @ (xv.T @ xv / len(yv)) @ jacobian
    return through + 0.1 * (jacobian + jacobian.T) + 0.1 * np.eye(len(jacobian))


# ------------------------------------------------------------- a best response to the ridge


def affine(phi, hparams):
    return phi["a"] + phi["b"] @ hparams


def ridge_hypernet(axis=None, *, steps: int = STEPS, square=jnp.square) -> Problem:
    """An affine hypernetwork for ridge, fitted at random settings near the current ones."""
    plain = ridge(axis, steps=steps, square=square)

    def perturbed(phi, h, batch):
        *data, key = batch
        nearby = h + 0.3 * jax.random.normal(key, h.shape)
        return plain.loss(affine(phi, nearby), nearby, data)

    inner = hj.inner(perturbed, lambda _: optax.adam(0.02))
    keys = jax.random.split(jax.random.key(3), steps)
    split = hj.Split((*plain.split.train, keys), plain.split.valid)
    phi = {"a": jnp.zeros(FEATURES), "b": jnp.zeros((FEATURES, FEATURES))}
    return plain._replace(inner=inner, params=phi, split=split)


def affine_answers(phi, hparams, split: hj.Split) -> Answers:
    """Closed forms for params = a + b h with `phi` held fixed."""
    a, b, h = np.asarray(phi["a"]), np.asarray(phi["b"]), np.asarray(hparams)
    w = a + b @ h
    return Answers(
        params=w,
        jacobian=b,
        value=ridge_score(w, h, split),
        gradient=b.T @ ridge_score_slope(w, h, split) + 0.1 * h + 0.1 * w,
        hessian=ridge_score_curvature(b, split),
        data=np.zeros(len(split.train[1][-1])),
    )


# ---------------------------------------------------------- every response, with its answers


class Case(NamedTuple):
    """A response on its problem. `answers(hparams)` holds at any hparams."""

    problem: Problem
    response: Callable
    answers: Callable[[Any], Answers]


UNROLLS = {
    "unroll": {},
    "unroll, checkpoint=7": {"checkpoint": 7},
    "unroll, checkpoint='sqrt'": {"checkpoint": "sqrt"},
    "unroll, checkpoint='binomial'": {"checkpoint": "binomial"},
    # Long enough a tail that nothing is lost: CONTRACTION ** 50 is 1e-15.
    "unroll, truncate=50": {"truncate": 50},
}
SOLVES = {
    "implicit": hj.linsolve.cg(maxiter=20, tol=1e-14),
    "implicit, neumann": hj.linsolve.neumann(STEPS, 0.6),  # the same contraction as the descent
}
RESPONSES = (*SOLVES, *UNROLLS, "best_response")


def respond(name: str, step: Callable, optimality: Callable, apply: Callable = affine):
    """One of `RESPONSES`, from its parts."""
    if name == "best_response":
        return hj.best_response(apply, hj.unroll(step))
    if name in SOLVES:
        return hj.implicit(hj.unroll(step), optimality, solve=SOLVES[name])
    return hj.unroll(step, **UNROLLS[name])


@functools.cache
def case(name: str, axis=None, **options) -> Case:
    """One of `RESPONSES` on ridge; for best_response on its hypernetwork."""
    p = (ridge_hypernet if name == "best_response" else ridge)(axis, **options)
    response = respond(name, p.inner.step, hj.stationary(p.loss))
    if name != "best_response":
        return Case(p, response, lambda h: ridge_answers(h, p.split))
    train = hj.unroll(p.inner.step)
    fit = jit(lambda h: train(h, p.inner.init(p.params, h), p.split.train)[0])
    return Case(p, response, lambda h: affine_answers(fit(h), h, p.split))


# ----------------------------------------------------------- problems without a closed form


def logistic(axis=None, *, steps: int = 80) -> Problem:
    """Logistic regression with one l2 per feature: convex, but not quadratic.

    The Hessian lies between exp(h) > 0.4 and 1 (x'x / 4n plus l2), so that descent at rate 1
    contracts by 0.6 per step.
    """
    sets = [(x, (y > 0).astype(x.dtype)) for x, y in regression(2)]
    hparams = jnp.asarray(np.random.default_rng(3).uniform(-0.9, -0.5, size=FEATURES))

    def cross_entropy(w, batch):
        x, y = batch
        return mean(jax.nn.softplus(x @ w) - y * (x @ w), axis)

    loss = lambda w, h, batch: cross_entropy(w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2)
    score = lambda w, h, batch: cross_entropy(w, batch)
    inner = hj.inner(loss, lambda _: optax.sgd(1.0))
    split = hj.Split(repeat(sets[0], steps), sets[1])
    return Problem(loss, score, inner, jnp.zeros(FEATURES), hparams, split)


def net(axis=None, *, steps: int = 40, momentum: float = 0.6) -> Problem:
    """A tanh net with four hidden units; learning rate, momentum and l2 are hyperparameters."""
    rng = np.random.default_rng(4)
    sets = []
    for _ in range(2):
        x = rng.normal(size=(24, 2))
        sets.append((jnp.asarray(x), jnp.asarray(np.sin(2 * x[:, 0]) * x[:, 1])))
    params = {
        "w": jnp.asarray(rng.normal(size=(2, 4))),
        "b": jnp.asarray(rng.normal(size=4)),
        "out": jnp.asarray(0.5 * rng.normal(size=4)),
    }
    values = {"lr": 0.3, "momentum": momentum, "l2": 0.05}
    hparams = jax.tree.map(lambda v: jnp.asarray(v, float), values)

    def error(p, batch):
        x, y = batch
        hidden = jnp.tanh(x @ p["w"] + p["b"][None])
        return 0.5 * mean((hidden @ p["out"] - y) ** 2, axis)

    def loss(p, h, batch):
        return error(p, batch) + 0.5 * h["l2"] * optax.tree.norm(p, squared=True)

    score = lambda p, h, batch: error(p, batch)
    inner = hj.inner(loss, lambda h: optax.sgd(h["lr"], momentum=h["momentum"]))
    return Problem(loss, score, inner, params, hparams, hj.Split(repeat(sets[0], steps), sets[1]))


class Game(NamedTuple):
    problem: Problem
    respond: Callable  # the follower's best response, in numpy
    leader: np.ndarray  # where the leader's score is least, given that the follower responds
    hessian: np.ndarray  # of the leader's score, given the same


def game(axis=None, *, steps: int = 60) -> Game:
    """A quadratic leader-follower game. The follower minimizes p'q p / 2 - p'(r h + c), so that
    p*(h) = q^-1 (r h + c) is affine; the leader minimizes |p - goal|^2 / 2 + h'h / 4.

    q has the eigenvalues 0.5 to 1.5: descent at rate 1 contracts by 0.5 per step. c is the mean
    of the data.
    """
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    q, r = basis @ np.diag([0.5, 1.0, 1.5]) @ basis.T, rng.normal(size=(3, 2))
    data, goal = rng.normal(size=(16, 3)), rng.normal(size=3)

    def loss(p, h, batch):
        return 0.5 * p @ q @ p - p @ (r @ h) - mean(batch @ p, axis)

    score = lambda p, h, batch: 0.5 * jnp.sum((p - goal) ** 2) + 0.25 * jnp.sum(h**2)
    inner = hj.inner(loss, lambda _: optax.sgd(1.0))
    split = hj.Split(repeat(jnp.asarray(data), steps), jnp.zeros(()))
    problem = Problem(loss, score, inner, jnp.zeros(3), jnp.asarray(rng.normal(size=2)), split)

    slope = np.linalg.solve(q, r)
    rest = np.linalg.solve(q, data.mean(0))
    # Stationary for the leader: slope'(slope h + rest - goal) + h / 2 = 0.
    hessian = slope.T @ slope + 0.5 * np.eye(2)
    leader = np.linalg.solve(hessian, slope.T @ (goal - rest))
    return Game(problem, lambda h: slope @ np.asarray(h) + rest, leader, hessian)


# -------------------------------------------------------------------------- comparisons


def error(got, expected) -> float:
    """|got - expected| / |expected| over all leaves; absolute where the answer is zero."""
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise AssertionError(f"{jax.tree.structure(got)} is not {jax.tree.structure(expected)}")
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    if any(np.shape(x) != np.shape(y) for x, y in pairs):
        raise AssertionError([(np.shape(x), np.shape(y)) for x, y in pairs])
    size = np.sqrt(sum(np.sum(np.square(y)) for _, y in pairs))
    distance = np.sqrt(sum(np.sum(np.square(np.asarray(x) - y)) for x, y in pairs))
    return float(distance / size) if size else float(distance)


def central_difference(f: Callable, x, direction, step: float = 1e-6) -> float:
    """(f(x + s d) - f(x - s d)) / 2s.

    Two errors: s^2 f''' / 6 and 1e-16 f / s. At s = 1e-6 the second is 1e-10 for f of order one,
    and the first stays below 1e-8 for third derivatives up to 5e4 (the net has 7e3 along l2).
    """
    shift = lambda sign: jax.tree.map(lambda a, d: a + sign * step * d, x, direction)
    return float((f(shift(1)) - f(shift(-1))) / (2 * step))


def directions(x, count: int, seed: int = 0) -> list:
    """Each coordinate of `x`, then `count` random unit directions."""
    flat, unravel = ravel_pytree(x)
    random = np.random.default_rng(seed).normal(size=(count, flat.size))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    return [unravel(jnp.asarray(d)) for d in (*np.eye(flat.size), *random)]
