"""Every response under every transformation: a table of what is exact and what is refused.

`python tests/test_transforms.py --write` writes docs/transforms.md; a test compares it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from problems import Case, case, error, jit, last
from transform_table import DOCS, Table

import hyperjax as hj

COLUMNS = {
    "implicit": "`implicit`",
    "unroll": "`unroll`",
    "unroll, checkpoint=7": "`unroll`, `checkpoint=7`",
    "unroll, checkpoint='binomial'": '`unroll`, `checkpoint="binomial"`',
    "best_response": "`best_response`",
}

ROWS: dict[str, Callable[[str], float]] = {}


def row(label: str):
    """Register a function from the name of a response to its relative error."""
    return lambda function: ROWS.setdefault(label, function)


def value(c: Case) -> Callable:
    return problems.objective(c.response, c.problem)


def params(c: Case) -> Callable:
    p = c.problem
    return lambda h: c.response(h, p.inner.init(p.params, h), p.split.train)[0]


def settings(c: Case, count: int) -> jax.Array:
    h = c.problem.hparams
    return h[None] + 0.1 * jax.random.normal(jax.random.key(1), (count, *h.shape))


DIRECTION = np.random.default_rng(9).normal(size=problems.FEATURES)


# ------------------------------------------------------------------- first derivatives


@row("`grad`")
def _(name):
    c = case(name)
    h = c.problem.hparams
    return error(jit(jax.grad(value(c)))(h), c.answers(h).gradient)


@row("`jvp`")
def _(name):
    c = case(name)
    h = c.problem.hparams
    slope = jit(lambda h, d: jax.jvp(value(c), (h,), (d,))[1])(h, jnp.asarray(DIRECTION))
    return error(slope, c.answers(h).gradient @ DIRECTION)


@row("`jacfwd` of the params")
def _(name):
    c = case(name)
    h = c.problem.hparams
    return error(jit(jax.jacfwd(params(c)))(h), c.answers(h).jacobian)


@row("`jacrev` of the params")
def _(name):
    c = case(name)
    h = c.problem.hparams
    return error(jit(jax.jacrev(params(c)))(h), c.answers(h).jacobian)


@row("`grad`, hparams captured by a closure")
def _(name):
    c = case(name)
    p = c.problem

    def captured(h):
        # Nothing passes through the argument `hparams` of the response.
        step = lambda state, _, batch: p.inner.step(state, h, batch)
        optimality = lambda w, _, batch: jax.grad(p.loss)(w, h, batch)
        apply = lambda phi, _: problems.affine(phi, h)
        response = problems.respond(name, step, optimality, apply)
        w, _ = response(jnp.zeros(()), p.inner.init(p.params, h), p.split.train)
        return p.score(w, h, p.split.valid)

    return error(jit(jax.grad(captured))(p.hparams), c.answers(p.hparams).gradient)


@row("`grad` in the training data")
def _(name):
    c = case(name)
    p = c.problem

    def of_labels(labels):
        x, _, *key = p.split.train
        return value(c)(p.hparams, p.split._replace(train=(x, labels, *key)))

    # Every step sees the same labels: their derivative is the sum over steps. For best_response it
    # is zero, since the hypernetwork's training counts as constant.
    per_step = jit(jax.grad(of_labels))(p.split.train[1])
    return error(per_step.sum(0), c.answers(p.hparams).data)


# ------------------------------------------------------------------ second derivatives


def hessian_error(name, outer, inner):
    c = case(name)
    h = c.problem.hparams
    return error(jit(outer(inner(value(c))))(h), c.answers(h).hessian)


@row("Hessian, forward over reverse")
def _(name):
    return hessian_error(name, jax.jacfwd, jax.grad)


@row("Hessian, reverse over reverse")
def _(name):
    return hessian_error(name, jax.jacrev, jax.grad)


@row("Hessian, forward over forward")
def _(name):
    return hessian_error(name, jax.jacfwd, jax.jacfwd)


def estimate(c: Case) -> Callable:
    p = c.problem
    estimator = hj.hypergradient(c.response, p.score, p.inner.init)
    return lambda h, split: estimator.estimate(h, estimator.init(p.params, h), split)[0].grad


@row("`jacfwd` of `Estimate.grad`")
def _(name):
    c = case(name)
    p = c.problem
    return error(jit(jax.jacfwd(estimate(c)))(p.hparams, p.split), c.answers(p.hparams).hessian)


@row("`jacrev` of `Estimate.grad`")
def _(name):
    c = case(name)
    p = c.problem
    return error(jit(jax.jacrev(estimate(c)))(p.hparams, p.split), c.answers(p.hparams).hessian)


# --------------------------------------------------------- batching, loops, devices


@row("`vmap`")
def _(name):
    c = case(name)
    h = settings(c, 3)
    return error(jit(jax.vmap(value(c)))(h), np.stack([c.answers(x).value for x in h]))


@row("`vmap` of `grad`")
def _(name):
    c = case(name)
    h = settings(c, 3)
    return error(jit(jax.vmap(jax.grad(value(c))))(h), np.stack([c.answers(x).gradient for x in h]))


@row("`grad` in a `scan`")
def _(name):
    c = case(name)
    start = c.problem.hparams
    descend = lambda h, _: (h - 0.5 * jax.grad(value(c))(h), None)
    end, _ = jit(lambda h: jax.lax.scan(descend, h, None, length=3))(start)
    expected = start
    for _ in range(3):
        expected = expected - 0.5 * c.answers(expected).gradient
    return error(end, expected)


@row("`grad` of `jax.checkpoint`")
def _(name):
    c = case(name)
    h = c.problem.hparams
    return error(jit(jax.grad(jax.checkpoint(value(c))))(h), c.answers(h).gradient)


@row("`grad`, data sharded over 8 devices")
def _(name):
    c = case(name)
    mesh, p = problems.mesh("data"), c.problem
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    split = jax.tree.map(place, p.split, problems.shard(p.split, "data"))
    return error(jit(jax.grad(value(c)))(p.hparams, split), c.answers(p.hparams).gradient)


def over_data(name, transform):
    """`transform(value)` inside shard_map, its checks on; the loss is a pmean over the devices."""
    c = case(name, "data")
    p = c.problem
    mapped = jax.shard_map(
        transform(value(c)),
        mesh=problems.mesh("data"),
        in_specs=(PartitionSpec(), problems.shard(p.split, "data")),
        out_specs=PartitionSpec(),
    )
    return jit(mapped)(p.hparams, p.split), case(name).answers(p.hparams)


@row("`grad` in `shard_map`")
def _(name):
    got, answers = over_data(name, jax.grad)
    return error(got, answers.gradient)


@row("`jvp` in `shard_map`")
def _(name):
    along = lambda f: lambda h, split: jax.jvp(lambda h: f(h, split), (h,), (DIRECTION,))[1]
    got, answers = over_data(name, along)
    return error(got, answers.gradient @ DIRECTION)


@row("Hessian in `shard_map`, forward over reverse")
def _(name):
    got, answers = over_data(name, lambda f: jax.jacfwd(jax.grad(f)))
    return error(got, answers.hessian)


@row("Hessian in `shard_map`, reverse over reverse")
def _(name):
    got, answers = over_data(name, lambda f: jax.jacrev(jax.grad(f)))
    return error(got, answers.hessian)


@row("`vmap` of `grad` in `shard_map` over members")
def _(name):
    c = case(name)
    p = c.problem

    def member(h, start):
        w, _ = c.response(h, p.inner.init(start, h), p.split.train)
        return p.score(w, h, p.split.valid)

    h, members = settings(c, 8), PartitionSpec("member")
    mapped = jax.shard_map(
        jax.vmap(jax.grad(member)),
        mesh=problems.mesh("member"),
        in_specs=(members, members),
        out_specs=members,
    )
    starts = problems.repeat(p.params, 8)
    return error(jit(mapped)(h, starts), np.stack([c.answers(x).gradient for x in h]))


# --------------------------------------------------------------- what losses are made of


@row("`grad`, PRNG keys in the batches")
def _(name):
    c = case(name) if name == "best_response" else case(name, keyed=True)
    h = c.problem.hparams
    return error(jit(jax.grad(value(c)))(h), c.answers(h).gradient)


@jax.custom_vjp
def double(x):
    return 2 * x


@jax.custom_vjp
def reverse_only(x):
    """x^2, like a kernel that comes with a backward pass, made of kernels as well."""
    return x**2


double.defvjp(lambda x: (double(x), None), lambda _, ct: (2 * ct,))
reverse_only.defvjp(lambda x: (reverse_only(x), x), lambda x, ct: (double(x) * ct,))


@row("`hypergradient`, an op with only a `custom_vjp` in the loss")
def _(name):
    c = case(name, square=reverse_only)
    p = c.problem
    return error(jit(estimate(c))(p.hparams, p.split), c.answers(p.hparams).gradient)


@row("`grad`, an op with only a `custom_vjp` in the loss")
def _(name):
    c = case(name, square=reverse_only)
    h = c.problem.hparams
    return error(jit(jax.grad(value(c)))(h), c.answers(h).gradient)


@row("`jvp`, an op with only a `custom_vjp` in the loss")
def _(name):
    c = case(name, square=reverse_only)
    h = c.problem.hparams
    slope = jit(lambda h, d: jax.jvp(value(c), (h,), (d,))[1])(h, jnp.asarray(DIRECTION))
    return error(slope, c.answers(h).gradient @ DIRECTION)


@row("`grad`, a response within a response")
def _(name):
    c = case(name)
    p = c.problem
    center = 0.3 * jnp.ones(problems.FEATURES)

    # In the middle hparams minimize score + exp(t) |hparams - center|^2 / 2. Its Hessian is within
    # [0.8, 1.6], so 40 steps of rate 0.8 are to the end.
    def middle_loss(h, t, batch):
        del batch
        return value(c)(h) + 0.5 * jnp.exp(t) * jnp.sum((h - center) ** 2)

    middle = hj.inner(middle_loss, lambda _: optax.sgd(0.8))
    respond = problems.respond(name, middle.step, hj.stationary(middle_loss))

    def top(t):
        h, _ = respond(t, middle.init(p.hparams, t), jnp.arange(40))
        x, y = last(p.split.train)
        return 0.5 * jnp.mean((x @ params(c)(h) - y) ** 2)

    return error(jit(jax.grad(top))(0.0), top_slope(p, np.asarray(center)))


def top_slope(p, center) -> np.ndarray:
    """Derivative at t = 0: h(t) is a root of gradient(h) + exp(t) (h - center)."""
    h = np.asarray(p.hparams)
    for _ in range(20):  # Newton from a point nearby: quadratic convergence needs 5
        answers = problems.ridge_answers(h, p.split)
        matrix = answers.hessian + np.eye(len(h))
        h = h - np.linalg.solve(matrix, answers.gradient + h - center)
    answers = problems.ridge_answers(h, p.split)
    moved = -np.linalg.solve(answers.hessian + np.eye(len(h)), h - center)
    (x, y), _ = problems.ridge_data(p.split)
    slope = x.T @ (x @ answers.params - y) / len(y)
    return slope @ answers.jacobian @ moved


# ------------------------------------------------------------------------- the table

FORWARD = "can't apply forward-mode autodiff (jvp) to a custom_vjp function"
TWICE = "Reverse-mode differentiation does not work for lax.while_loop"
AXES = "Expected cotangent type float64[5]{V:data} but got float64[5]"
BINOMIAL = "unroll, checkpoint='binomial'"

# Everything that is refused, and by which words: a refusal for another reason is a failure.
REFUSED = {
    ("`jvp`", BINOMIAL): (TypeError, FORWARD),
    ("`jacfwd` of the params", BINOMIAL): (TypeError, FORWARD),
    ("Hessian, reverse over reverse", BINOMIAL): (ValueError, TWICE),
    ("Hessian, forward over forward", BINOMIAL): (TypeError, FORWARD),
    ("`jacrev` of `Estimate.grad`", BINOMIAL): (ValueError, TWICE),
    ("`jvp` in `shard_map`", BINOMIAL): (TypeError, FORWARD),
    ("Hessian in `shard_map`, reverse over reverse", "implicit"): (ValueError, AXES),
    ("Hessian in `shard_map`, reverse over reverse", BINOMIAL): (ValueError, TWICE),
    ("`jvp`, an op with only a `custom_vjp` in the loss", "implicit"): (TypeError, FORWARD),
    ("`jvp`, an op with only a `custom_vjp` in the loss", "unroll"): (TypeError, FORWARD),
    ("`jvp`, an op with only a `custom_vjp` in the loss", "unroll, checkpoint=7"): (
        TypeError,
        FORWARD,
    ),
    ("`jvp`, an op with only a `custom_vjp` in the loss", BINOMIAL): (TypeError, FORWARD),
    ("`grad`, a response within a response", BINOMIAL): (ValueError, TWICE),
}

# A closed form exists for exact responses only.
WITHOUT_ANSWER = {
    ("`grad`, a response within a response", "best_response"): "no closed form",
}

HEAD = """\
# Transformations

Written by `python tests/test_transforms.py --write`: every cell is a run on a ridge regression in
float64, under jit, compared with the closed form, and a test fails when this page is not what the
runs give. "Refused" means that JAX raises while it traces, never that a number is wrong; what to
do instead stands below the table.

"Exact" is a relative error below 1e-10; for `best_response` the closed form is that of `apply`
with the hypernetwork held fixed, so that its derivative in the training data is exactly zero.

"""

TAIL = """
Instead of what is refused:

- Forward mode through `checkpoint="binomial"`: leave `checkpoint` out. Forward mode keeps no
  states, so there is nothing to save.
- Reverse over reverse through `checkpoint="binomial"`, and responses within it: take an integer
  or `"sqrt"`, or the Hessian forward over reverse.
- Reverse over reverse through `implicit` in `shard_map`: forward over reverse, or shard by `jit`.
- `jvp` through an op that has only a `custom_vjp`: reverse mode, as in `hypergradient`.
"""


TABLE = Table(
    DOCS / "transforms.md",
    "test_transforms.py",
    COLUMNS,
    ROWS,
    REFUSED,
    WITHOUT_ANSWER,
    HEAD,
    TAIL,
)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("label", ROWS)
def test_cell(label, name):
    TABLE.check_cell(label, name)


def test_page_is_written_from_the_table():
    TABLE.check_page()


if __name__ == "__main__":
    TABLE.main()
