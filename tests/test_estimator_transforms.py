"""Every estimator under every transformation: a table of what is exact and what is refused.

`python tests/test_estimator_transforms.py --write` writes docs/estimator_transforms.md; a test
compares it.
"""

from collections.abc import Callable

import estimator_zoo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from estimator_zoo import KINDS, case
from jax.sharding import NamedSharding, PartitionSpec
from problems import error, fused_jit, jit
from transform_table import DOCS, Table

import hyperjax as hj

COLUMNS = {name: f"`{name}`" for name in KINDS}
DIRECTION = np.random.default_rng(9).normal(size=problems.FEATURES)
ROWS: dict[str, Callable[[str], float]] = {}


def row(label: str):
    """Register a function from the name of an estimator to its relative error."""
    return lambda function: ROWS.setdefault(label, function)


def grad_of(c) -> Callable:
    return lambda h, split=c.problem.split: c.estimate(h, c.carry, split)[0].grad


def value_of(c) -> Callable:
    return lambda h: c.estimate(h, c.carry, c.problem.split)[0].value


def answers(c):
    return problems.ridge_answers(c.problem.hparams, c.problem.split)


def alone(c, settings):
    """Gradients at each setting by itself."""
    call = jit(grad_of(c))
    return np.stack([call(h) for h in settings])


def settings(c, count: int) -> jax.Array:
    h = c.problem.hparams
    return h[None] + 0.1 * jax.random.normal(jax.random.key(1), (count, *h.shape))


@row("`jit`")
def _(name):
    c = case(name)
    h = c.problem.hparams
    expected = answers(c).gradient if c.exact else grad_of(c)(h)
    return error(jit(grad_of(c))(h), expected)


@row("`vmap`")
def _(name):
    c = case(name)
    h = settings(c, 3)
    return error(jit(jax.vmap(grad_of(c)))(h), alone(c, h))


@row("in a `scan`, the carry handed on")
def _(name):
    c = case(name)
    h = settings(c, 3)

    def body(carry, h):
        result, carry = c.estimate(h, carry, c.problem.split)
        return carry, result.grad

    carry, together = jit(lambda carry: jax.lax.scan(body, carry, h))(c.carry)
    one_by_one, now = [], c.carry
    step = jit(body)
    for x in h:
        now, grad = step(now, x)
        one_by_one.append(grad)
    floats = lambda tree: [
        x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return max(error(together, np.stack(one_by_one)), error(floats(carry), floats(now)))


@row("`grad` of `Estimate.value`")
def _(name):
    c = case(name)
    return error(jit(jax.grad(value_of(c)))(c.problem.hparams), answers(c).gradient)


@row("`jvp` of `Estimate.value`")
def _(name):
    c = case(name)
    along = jit(lambda h, d: jax.jvp(value_of(c), (h,), (d,))[1])
    return error(along(c.problem.hparams, jnp.asarray(DIRECTION)), answers(c).gradient @ DIRECTION)


def hessian(name, forward: bool) -> float:
    """Against the closed form; where there is none, one mode against the other."""
    c = case(name)
    h = c.problem.hparams
    first, second = (jax.jacfwd, jax.jacrev) if forward else (jax.jacrev, jax.jacfwd)
    got = jit(first(grad_of(c)))(h)
    return error(got, answers(c).hessian if c.exact else jit(second(grad_of(c)))(h))


@row("`jacfwd` of `Estimate.grad`")
def _(name):
    return hessian(name, forward=True)


@row("`jacrev` of `Estimate.grad`")
def _(name):
    return hessian(name, forward=False)


@row("data sharded over 8 devices")
def _(name):
    c = case(name)
    mesh, p = problems.mesh("data"), c.problem
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    split = jax.tree.map(place, p.split, problems.shard(p.split, "data"))
    return error(jit(grad_of(c))(p.hparams, split), jit(grad_of(c))(p.hparams))


@row("in `shard_map` over the data")
def _(name):
    c, plain = case(name, "data"), case(name)
    p = c.problem
    mapped = jax.shard_map(
        grad_of(plain._replace(estimate=c.estimate)),
        mesh=problems.mesh("data"),
        in_specs=(PartitionSpec(), problems.shard(p.split, "data")),
        out_specs=PartitionSpec(),
    )
    return error(jit(mapped)(p.hparams, p.split), jit(grad_of(plain))(p.hparams))


@row("`vmap` in `shard_map` over members")
def _(name):
    c = case(name)
    h, members = settings(c, 8), PartitionSpec("member")
    mapped = jax.shard_map(
        jax.vmap(grad_of(c)),
        mesh=problems.mesh("member"),
        in_specs=members,
        out_specs=members,
    )
    return error(jit(mapped)(h), alone(c, h))


@row("`run` of a `population`")
def _(name):
    c = case(name)
    p = c.problem
    tuner = hj.tune(c.estimator, optax.sgd(0.1))
    many = hj.population(tuner, hj.exchange.isolation())
    h = settings(c, 2)
    splits = problems.repeat(p.split, 2)
    state = many.init(jax.random.key(0), problems.repeat(p.params, 2), h)
    end, _ = fused_jit(lambda s: hj.run(many, s, splits))(state)
    single = fused_jit(lambda s: hj.run(tuner, s, splits)[0].hparams)
    return error(end.members.hparams, np.stack([single(tuner.init(p.params, x)) for x in h]))


# ------------------------------------------------------------------------------- the table

TWICE = "reversible: there are no second derivatives through integers"
REFUSED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    (label, "reversible"): (TypeError, TWICE)
    for label in (
        "`grad` of `Estimate.value`",
        "`jvp` of `Estimate.value`",
        "`jacfwd` of `Estimate.grad`",
        "`jacrev` of `Estimate.grad`",
    )
}
UNDEFINED = {
    (label, "score_function"): "no derivative"
    for label in ("`grad` of `Estimate.value`", "`jvp` of `Estimate.value`")
}

HEAD = """\
# Transformations of estimators

Written by `python tests/test_estimator_transforms.py --write`: every cell is a run on a ridge
regression in float64, and a test fails when this page is not what the runs give. "Exact" is a
relative error below 1e-10. Up to `rtho`, gradients are compared with the closed form, as are all
derivatives of `Estimate.value`; `marthe` and the evolutionary ones with what the same estimator
gives without the transformation, and their Jacobians in one mode with those in the other.
Responses have [a table of their own](transforms.md). "Refused" means that it raises while JAX
traces, never that a number is wrong.

"""
TAIL = """
`reverse`, `forward` and `implicit` are `hypergradient` in these modes and with that response,
`reversible` is `hypergradient` with the response of that name: the derivative of an estimate is a
second derivative, which training in integers does not have. `unroll(step, checkpoint="binomial")`
has it.
"""

TABLE = Table(
    DOCS / "estimator_transforms.md",
    "test_estimator_transforms.py",
    COLUMNS,
    ROWS,
    REFUSED,
    UNDEFINED,
    HEAD,
    TAIL,
)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("label", ROWS)
def test_cell(label, name):
    TABLE.check_cell(label, name)


def test_page_is_written_from_the_table():
    TABLE.check_page()


@pytest.mark.parametrize("name", COLUMNS)
def test_vmap_over_many_settings_traces_the_loss_no_more_than_one(name):
    # What is compiled for 64 settings is one program with as many copies of the loss as for one.
    traces = []
    plain = problems.ridge(steps=3)

    def loss(w, h, batch):
        traces.append(1)
        return plain.loss(w, h, batch)

    def count(transform, settings) -> int:
        # Anew, since JAX keeps what it has traced of a function.
        p = plain._replace(loss=loss, inner=hj.inner(loss, lambda _: optax.sgd(0.6)))
        estimator = estimator_zoo.KINDS[name].make(p)
        carry = estimator.init(p.params, p.hparams)
        traces.clear()
        estimate = lambda h: estimator.estimate(h, carry, p.split)[0]
        jax.jit(transform(estimate)).lower(settings)
        return len(traces)

    once = count(lambda f: f, plain.hparams)
    assert 0 < count(jax.vmap, problems.repeat(plain.hparams, 64)) <= once


if __name__ == "__main__":
    TABLE.main()
