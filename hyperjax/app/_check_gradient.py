"""The hypergradient against central differences and forward mode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._estimators import hypergradient
from .._types import PyTree
from .._unroll import unroll
from ._check_problem import Point, Problem, cast, first_line, hparam_names, number

_LARGEST_STEP = 0.2  # raw values are logits or standard scores, of order one, and so are weights
_RATIO = 4.0
_LEAST_SHARE = 1e-3  # of the largest gradient of a leaf: what a smaller one is scaled up from
_NARROW = {"float32", "bfloat16", "float16"}


class Row(NamedTuple):
    """Derivatives of one function along one unit direction."""

    direction: str  # "loss", "score", "hyperparameters 1", ..., or the one that is moved alone
    reverse: float
    forward: float | None  # None where the task has no forward mode
    central: float
    step: float  # of the central difference, chosen without a look at the other two
    error: float  # the worse of reverse and forward against central, relative
    settled: bool  # whether neighbouring steps agree on the central difference
    ok: bool


class GradientReport(NamedTuple):
    rows: list[Row]
    precision: str
    tolerance: float
    unused: list[str]  # hyperparameters on which the score does not depend
    notes: list[str]
    ok: bool

    @property
    def error(self) -> float:
        """The worst relative error; NaN if one is not finite."""
        return float(np.max([row.error for row in self.rows]))

    def as_json(self) -> dict[str, Any]:
        plain = lambda v: number(v) if isinstance(v, float) else v
        return {
            **self._asdict(),
            "verdict": "ok" if self.ok else "suspicious",
            "error": number(self.error),
            "rows": [{k: plain(v) for k, v in row._asdict().items()} for row in self.rows],
        }


def check_gradient(problem: Problem, point: Point, directions: int, seed: int) -> GradientReport:
    """Compares derivatives along random directions, and leaf by leaf where they differ.

    First those of `loss` and `score` in everything they depend on, near the initial parameters.
    Unrolling cannot show a wrong rule there: it is the right derivative of wrong training. Then
    the hypergradient of the score after all steps of `point`, with the noise of its batches.

    All is computed in float64, whatever the process uses, unless the task refuses that.
    """
    with jax.enable_x64(True):
        double = cast(point, jnp.float64)
        try:
            forced = _forces_float32(problem, double)
        except (TypeError, ValueError) as error:
            refusal = f"the task refuses float64 ({first_line(error)})"
        else:
            return _check(problem, double, directions, seed, single=forced, notes=[])
    return _check(problem, point, directions, seed, single=True, notes=[refusal])


def _check(
    problem: Problem, point: Point, directions: int, seed: int, *, single: bool, notes: list[str]
) -> GradientReport:
    eps = float(np.finfo(np.float32 if single else np.float64).eps)
    rng = np.random.default_rng(seed)
    rows = []
    for name, slopes in _functions(problem, point, eps, rng).items():
        rows.append(slopes.compare(name, rng))
        notes = [*notes, *slopes.refusals]
    slopes = _hypergradient(problem, point, eps)
    rows += [slopes.compare(f"hyperparameters {i + 1}", rng) for i in range(directions)]
    names = hparam_names(point.raw)
    if not all(row.ok for row in rows[-directions:]) and len(names) > 1:
        rows += [slopes.compare(name, rng, only=i) for i, name in enumerate(names)]
    if single:
        notes = [*notes, "the task computes in float32, so the tolerance is that of float32"]
    return GradientReport(
        rows=rows,
        precision="float32" if single else "float64",
        tolerance=_tolerance(eps),
        unused=[n for n, g in zip(names, slopes.grad, strict=True) if not g.any()],
        notes=list(dict.fromkeys([*notes, *slopes.refusals])),
        ok=all(row.ok for row in rows),
    )


def _tolerance(eps: float) -> float:
    """What a correct derivative may differ by, relative.

    A central difference at its best step is good to eps^(2/3), and training amplifies rounding;
    eps^(1/3) leaves room for that and lets no wrong factor through.
    """
    return eps ** (1 / 3)


def _functions(
    problem: Problem, point: Point, eps: float, rng: np.random.Generator
) -> dict[str, "_Slopes"]:
    """`loss` and `score` as functions of parameters and hyperparameters."""
    # Not at the initial parameters themselves: where biases are 0, a relu may be at its kink.
    near = lambda x: x + jnp.asarray(0.01 * rng.standard_normal(x.shape), x.dtype)
    where = (jax.tree.map(near, point.params), point.raw)
    first = jax.tree.map(lambda x: x[0], point.split.train)
    loss = lambda at: problem.loss(at[0], at[1], first)
    score = lambda at: problem.score(at[0], at[1], point.split.valid)
    return {name: _Slopes(f, jax.grad(f), where, eps)
            for name, f in (("loss", loss), ("score", score))}  # fmt: skip


def _hypergradient(problem: Problem, point: Point, eps: float) -> "_Slopes":
    training, split = problem.training, point.split
    carry = training.init(point.params, point.raw)
    response = unroll(training.step)
    estimator = hypergradient(response, problem.score, training.init)
    objective = lambda raw: problem.score(response(raw, carry, split.train)[0], raw, split.valid)
    gradient = lambda raw: estimator.estimate(raw, carry, split)[0].grad
    return _Slopes(objective, gradient, point.raw, eps)


class _Slopes:
    """Three ways to the derivative of a function; each compiles once for all directions."""

    def __init__(
        self,
        function: Callable[[PyTree], jax.Array],
        gradient: Callable[[PyTree], PyTree],
        where: PyTree,
        eps: float,
    ):
        self.where, self.refusals = where, []
        self._tolerance = _tolerance(eps)
        self._value = jax.jit(function)
        self._jvp = jax.jit(lambda at, along: jax.jvp(function, (at,), (along,))[1])
        self.grad = [np.asarray(g, np.float64) for g in jax.tree.leaves(jax.jit(gradient)(where))]
        count = int(np.log(_LARGEST_STEP / eps**0.45) / np.log(_RATIO)) + 1
        self._steps = _LARGEST_STEP / _RATIO ** np.arange(count)

    def compare(self, name: str, rng: np.random.Generator, only: int | None = None) -> Row:
        """The three along a random direction, or along one that moves a single leaf."""
        parts = _direction(rng, self.grad, only)
        leaves, tree = jax.tree.flatten(self.where)
        along = tree.unflatten(
            [jnp.asarray(d, x.dtype) for d, x in zip(parts, leaves, strict=True)]
        )
        products = [float(np.sum(g * d)) for g, d in zip(self.grad, parts, strict=True)]
        reverse, forward = sum(products), self._forward(along)
        central, doubt, step = self._central(along)
        # Relative to the terms of the sum as well, so that their cancelling is no error.
        size = max(abs(reverse), abs(central), *(0.1 * abs(p) for p in products))
        found = [reverse] if forward is None else [reverse, forward]
        gap = float(np.max([abs(x - central) for x in found]))
        allowed = self._tolerance * size
        return Row(
            direction=name,
            reverse=reverse,
            forward=forward,
            central=central,
            step=step,
            error=gap / size if size else gap,
            settled=bool(doubt <= 10 * allowed),
            ok=bool(gap <= allowed + min(3 * doubt, 10 * allowed)),
        )

    def _forward(self, along: PyTree) -> float | None:
        if self.refusals:
            return None
        try:
            return float(self._jvp(self.where, along))
        except TypeError as error:  # what JAX raises at an operation with only a custom_vjp
            self.refusals.append(f"no forward mode: {first_line(error)}")
            return None

    def _central(self, along: PyTree) -> tuple[float, float, float]:
        """The central difference where neighbouring steps agree best: (value, error, step)."""
        move = lambda h: jax.tree.map(
            lambda x, d: x + jnp.asarray(h, x.dtype) * d, self.where, along
        )
        at = lambda h: float(self._value(move(h)))
        return plateau(np.array([at(h) - at(-h) for h in self._steps]), self._steps)


def plateau(differences: np.ndarray, steps: np.ndarray) -> tuple[float, float, float]:
    """The derivative from f(x + h) - f(x - h) over falling steps h: (value, its error, step).

    Each pair of neighbouring steps is extrapolated to an error of h^4; the value is the one whose
    two neighbours are closest to it. Agreement on both sides is what tells a plateau from chance.
    """
    slopes = differences / (2 * steps)
    if differences.any():
        # A step so small that both ends round to the same value says nothing.
        slopes = np.where(differences == 0, np.nan, slopes)
    square = (steps[0] / steps[1]) ** 2
    better = (square * slopes[1:] - slopes[:-1]) / (square - 1)
    gaps = np.abs(np.diff(better))
    spread = np.maximum(gaps[:-1], gaps[1:])
    if not np.isfinite(spread).any():
        return float("nan"), float("inf"), float(steps[-1])
    best = int(np.nanargmin(np.where(np.isfinite(spread), spread, np.nan)))
    return float(better[best + 1]), float(spread[best]), float(steps[best + 2])


def _direction(
    rng: np.random.Generator, grad: list[np.ndarray], only: int | None
) -> list[np.ndarray]:
    """A random unit direction in which every leaf has about the same share of the derivative.

    Otherwise a wrong derivative of something with little effect drowns in the others.
    """
    norms = np.array([np.linalg.norm(g) for g in grad])
    largest = norms.max()
    known = np.isfinite(largest) and largest > 0
    weights = largest / np.maximum(norms, _LEAST_SHARE * largest) if known else np.ones(len(grad))
    if only is not None:
        weights = np.eye(len(grad))[only]
    parts = [w * rng.standard_normal(g.shape) for w, g in zip(weights, grad, strict=True)]
    length = np.sqrt(sum(np.sum(p**2) for p in parts))
    return [p / length for p in parts]


def _forces_float32(problem: Problem, point: Point) -> bool:
    """Whether anything in training or score turns float64 into float32.

    Raises whatever the task raises when it is given float64.
    """

    def objective(raw):
        carry = problem.training.init(point.params, raw)
        params, _ = unroll(problem.training.step)(raw, carry, point.split.train)
        return problem.score(params, raw, point.split.valid)

    return _narrows(jax.make_jaxpr(objective)(point.raw).jaxpr)


def _narrows(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(equation.params.values())) if _program(p)]
        if any(_narrows(_program(p)) for p in inner):
            return True
        inputs, outputs = (
            {str(getattr(v.aval, "dtype", "")) for v in side}
            for side in (equation.invars, equation.outvars)
        )
        if not inner and "float64" in inputs and outputs & _NARROW:
            return True
    return False


def _program(value: Any) -> Any:
    """The equations inside a parameter of an equation (a loop's body, a branch), or None."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None
