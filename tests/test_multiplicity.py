"""Predictive multiplicity: by hand, its inequalities, and against the convex optimum it bounds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import jit

from hyperjax import protocol


def by_hand(losses, p, epsilon, delta, threshold=0.5):
    base = int(np.argmin(losses))
    near = [i for i in range(len(losses)) if losses[i] <= losses[base] + epsilon]
    far = lambda i, x: np.max(np.abs(p[i][x] - p[base][x])) >= delta
    label = lambda i, x: p[i][x] >= threshold if np.ndim(p[i][x]) == 0 else np.argmax(p[i][x])
    cases = range(p.shape[1])
    share = lambda test: (
        np.mean([any(test(i, x) for i in near) for x in cases]),
        max(np.mean([test(i, x) for x in cases]) for i in near),
    )
    return near, share(far), share(lambda i, x: label(i, x) != label(base, x))


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.5, 2.0])
def test_by_hand(rng, epsilon, classes):
    losses = rng.uniform(size=12)
    shape = (12, 20) if classes is None else (12, 20, classes)
    p = rng.uniform(size=shape)
    p = p if classes is None else p / p.sum(axis=-1, keepdims=True)
    got = jit(lambda l, p: protocol.multiplicity(l, p, epsilon=epsilon, delta=0.4))(losses, p)
    near, probability, labels = by_hand(losses, p, epsilon, 0.4)
    assert np.flatnonzero(got.members).tolist() == near
    np.testing.assert_allclose((got.ambiguity, got.discrepancy), probability, 1e-12)
    np.testing.assert_allclose((got.label_ambiguity, got.label_discrepancy), labels, 1e-12)
    np.testing.assert_allclose(got.low, p[near].min(axis=0))
    np.testing.assert_allclose(got.high, p[near].max(axis=0))
    np.testing.assert_allclose(got.width, np.mean(np.ptp(p[near], axis=0)), 1e-12)


def test_inequalities(rng):
    losses, p = jnp.asarray(rng.uniform(size=30)), jnp.asarray(rng.uniform(size=(30, 40)))
    epsilons, deltas = jnp.linspace(0, 1, 9), jnp.linspace(0.1, 0.9, 5)
    one = lambda e, d: protocol.multiplicity(losses, p, epsilon=e, delta=d)
    table = jit(jax.vmap(lambda e: jax.vmap(lambda d: one(e, d))(deltas)))(epsilons)
    assert np.all(table.discrepancy <= table.ambiguity)
    assert np.all(table.label_discrepancy <= table.label_ambiguity)
    for values in (table.ambiguity, table.discrepancy):
        assert np.all(np.diff(values, axis=0) >= 0)  # more members
        assert np.all(np.diff(values, axis=1) <= 0)  # a stricter notion of disagreement
        assert not np.any(values[0])  # the best alone
        assert values[-1, 0] > 0.5
    assert np.all(np.diff(table.width[:, 0]) >= 0)


def test_diverged_members_do_not_count(rng):
    losses, p = jnp.asarray(rng.uniform(size=6)), jnp.asarray(rng.uniform(size=(6, 9)))
    sound = protocol.multiplicity(losses[:4], p[:4], epsilon=2.0, delta=0.2)
    losses = losses.at[4].set(jnp.nan).at[5].set(-1.0)
    p = p.at[5, 3].set(jnp.nan)
    got = protocol.multiplicity(losses, p, epsilon=2.0, delta=0.2)
    assert got.members.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_array_equal(got.members[:4], sound.members)
    for a, b in zip(got[1:], sound[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    none = protocol.multiplicity(losses * jnp.nan, p, epsilon=2.0, delta=0.2)
    assert not none.members.any()
    assert all(np.isnan(x).all() for x in none[2:])
    # Compared with a member that diverged, in its loss or in a prediction: nothing can be said.
    for spoilt in (4, 5):
        got = protocol.multiplicity(losses, p, epsilon=2, delta=0.2, reference=spoilt)
        assert np.isnan(got.ambiguity)


def test_a_reference_of_ones_own(rng):
    losses, p = jnp.array([0.1, 0.5, 0.3]), rng.uniform(size=(3, 50))
    got = protocol.multiplicity(losses, jnp.asarray(p), epsilon=0.0, delta=0.3, reference=1)
    assert got.members.all()  # all are as good as the reference
    far = np.abs(p - p[1]) >= 0.3
    np.testing.assert_allclose(got.ambiguity, np.mean(far.any(axis=0)))
    np.testing.assert_allclose(got.discrepancy, far.mean(axis=1).max())


def test_a_population_approaches_the_convex_bound(rng):
    """Least squares in two dimensions, where the near-optimal set is an ellipse."""
    x = rng.normal(size=(40, 2))
    hessian = x.T @ x / 40
    best, epsilon = np.array([0.3, -0.2]), 0.02
    # loss = 1/2 (t - best)' H (t - best): on its boundary x't deviates by sqrt(2 eps x' H^-1 x)
    widest = np.sqrt(2 * epsilon * np.einsum("ni,ij,nj->n", x, np.linalg.inv(hessian), x))
    shares = []
    for size in (2, 8, 64):
        angles = np.linspace(0, 2 * np.pi, size, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)]) * np.sqrt(2 * epsilon) * (1 - 1e-9)
        shifts = np.linalg.solve(np.linalg.cholesky(hessian).T, circle).T
        members = np.concatenate([best[None], best + shifts])
        gaps = members - best
        losses = 0.5 * np.einsum("pi,ij,pj->p", gaps, hessian, gaps)
        got = protocol.multiplicity(
            jnp.asarray(losses), jnp.asarray(members @ x.T), epsilon=epsilon, delta=0.2
        )
        assert got.members.all()
        assert np.all(got.high - x @ best <= widest * (1 + 1e-9))
        shares.append(float(got.ambiguity))
    bound = np.mean(widest >= 0.2)
    assert shares[0] < shares[-1] <= bound + 1e-12  # a share of 40 cases, rounded
    assert shares[-1] > 0.95 * bound


def test_types_and_refusals(rng):
    p = jnp.asarray(rng.uniform(size=(3, 5)), jnp.float32)
    got = protocol.multiplicity(jnp.arange(3.0, dtype=jnp.float32), p, epsilon=1, delta=0.1)
    kinds = {x.dtype for x in got if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.float32)}
    assert got.reference.dtype == jnp.int32
    with pytest.raises(ValueError, match=r"expected `losses` \[P\] and `predictions` \[P, N\]"):
        protocol.multiplicity(jnp.ones(3), p[0], epsilon=1, delta=0.1)
    with pytest.raises(ValueError, match="one entry per member; got 4 and 3"):
        protocol.multiplicity(jnp.ones(4), p, epsilon=1, delta=0.1)
    wrongs: Any = (3, -1, 0.5, jnp.int32(3))
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"row of a member, from 0 to 2; got {wrong}"):
            protocol.multiplicity(jnp.ones(3), p, epsilon=1, delta=0.1, reference=wrong)
    with pytest.raises(ValueError, match="`delta` must be a finite number, positive"):
        protocol.multiplicity(jnp.ones(3), p, epsilon=1, delta=0)
    with pytest.raises(ValueError, match="`epsilon` must be a finite number, >= 0"):
        protocol.multiplicity(jnp.ones(3), p, epsilon=-1, delta=0.1)
