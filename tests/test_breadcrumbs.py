"""Task vectors merged: masks by hand in NumPy, algebra that must hold, vectors that diverged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import jit

from hyperjax import merge
from hyperjax.merge._breadcrumbs import count_of


def problem(tasks=3, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    base = {"w": draw(4, 50), "b": draw(7), "scale": draw()}
    tuned = jax.tree.map(lambda x: x[None] + draw(tasks, *x.shape), base)
    return base, tuned


def close(a, b, rtol=1e-12):
    # Sums of three numbers of order one: rounding, with room to spare.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-12), a, b)


def crumbs(row, keep, drop):
    """One row by sorting: outliers first, then all but the largest of the rest."""
    outliers, kept = (
        int(round(drop * 1e6) * len(row) / 1e6),
        int(round(keep * 1e6) * len(row) / 1e6),
    )
    order = np.argsort(-np.abs(row))
    out = np.zeros_like(row)
    chosen = order[outliers : outliers + kept]
    out[chosen] = row[chosen]
    return out


SHARES = [(0.15, 0.006), (0.15, 0.04), (0.29, 0.02), (0.3, 0.1), (1.0, 0.0), (0.0, 0.0), (0.9, 0.1)]


@pytest.mark.parametrize(("keep", "drop"), SHARES)
def test_breadcrumbs_by_hand(keep, drop):
    base, tuned = problem()
    vectors = merge.task_vectors(tuned, base)
    got = jit(lambda b, v: merge.breadcrumbs(b, v, scale=0.3, keep=keep, drop=drop))(base, vectors)
    w = np.asarray(vectors["w"])
    masked = np.stack([[crumbs(row, keep, drop) for row in task] for task in w])
    close(got.params["w"], base["w"] + 0.3 * masked.sum(axis=0))
    for name in ("b", "scale"):  # biases and scalars stay whole
        close(got.params[name], base[name] + 0.3 * np.asarray(vectors[name]).sum(axis=0))
    assert not got.excluded.any()


def test_shares_are_counted_exactly():
    # As many entries as a model has: a part in a million would be too many.
    for share, n in ((0.2, 10_000_000), (0.35, 100_000_000), (0.29, 100), (1, 7), (0, 7)):
        assert int(count_of(share, n)) == round(share * n)
        assert int(count_of(share, n - 1)) == (round(share * n) - (share > 0))
    assert int(jit(lambda s: count_of(s, 100))(jnp.float32(0.29))) == 29


def test_everything_kept_is_task_arithmetic():
    base, tuned = problem()
    vectors = merge.task_vectors(tuned, base)
    plain = merge.task_arithmetic(base, vectors, scale=0.4)
    close(plain, merge.breadcrumbs(base, vectors, scale=0.4, keep=1.0, drop=0.0))
    # one task alone at scale 1 is the tuned model, and the mean of tasks is the uniform soup
    one = jax.tree.map(lambda x: x[:1], vectors)
    close(merge.task_arithmetic(base, one, scale=1.0).params, jax.tree.map(lambda x: x[0], tuned))
    third = merge.task_arithmetic(base, vectors, scale=1 / 3).params
    close(third, merge.uniform(tuned).params)


def test_ties_by_hand():
    base, tuned = problem(tasks=4)
    vectors = merge.task_vectors(tuned, base)
    got = jit(lambda b, v: merge.ties(b, v, scale=0.7, keep=0.3))(base, vectors)
    names = ["b", "scale", "w"]
    flat = np.stack([np.concatenate([np.ravel(vectors[n][t]) for n in names]) for t in range(4)])
    size = flat.shape[1]
    for row in flat:
        row[np.argsort(-np.abs(row))[int(0.3 * size) :]] = 0
    merged = np.zeros(size)
    for i, column in enumerate(flat.T):
        agree = column[np.sign(column) == np.sign(column.sum())]
        agree = agree[agree != 0]
        merged[i] = agree.mean() if len(agree) else 0
    ends = np.cumsum([base[n].size for n in names])[:-1]
    for name, part in zip(names, np.split(merged, ends), strict=True):
        close(got.params[name], base[name] + 0.7 * part.reshape(base[name].shape))


def test_equal_tasks_merge_to_themselves():
    base, tuned = problem(tasks=1)
    vectors = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), merge.task_vectors(tuned, base))
    got = merge.ties(base, vectors, scale=1.0, keep=1.0).params
    close(got, jax.tree.map(lambda x: x[0], tuned))


RULES = {
    "task_arithmetic": lambda base, v: merge.task_arithmetic(base, v, scale=0.3),
    "breadcrumbs": merge.breadcrumbs,
    "ties": merge.ties,
}


@pytest.mark.parametrize("name", RULES)
def test_a_diverged_task_is_left_out(name):
    base, tuned = problem()
    vectors = merge.task_vectors(tuned, base)
    spoilt = vectors | {"b": vectors["b"].at[1, 3].set(jnp.nan)}
    spoilt["w"] = spoilt["w"].at[1].set(jnp.inf)
    got = jit(RULES[name])(base, spoilt)
    others = jax.tree.map(lambda x: x[jnp.array([0, 2])], vectors)
    close(got.params, RULES[name](base, others).params)
    assert got.excluded.tolist() == [False, True, False]
    none = RULES[name](base, jax.tree.map(lambda x: x * jnp.nan, vectors))
    assert all(np.isnan(x).all() for x in jax.tree.leaves(none.params))


def test_settings_may_be_traced_and_vmapped():
    base, tuned = problem()
    vectors = merge.task_vectors(tuned, base)
    scale, keep, drop = jnp.array([0.1, 0.5]), jnp.array([0.2, 0.06]), jnp.array([0.0, 0.02])
    rule = lambda s, k, d: merge.breadcrumbs(base, vectors, scale=s, keep=k, drop=d).params
    together = jit(jax.vmap(rule))(scale, keep, drop)
    trimmed = jit(jax.vmap(lambda s, k: merge.ties(base, vectors, scale=s, keep=k).params))
    ties = trimmed(scale, keep)
    for i in range(2):
        row = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        s, k, d = float(scale[i]), float(keep[i]), float(drop[i])
        close(row(together), merge.breadcrumbs(base, vectors, scale=s, keep=k, drop=d).params)
        close(row(ties), merge.ties(base, vectors, scale=s, keep=k).params)
    # the scale is a hyperparameter like any other
    slope = jax.grad(lambda s: jnp.sum(rule(s, 0.2, 0.02)["w"] ** 2))(0.3)
    ends = [jnp.sum(rule(s, 0.2, 0.02)["w"] ** 2) for s in (0.3 + 1e-5, 0.3 - 1e-5)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, 1e-7)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_stay(name, dtype):
    base, tuned = problem(dtype=dtype)
    got = RULES[name](base, merge.task_vectors(tuned, base))
    assert {x.dtype for x in jax.tree.leaves(got.params)} == {jnp.dtype(dtype)}


def test_refusals_name_the_argument():
    base, tuned = problem()
    vectors = merge.task_vectors(tuned, base)
    with pytest.raises(ValueError, match=r"breadcrumbs: `keep` is a share"):
        merge.breadcrumbs(base, vectors, keep=15)
    with pytest.raises(ValueError, match=r"breadcrumbs: `keep` \+ `drop` must not exceed 1"):
        merge.breadcrumbs(base, vectors, keep=0.9, drop=0.2)
    with pytest.raises(ValueError, match=r"ties: `keep` must be a finite number"):
        merge.ties(base, vectors, keep=-0.1)
    with pytest.raises(ValueError, match=r"task_vectors: `tuned` must have the"):
        merge.task_vectors(tuned, base | {"b": jnp.zeros(8)})
    with pytest.raises(ValueError, match=r"task_arithmetic: `vectors` must have the"):
        merge.task_arithmetic(base | {"b": jnp.zeros(8)}, vectors, scale=1.0)
