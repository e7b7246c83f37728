"""Any algorithm of evosax (Lange 2022, arXiv 2212.04180), pure and inside scans."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Key, PyTree
from ._types import Search


class EvosaxState(NamedTuple):
    """State of `from_evosax`."""

    key: Key
    inner: PyTree  # the algorithm's
    free: jax.Array  # [N, D]: the points asked, in the algorithm's coordinates
    points: jax.Array  # [N, D]: and in the unit cube
    started: jax.Array  # bool: whether anything was told


def from_evosax(algorithm: Any, params: Any = None, *, start: jax.Array | None = None) -> Search:
    """The search of an evosax algorithm, a whole population at a time.

        from_evosax(evosax.algorithms.CMA_ES(population_size=8, solution=jnp.zeros(6)))

    The algorithm moves in an unbounded space, of which a point of the unit cube is the sigmoid: a
    deviation of 1 around zero there is one of 1/4 around the middle here. One that starts with a
    population starts with a uniform one, which is the first to be asked.

    Args:
      algorithm: made with `solution=jnp.zeros(D)`.
      params: of the algorithm; None is its `default_params`.
      start: where to begin, [D] in the unit cube, such as `space.to_unit(space.init())`: the first
        mean, or one of the first population. None is the middle of the cube, or a population that
        is uniform altogether.

    To an algorithm that compares scores one by one (those with a population) a failure is infinite;
    to others it is as bad as the worst of its batch. A batch of failures alone teaches nothing.
    Raises ValueError for a solution that is not a vector, and for a start of another shape.
    """
    _checks.has_functions("from_evosax", "algorithm", algorithm, ("init", "ask", "tell"))
    params = algorithm.default_params if params is None else params
    shape = jnp.shape(algorithm.solution) if _is_array(algorithm.solution) else None
    if shape is None or len(shape) != 1:
        raise ValueError(
            "from_evosax: the algorithm's `solution` must be a vector of one entry per coordinate; "
            f"got {jax.tree.structure(algorithm.solution) if shape is None else shape}. "
            "Make it with `solution=jnp.zeros(D)`."
        )
    if start is not None and jnp.shape(start) != shape:
        raise ValueError(
            f"from_evosax: `start` must have the shape of the algorithm's `solution`, {shape}; got "
            f"{_checks.describe(start)}. Make it with `space.to_unit(raw)`."
        )
    size = (algorithm.population_size, *shape)
    compares = "fitness" in inspect.signature(algorithm.init).parameters

    def begin(key: Key, free: jax.Array, scores: jax.Array) -> PyTree:
        if compares:
            return algorithm.init(key, free, scores, params)
        return algorithm.init(key, jnp.zeros(shape) if start is None else _logit(start), params)

    def init(key: Key) -> EvosaxState:
        key, draw, now = jax.random.split(key, 3)
        free = _logit(jax.random.uniform(draw, size, float))
        free = free if start is None else free.at[0].set(_logit(start))
        inner = _tree.strong(begin(now, free, jnp.zeros(size[0])))
        return EvosaxState(key, inner, free, jax.nn.sigmoid(free), jnp.asarray(False))

    def ask(state: EvosaxState):
        key, now = jax.random.split(state.key)
        free, inner = algorithm.ask(now, state.inner, params)
        free = free.astype(state.free.dtype)
        if compares:
            free = jnp.where(state.started, free, state.free)
            inner = _tree.where(state.started, _like(inner, state.inner), state.inner)
        points = jax.nn.sigmoid(free)
        return points, EvosaxState(key, _like(inner, state.inner), free, points, state.started)

    def tell(state: EvosaxState, points, scores) -> EvosaxState:
        key, now, first = jax.random.split(state.key, 3)
        free = jnp.where(points == state.points, state.free, _logit(points))
        finite = jnp.isfinite(scores)
        worst = jnp.max(jnp.where(finite, scores, -jnp.inf))
        scores = jnp.where(finite, scores, jnp.inf if compares else worst)
        # What comes of infinities alone is thrown away, but must not be NaN on its way.
        scores = jnp.where(finite.any(), scores, 0).astype(state.free.dtype)
        told = _like(algorithm.tell(now, free, scores, state.inner, params)[0], state.inner)
        if compares:
            fresh = _like(begin(first, free, scores), state.inner)
            told = _tree.where(state.started, told, fresh)
        inner = _tree.where(finite.any(), told, state.inner)
        return state._replace(key=key, inner=inner, started=state.started | finite.any())

    return Search(init, ask, tell)


def _is_array(x) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(0)


def _like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` in the types of `like`: evosax mixes weak and strong ones."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def _logit(p: jax.Array) -> jax.Array:
    p = jnp.clip(p, 1e-6, 1 - 1e-6)
    return jnp.log(p) - jnp.log1p(-p)
