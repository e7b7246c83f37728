"""Guarded pieces of optax: first the trap, then that it is gone and nothing else has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import error, jit

import hyperjax as hj

PARAMS = {"b": jnp.asarray([0.3, -0.2]), "w": jnp.asarray([[1.0, 2.0], [-1.0, 0.5]])}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
PARTLY = {"b": jnp.zeros(2), "w": jnp.asarray([[0.3, 0.0], [0.0, -2.0]])}
ORDINARY = {"b": jnp.asarray([0.1, 0.7]), "w": jnp.asarray([[0.3, -1.5], [0.2, -2.0]])}


def finite(tree) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def train(optimizer, grads, steps=2):
    """What `steps` updates by the same gradient come to, as a sum with uneven weights."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return weigh(params)


def weigh(tree):
    return sum(jnp.sum(jnp.cos(jnp.arange(x.size)) * x.ravel()) for x in jax.tree.leaves(tree))


def derivatives(optimizer):
    """Of `train` in the gradient: the first, and the second along a direction."""
    first = jax.grad(lambda g: train(optimizer, g))
    return jit(lambda g: (first(g), jax.grad(lambda g: weigh(first(g)))(g)))


# --------------------------------------------------------------------- optimizers, clipping

# name: optax's own, the guarded one, and what the guarded one is in terms of optax
PIECES = {
    "adam": (optax.adam(0.1), hj.guarded.adam(0.1), optax.adam(0.1, eps_root=1e-8)),
    "adamw": (
        optax.adamw(0.1, weight_decay=0.3, nesterov=True),
        hj.guarded.adamw(0.1, weight_decay=0.3, nesterov=True),
        optax.adamw(0.1, weight_decay=0.3, eps_root=1e-8, nesterov=True),
    ),
    "scale_by_adam": (
        optax.scale_by_adam(),
        hj.guarded.scale_by_adam(),
        optax.scale_by_adam(eps_root=1e-8),
    ),
    "clip_by_global_norm": (
        optax.clip_by_global_norm(1.0),
        hj.guarded.clip_by_global_norm(1.0),
        optax.clip_by_global_norm(1.0),
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_nan_at_zero_in_optax_finite_here_and_the_same_elsewhere(name):
    plain, guarded, same = PIECES[name]
    assert finite(train(plain, ZERO))
    assert not finite(jit(jax.grad(lambda g: train(plain, g)))(ZERO))
    ours, theirs = derivatives(guarded), derivatives(same)
    for grads in (ZERO, PARTLY):
        assert finite(ours(grads))
    assert error(train(guarded, ORDINARY), train(same, ORDINARY)) < 1e-15
    # Clipping multiplies by a quotient where optax divides and multiplies: rounding.
    for mine, other in zip(ours(ORDINARY), theirs(ORDINARY), strict=True):
        assert error(mine, other) < 1e-12


def test_derivative_of_adam_at_zero_is_the_limit():
    # One step of Adam from zero moments is -lr g / (sqrt(g^2 + root) + eps): slope at zero below.
    root, eps, lr = 1e-6, 1e-8, 0.1
    tx = hj.guarded.adam(lr, eps=eps, eps_root=root)
    slope = jax.grad(lambda g: tx.update(g, tx.init(g), g)[0])(jnp.asarray(0.0))
    assert error(slope, -lr / (np.sqrt(root) + eps)) < 1e-12


def test_clipping_below_the_norm_is_the_identity_at_zero_too():
    tx = hj.guarded.clip_by_global_norm(1.0)
    clip = lambda g: tx.update(g, tx.init(g))[0]
    assert error(jax.jacobian(clip)(jnp.zeros(3)), np.eye(3)) == 0
    assert error(clip(jnp.zeros(3)), np.zeros(3)) == 0
    assert error(jnp.linalg.norm(clip(jnp.asarray([3.0, 4.0]))), 1.0) < 1e-15
    assert np.all(np.isnan(np.asarray(clip(jnp.asarray([jnp.nan, 1.0])))))  # nothing is hidden


def test_clipping_in_half_precision():
    clip = hj.guarded.clip_by_global_norm(1.0)
    apply = lambda u: jnp.asarray(clip.update(u, optax.EmptyState())[0])
    # Below the bound it is the identity, however small; 1 / norm^2 is no number of float16 there.
    small = jnp.full(2, 1e-3, jnp.float16)
    assert jnp.all(jax.jacobian(apply)(small) == jnp.eye(2))
    # A square of 300 is no number of float16, and optax clips such updates to zero.
    large = apply(jnp.full(2, 300.0, jnp.float16))
    assert large.dtype == jnp.float16
    assert error(np.asarray(large, float), np.full(2, 0.5**0.5)) < 1e-3  # float16 has 11 bits
    # And the same in float32: the square of 2e-20 is, one over it is not.
    tiny = jnp.asarray([2e-20, 0.0], jnp.float32)
    assert jnp.all(jax.jacobian(apply)(tiny) == jnp.eye(2))


@pytest.mark.parametrize("name", PIECES)
def test_optimizers_take_traced_hyperparameters(name):
    make = {
        "clip_by_global_norm": hj.guarded.clip_by_global_norm,
        "scale_by_adam": lambda h: hj.guarded.scale_by_adam(b1=h, b2=h, eps=h, eps_root=h),
        "adamw": lambda h: hj.guarded.adamw(h, h, h, h, h, weight_decay=h),
    }.get(name, lambda h: hj.guarded.adam(h, h, h, h, h))
    values = jnp.asarray([0.1, 0.4])
    function = jax.value_and_grad(lambda h: train(make(h), PARTLY))
    together = jit(jax.vmap(function))(values)
    alone, evaluate = jit(function), lambda h: train(make(h), PARTLY)
    for i in range(2):
        assert error([x[i] for x in together], list(alone(values[i]))) < 1e-13
    assert finite(together)
    difference = (evaluate(0.4 + 1e-6) - evaluate(0.4 - 1e-6)) / 2e-6
    assert error(together[1][1], difference) < 1e-7


def test_types_float32_and_bad_input():
    single = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    for _, guarded, same in PIECES.values():
        updates, state = guarded.update(single, guarded.init(single), single)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, single)
        assert jax.tree.structure(state) == jax.tree.structure(same.init(single))
    for name in ("adam", "adamw", "scale_by_adam"):
        make = getattr(hj.guarded, name)
        arguments = () if name == "scale_by_adam" else (0.1,)
        with pytest.raises(ValueError, match=f"{name}: `eps_root` must be a finite number, posi"):
            make(*arguments, eps_root=0.0)
    with pytest.raises(ValueError, match="`max_norm` must be a finite number, >= 0; got -1"):
        hj.guarded.clip_by_global_norm(-1.0)


# Each has an eps that bounds how far an entry just above zero moves.
NUDGED = {
    "amsgrad": optax.amsgrad(0.1),
    "nadam": optax.nadam(0.1),
    "radam": optax.radam(0.1),
    "ademamix": optax.contrib.ademamix(0.1),
    "adopt": optax.contrib.adopt(0.1),
    "novograd": optax.novograd(0.1),
    "muon": optax.contrib.muon(0.1, ns_steps=2),
    "rms": optax.scale_by_rms(eps_in_sqrt=False),
    "normalize": optax.normalize_by_update_norm(),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.float32) for name in NUDGED), ("amsgrad", jnp.float64)]
)
def test_nudge_mends_what_has_no_guard_of_its_own(name, dtype):
    plain, guarded = NUDGED[name], hj.guarded.nudge(NUDGED[name])
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)

    def value(optimizer, grads):
        params, state = cast(PARAMS), optimizer.init(cast(PARAMS))
        for _ in range(2 if name == "adopt" else 1):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return weigh(params)

    both = lambda o: jit(jax.value_and_grad(lambda g: value(o, g)))(cast(ZERO))
    (before, broken), (after, mended) = both(plain), both(guarded)
    assert not finite(broken)
    assert finite(mended)
    # Muon's two iterations of slope 3.4 take 1e-16 / 1e-8 to 1e-7 per entry in float32.
    assert abs(float(before - after)) < 1e-6
    untouched = cast(ORDINARY)
    assert value(guarded, untouched) == value(plain, untouched)


def test_nudge_refuses_what_it_cannot_nudge():
    half = jnp.zeros(2, jnp.float16)
    with pytest.raises(TypeError, match="nudge: float16 has no room"):
        hj.guarded.nudge(optax.sgd(0.1)).update(half, ())
    with pytest.raises(TypeError, match="nudge: `optimizer` must have functions"):
        hj.guarded.nudge(optax.sgd)  # pyright: ignore


def test_what_is_finite_in_optax_is_not_wrapped():
    # So there is no guarded rmsprop, adagrad, adabelief, yogi, adadelta, adamax, lion or sgd.
    optimizers = (
        optax.rmsprop(0.1),
        optax.rmsprop(0.1, centered=True),
        optax.adagrad(0.1),
        optax.adabelief(0.1),
        optax.yogi(0.1),
        optax.adadelta(0.1),
        optax.adamax(0.1),
        optax.lion(0.1),
        optax.sgd(0.1, 0.9),
    )
    slopes = jit(jax.jacobian(lambda g: jnp.stack([train(o, g) for o in optimizers])))(ZERO)
    assert finite(slopes)


# -------------------------------------------------------------------------------- schedules

COUNTS = (0, 1, 3, 4, 7, 10, 11, 30)

# name: (guarded factory of a vector of numbers, optax's, the numbers)
SCHEDULES = {
    "polynomial_schedule": (
        lambda h: hj.guarded.polynomial_schedule(*h),
        lambda h: optax.polynomial_schedule(*h),
        (0.3, 0.02, 1.7, 7.2, 2.5),
    ),
    "linear_schedule": (
        lambda h: hj.guarded.linear_schedule(*h),
        lambda h: optax.linear_schedule(*h),
        (0.3, 0.02, 7.2, 2.5),
    ),
    "exponential_decay": (
        lambda h: hj.guarded.exponential_decay(*h),
        lambda h: optax.exponential_decay(*h),
        (0.3, 4.5, 0.7, 1.5),
    ),
    "exponential_decay, bounded": (
        lambda h: hj.guarded.exponential_decay(*h[:3], end_value=h[3]),
        lambda h: optax.exponential_decay(*h[:3], end_value=h[3]),
        (0.3, 4.5, 0.7, 0.1),
    ),
    "exponential_decay, rising": (
        lambda h: hj.guarded.exponential_decay(*h[:3], end_value=h[3]),
        lambda h: optax.exponential_decay(*h[:3], end_value=h[3]),
        (0.3, 4.5, 1.5, 0.9),
    ),
    "exponential_decay, staircase": (
        lambda h: hj.guarded.exponential_decay(*h, staircase=True),
        lambda h: optax.exponential_decay(*h, staircase=True),
        (0.3, 4.5, 0.7),
    ),
    "cosine_decay_schedule": (
        lambda h: hj.guarded.cosine_decay_schedule(*h),
        lambda h: optax.cosine_decay_schedule(*h),
        (0.3, 8.5, 0.1, 1.3),
    ),
    "warmup_cosine_decay_schedule": (
        lambda h: hj.guarded.warmup_cosine_decay_schedule(*h),
        lambda h: optax.warmup_cosine_decay_schedule(*h),
        (0.01, 0.3, 3.5, 10.5, 0.02, 0.8),
    ),
    "piecewise_constant_schedule": (
        lambda h: hj.guarded.piecewise_constant_schedule(h[0], jnp.asarray([3, 10]), h[1:]),
        lambda h: optax.piecewise_constant_schedule(h[0], {3: h[1], 10: h[2]}),
        (0.3, 0.5, 0.2),
    ),
}


def values(make, h):
    """The schedule at all counts, as a function of its numbers."""
    return jax.vmap(lambda count: jnp.asarray(make(h)(count)))(jnp.asarray(COUNTS))


@pytest.mark.parametrize("name", SCHEDULES)
def test_optax_refuses_traced_numbers_and_here_they_are_exact(name):
    guarded, plain, numbers = SCHEDULES[name]
    h = jnp.asarray(numbers)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda h: plain(h)(0))(h)
    ours = jit(lambda h: values(guarded, h))
    assert error(ours(h), values(plain, numbers)) < 1e-14
    many = jit(jax.vmap(lambda h: values(guarded, h)))
    assert error(many(jnp.stack([h, 1.1 * h]))[1], ours(1.1 * h)) < 1e-14
    # No number is at a kink, so central differences of step 1e-6 are good to about 1e-9.
    jacobian = jit(jax.jacobian(lambda h: values(guarded, h)))(h)
    for i, unit in enumerate(np.eye(len(numbers))):
        difference = (ours(h + 1e-6 * unit) - ours(h - 1e-6 * unit)) / 2e-6
        assert float(jnp.max(jnp.abs(jacobian[:, i] - difference))) < 1e-8


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_take_python_numbers_and_keep_float32(name):
    guarded, plain, numbers = SCHEDULES[name]
    assert error(guarded(numbers)(4), plain(tuple(numbers))(4)) < 1e-14
    single = jnp.asarray(numbers, jnp.float32)
    result = guarded(single)(jnp.asarray(4))
    assert result.dtype == jnp.float32
    assert not result.weak_type
    assert error(result, plain(tuple(numbers))(4)) < 1e-5


EDGES = {
    "polynomial, at its end": (lambda h: hj.guarded.polynomial_schedule(*h), (1, 0.1, 0.5, 4)),
    "polynomial, power 0": (lambda h: hj.guarded.polynomial_schedule(*h), (1, 0.1, 0, 4)),
    "polynomial, 0 steps": (lambda h: hj.guarded.polynomial_schedule(*h), (1, 0.1, 0.5, 0)),
    "linear, 0 steps": (lambda h: hj.guarded.linear_schedule(*h), (1, 0.1, 0)),
    "exponential, 0 steps": (lambda h: hj.guarded.exponential_decay(*h), (1, 0, 0.5)),
    "exponential, rate 0": (lambda h: hj.guarded.exponential_decay(*h), (1, 4, 0)),
    "cosine, at its end": (lambda h: hj.guarded.cosine_decay_schedule(*h), (1, 4, 0.1, 0.5)),
    "cosine, exponent 0": (lambda h: hj.guarded.cosine_decay_schedule(*h), (1, 4, 0.1, 0)),
    "cosine, 0 steps": (lambda h: hj.guarded.cosine_decay_schedule(*h), (1, 0, 0.1, 0.5)),
    "no warm-up": (
        lambda h: hj.guarded.warmup_cosine_decay_schedule(*h),
        (0, 1, 0, 10, 0.1, 0.5),
    ),
    "warm-up only": (
        lambda h: hj.guarded.warmup_cosine_decay_schedule(*h),
        (0, 1, 4, 4, 0.1, 0.5),
    ),
    "peak 0": (lambda h: hj.guarded.warmup_cosine_decay_schedule(*h), (0, 0, 4, 10, 0)),
}


@pytest.mark.parametrize("name", EDGES)
def test_schedules_and_their_derivatives_are_finite_at_the_edges(name):
    make, numbers = EDGES[name]
    h = jnp.asarray(numbers, float)
    function = lambda h: values(make, h)

    looks = lambda h: (function(h), jax.jacrev(function)(h), jax.hessian(function)(h))
    value, jacobian, hessian = jit(looks)(h)
    assert finite((value, jacobian, hessian))
    # The derivative in the first value by hand: these are all linear in it.
    slope = jit(function)(h.at[0].add(1.0)) - value
    assert error(jacobian[:, 0], slope) < 1e-14


def test_values_at_the_edges():
    guarded = hj.guarded
    at = lambda schedule: [float(schedule(c)) for c in (0, 4, 7)]
    # As optax has them, where it does not raise.
    assert at(guarded.linear_schedule(1.0, 0.1, 0)) == at(optax.linear_schedule(1.0, 0.1, 0))
    assert at(guarded.exponential_decay(1.0, 4, 0.0)) == at(optax.exponential_decay(1.0, 4, 0.0))
    assert at(guarded.exponential_decay(1.0, 0, 0.5)) == at(optax.exponential_decay(1.0, 0, 0.5))
    for power in (0.0, 1.0):
        ours, theirs = (m.cosine_decay_schedule(1.0, 4, 0.5, power) for m in (guarded, optax))
        assert error(np.asarray(at(ours)), np.asarray(at(theirs))) < 1e-15
        ours, theirs = (m.polynomial_schedule(1.0, 0.5, power, 4) for m in (guarded, optax))
        assert error(np.asarray(at(ours)), np.asarray(at(theirs))) < 1e-15
    numbers = (0.0, 1.0, 0, 8, 0.5)
    ours, theirs = (m.warmup_cosine_decay_schedule(*numbers) for m in (guarded, optax))
    assert error(np.asarray(at(ours)), np.asarray(at(theirs))) < 1e-15
    # And where it does.
    with pytest.raises(ValueError, match="requires positive decay_steps"):
        optax.cosine_decay_schedule(1.0, 0, 0.5)
    assert at(guarded.cosine_decay_schedule(1.0, 0, 0.5)) == [0.5, 0.5, 0.5]
    assert at(guarded.warmup_cosine_decay_schedule(0.0, 1.0, 4, 4, 0.5)) == [0.0, 0.5, 0.5]


def test_boundaries_and_scales_may_be_lists_of_traced_numbers():
    make = hj.guarded.piecewise_constant_schedule
    value = lambda h: make(h[0], [3, h[1]], [0.5, h[2]])(jnp.asarray(10))
    h = jnp.asarray([0.3, 10.0, 0.2], jnp.float32)
    found, slope = jit(jax.value_and_grad(value))(h)
    assert found.dtype == jnp.float32  # numbers in a list take the type of the others
    assert error((found, slope), (0.3 * 0.5 * 0.2, np.array([0.1, 0.0, 0.15]))) < 1e-7


def test_schedules_refuse_what_is_out_of_range():
    for name, bad in (
        ("linear_schedule", (1.0, 0.1, -1)),
        ("exponential_decay", (1.0, -1, 0.5)),
        ("cosine_decay_schedule", (1.0, -1)),
        ("warmup_cosine_decay_schedule", (0.0, 1.0, -1, 10)),
    ):
        with pytest.raises(ValueError, match=r"_steps` must be a finite number, >= 0; got -1\."):
            getattr(hj.guarded, name)(*bad)
    with pytest.raises(ValueError, match=r"vectors of one length; got shapes \(2,\) and \(3,\)"):
        hj.guarded.piecewise_constant_schedule(1.0, jnp.arange(2), jnp.arange(3.0))


def test_a_length_is_tuned_through_training():
    """What it is for: the derivative of a trained model in when its schedule ends."""
    inner = hj.inner(
        lambda w, h, batch: 0.5 * jnp.sum((w - 1) ** 2),
        lambda h: hj.guarded.adam(hj.guarded.warmup_cosine_decay_schedule(0.0, 0.5, h[0], h[1])),
    )
    response, w = hj.unroll(inner.step), jnp.asarray([0.0, 1.0])  # the second gradient is zero

    def final(h):
        return jnp.sum((response(h, inner.init(w, h), jnp.arange(8))[0] - 1) ** 2)

    h = jnp.asarray([2.5, 7.3])
    slope = jit(jax.grad(final))(h)
    evaluate = jit(final)
    for i, unit in enumerate(np.eye(2)):
        difference = (evaluate(h + 1e-6 * unit) - evaluate(h - 1e-6 * unit)) / 2e-6
        assert error(slope[i], difference) < 1e-7
