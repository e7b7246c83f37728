"""The vocabulary: what flows between the parts, as type aliases and NamedTuples.

Argument order is fixed everywhere. Functions of a point take `params, hparams, batch`; maps that
train take `hparams, carry, batches`; a PRNG key comes first where there is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

PyTree: TypeAlias = Any
Scalar: TypeAlias = jax.Array
Key: TypeAlias = jax.Array

Params: TypeAlias = PyTree
HParams: TypeAlias = PyTree
Batch: TypeAlias = PyTree
Batches: TypeAlias = PyTree  # a Batch whose leaves have a leading axis: [steps, ...]
Carry: TypeAlias = PyTree  # what training hands from one call to the next
State: TypeAlias = PyTree

Loss: TypeAlias = Callable[[Params, HParams, Batch], Scalar]
Optimality: TypeAlias = Callable[[Params, HParams, Batch], Params]
MatVec: TypeAlias = Callable[[Params], Params]
Response: TypeAlias = Callable[[HParams, Carry, Batches], tuple[Params, Carry]]


class Split(NamedTuple):
    """Data for one outer step."""

    train: Batches  # leaves [steps, ...]: one inner step each
    valid: Batch


class SolveInfo(NamedTuple):
    """How a linear solve went."""

    # int32 scalar: products with the matrix, for preconditioners too, but not for this report
    iterations: jax.Array
    # |b - A x| / |b| of the returned x, in the 2-norm: without damping, which therefore shows.
    residual: jax.Array
    curvature: jax.Array  # smallest p'Ap / p'p met, damping included; inf if none was looked at


class LinearSolve(Protocol):
    """An approximation x of A^-1 b from products with A alone.

    `x0` is where to start, for methods that start somewhere; None is zero, and saves a product.
    """

    def __call__(
        self, matvec: MatVec, b: Params, x0: Params | None = None, /
    ) -> tuple[Params, SolveInfo]: ...


class Preconditioner(NamedTuple):
    """An approximation of A^-1 that is kept as arrays, so that it can outlive one solve.

    `build(matvec, like) -> state` looks at A by products; `like` has the structure, shapes and
    types of the vectors. `apply(state, v) -> v` must be linear in v, and for `cg` symmetric and
    positive definite. One that is not symmetric and is kept serves for A or for A', not for both:
    reverse mode solves with A', forward mode with A. `products` says how many products `build`
    takes, for `SolveInfo.iterations`.
    """

    build: Callable[[MatVec, Params], State]
    apply: Callable[[State, Params], Params]
    products: int = 0


class Estimate(NamedTuple):
    """A hypergradient and what is known about it."""

    value: jax.Array  # the score, a scalar
    grad: HParams
    info: PyTree  # diagnostics; the structure depends on the estimator, `()` if it has none


class Estimator(NamedTuple):
    """A way to obtain hypergradients, with memory between calls.

    `estimate(hparams, carry, split) -> (Estimate, Carry)`: the carry that comes back continues
    where this estimate ended.
    """

    init: Callable[[Params, HParams], Carry]
    estimate: Callable[[HParams, Carry, Split], tuple[Estimate, Carry]]


class Tuner(NamedTuple):
    """Anything that moves hyperparameters; the shape `lax.scan` wants.

    `step(state, split) -> (state, metrics)`. State is what the next step needs, metrics are for
    the eye.
    """

    init: Callable[..., State]
    step: Callable[[State, Split], tuple[State, PyTree]]


class Exchange(NamedTuple):
    """A rule by which the members of a population influence one another.

    `init(members) -> state`; `apply(key, state, members, score) -> (members, state, events)` with
    every leaf of `members` and `score` of shape [P, ...]; a smaller score is better and a
    non-finite one marks a diverged member.
    """

    init: Callable[[PyTree], State]
    apply: Callable[[Key, State, PyTree, jax.Array], tuple[PyTree, State, PyTree]]
