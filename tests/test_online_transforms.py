"""Optimizers that tune themselves: hypergradient descent and the ultimate optimizer."""

# optax types every state as a tree of arrays, without fields.
# pyright: reportAttributeAccessIssue=false

import io
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import error, jit

import hyperjax as hj

STEPS = 5

DIRECTIONS = {
    "sgd": optax.identity,
    "nesterov": lambda: optax.trace(0.9, nesterov=True),
    "adam": lambda: optax.scale_by_adam(eps_root=1e-8),
}


def loss(params, t):
    """Not convex, different at every step."""
    x = jnp.concatenate([params["a"], params["b"].ravel()])
    target = jnp.sin(jnp.arange(x.size) + t)
    return 0.5 * jnp.sum((x - target) ** 2) + 0.1 * jnp.sum(jnp.cos(3 * x))


PARAMS = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([[0.5], [3.0]])}
gradient = jax.grad(loss)


def train(optimizer, params=PARAMS, steps=STEPS):
    """Params and optimizer states after each step, leaves [steps, ...]."""

    def step(carry, t):
        params, state = carry
        updates, state = optimizer.update(gradient(params, t), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[1]


# --------------------------------------------------------------------- hypergradient descent


def by_hand(direction, alpha, beta, rule, steps=STEPS):
    """The recursion in numpy, and the rates."""
    w, state, last, rates = PARAMS, direction.init(PARAMS), None, []
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    grad, update = jit(gradient), jit(direction.update)
    for t in range(steps):
        g = grad(w, t)
        if last is not None:
            a, b = flat(g), flat(last)
            agreement = a @ b
            if rule == "additive":
                alpha = max(alpha + beta * agreement, 0.0)
            else:
                cosine = agreement / (np.linalg.norm(a) * np.linalg.norm(b))
                alpha = max(alpha * (1 + beta * cosine), 0.0)
        last, state = update(g, state, w)
        w = jax.tree.map(lambda x, u, rate=alpha: x - rate * u, w, last)
        rates.append(alpha)
    return w, np.asarray(rates)


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_hypergradient_descent_is_the_recursion_of_the_paper(name, rule):
    alpha, beta = 0.05, {"additive": 1e-3, "multiplicative": 0.2}[rule]
    direction = DIRECTIONS[name]()
    ours = hj.online.hypergradient_descent(direction, alpha, beta, rule=rule)
    params, states = jit(lambda: train(ours))()
    expected, rates = by_hand(direction, alpha, beta, rule)
    assert error(states.learning_rate, rates) < 1e-13
    assert error(jax.tree.map(lambda x: x[-1], params), expected) < 1e-13
    assert rates[0] == alpha
    assert np.all(np.diff(rates) != 0)


def test_agreement_is_minus_the_derivative_of_the_loss_in_the_last_rate():
    ours = hj.online.hypergradient_descent(optax.identity(), 0.05, 1e-3)
    state = ours.init(PARAMS)
    updates, state = ours.update(gradient(PARAMS, 0), state)
    after = lambda rate: loss(
        jax.tree.map(lambda w, u: w - rate * u, PARAMS, gradient(PARAMS, 0)), 1
    )
    params = optax.apply_updates(PARAMS, updates)
    _, state = ours.update(gradient(params, 1), state)
    assert error(state.learning_rate, 0.05 - 1e-3 * jax.grad(after)(0.05)) < 1e-15


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_rate_stops_at_zero(rule):
    ours = hj.online.hypergradient_descent(optax.identity(), 0.1, 5.0, rule=rule)
    one = jnp.ones(3)
    _, state = ours.update(one, ours.init(one))
    updates, state = ours.update(-one, state)  # the opposite direction: 0.1 - 15, 0.1 (1 - 5)
    assert state.learning_rate == 0
    assert jnp.all(updates == 0)


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_zero_gradients_change_no_rate_and_have_derivatives(rule):
    def final(rate, grads):
        ours = hj.online.hypergradient_descent(optax.identity(), rate, 0.1, rule=rule)
        _, state = ours.update(grads, ours.init(grads))
        return ours.update(grads, state)[1].learning_rate

    rate, zero = jnp.asarray(0.3), jnp.zeros(2)
    value, (slope, through) = jax.value_and_grad(final, argnums=(0, 1))(rate, zero)
    assert (value, slope) == (0.3, 1.0)
    assert jnp.all(through == 0)


@pytest.mark.parametrize("grads", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("params", [jnp.bfloat16, jnp.float32])
def test_half_precision_moves_the_rate_and_keeps_the_types(params, grads):
    ours = hj.online.hypergradient_descent(optax.identity(), 1e-3, 1e-6)

    def push(state, g):  # scan refuses a state that changes its types
        updates, state = ours.update(g, state)
        return state, jnp.asarray(updates)

    state, updates = jax.lax.scan(push, ours.init(jnp.ones(1, params)), jnp.ones((5, 1), grads))
    assert updates.dtype == grads and state.last.dtype == params
    # Four steps of 1e-6, since the first has no last one; bfloat16 knows nothing below 4e-6 there.
    assert error(state.learning_rate, 1e-3 + 4e-6) < 1e-6
    assert state.learning_rate.dtype == jnp.float32


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e10, 1e30])
def test_multiplicative_rule_knows_no_scale(size):
    ours = hj.online.hypergradient_descent(optax.identity(), 1e-3, 0.1, rule="multiplicative")
    # A leaf apart is far below the others, as a bias is; its gradients count for what they are.
    grads = lambda x: {"w": jnp.asarray(x, jnp.float32) * size, "b": jnp.float32(1e-3 * size)}
    _, state = ours.update(grads([3.0, 4.0]), ours.init(grads([0.0, 0.0])))
    _, state = ours.update(grads([4.0, 3.0]), state)
    assert error(state.learning_rate, 1e-3 * (1 + 0.1 * 24 / 25)) < 1e-6


def test_multiplicative_rule_hides_no_nan_and_takes_no_leaves():
    ours = hj.online.hypergradient_descent(optax.identity(), 0.1, 0.1, rule="multiplicative")
    one = jnp.ones(2)
    _, state = ours.update(one, ours.init(one))
    assert jnp.isnan(ours.update(one.at[0].set(jnp.nan), state)[1].learning_rate)
    # A part of `optax.partition` may have no parameters.
    assert ours.update({}, ours.init({}))[1].learning_rate == 0.1


# ---------------------------------------------------------------------------------- ultimate


sgd = lambda h: optax.sgd(h)


def test_sgd_over_sgd_is_additive_hypergradient_descent():
    ours = hj.online.ultimate(sgd, 0.05, optax.sgd(1e-3))
    other = hj.online.hypergradient_descent(optax.identity(), 0.05, 1e-3)
    (params, state), (same, reference) = jit(lambda: (train(ours), train(other)))()
    assert error(state.hparams, reference.learning_rate) < 1e-15
    assert error(params, same) < 1e-15


def test_tower_of_three_rates_is_the_derivative_of_the_loss_through_the_last_updates():
    """Each level by jax.grad of the loss, written out: w(a(k)) with everything older constant."""
    rate, middle, top = 0.05, 1e-3, 1e-5
    tower = hj.online.ultimate(sgd, rate, hj.online.ultimate(sgd, middle, optax.sgd(top)))
    params, states = jit(lambda: train(tower))()

    w, last_g, last_slope = PARAMS, None, 0.0
    grad = jit(gradient)
    for t in range(STEPS):
        g = grad(w, t)
        slope = slope_of_middle = 0.0
        if last_g is not None:
            before = jax.tree.map(lambda x, u, r=rate: x + r * u, w, last_g)
            start = rate + middle * last_slope

            def present(a, before=before, last_g=last_g, t=t):
                return loss(jax.tree.map(lambda x, u: x - a * u, before, last_g), t)

            def present_of(k, start=start, last_slope=last_slope, present=present):  # pyright: ignore
                return present(start - k * last_slope)

            slope, slope_of_middle = jax.grad(present)(rate), jax.grad(present_of)(middle)  # pyright: ignore
        middle = middle - top * slope_of_middle
        rate = rate - middle * slope
        w = jax.tree.map(lambda x, u, r=rate: x - r * u, w, g)
        last_g, last_slope = g, slope
        assert error(states.hparams[t], rate) < 1e-12
        assert error(states.over.hparams[t], middle) < 1e-12
    assert error(jax.tree.map(lambda x: x[-1], params), w) < 1e-12
    assert middle != 1e-3


ADAM = {"b1": jnp.asarray(0.8), "b2": jnp.asarray(0.99), "lr": jnp.asarray(0.1)}
FACTORIES = {
    "adam": (lambda h: hj.guarded.adam(h["lr"], h["b1"], h["b2"]), ADAM),
    "momentum and decay": (
        lambda h: optax.chain(
            optax.add_decayed_weights(h["decay"]), optax.sgd(h["lr"], momentum=h["momentum"])
        ),
        {"decay": jnp.asarray(0.1), "lr": jnp.asarray(0.05), "momentum": jnp.asarray(0.5)},
    ),
    "a rate per parameter": (
        lambda h: optax.stateless(lambda g, _: jax.tree.map(lambda r, x: -r * x, h, g)),
        jax.tree.map(lambda x: jnp.full_like(x, 0.05), PARAMS),
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_slope_is_the_derivative_through_the_last_update(name):
    # With `over` = gradient ascent at rate -1 the change of hparams is the slope itself.
    factory, hparams = FACTORIES[name]
    ours = hj.online.ultimate(factory, hparams, optax.sgd(1e-2))
    params, states = jit(lambda: train(ours, steps=3))()
    at = lambda tree, t: jax.tree.map(lambda x: x[t], tree)

    def present(h):
        """The loss at step 2 through the update of step 1, from what was known then."""
        w = at(params, 0)
        updates, _ = factory(h).update(gradient(w, 1), at(states.opt_state, 0), w)
        return loss(optax.apply_updates(w, updates), 2)

    slope = jit(jax.grad(present))(at(states.hparams, 1))
    moved = jax.tree.map(lambda a, b: (a - b) / 1e-2, at(states.hparams, 1), at(states.hparams, 2))
    # A difference of numbers of order 0.1, divided by 1e-2: 14 digits are left of 16.
    assert error(moved, slope) < 1e-11
    assert error(at(states.hparams, 0), hparams) == 0  # nothing to learn from at first


def test_zero_gradients_leave_finite_hparams():
    factory, hparams = FACTORIES["adam"]
    ours = hj.online.ultimate(factory, hparams, optax.sgd(0.1))
    zero = {"w": jnp.zeros(3)}
    updates, state = zero, ours.init(zero)
    for _ in range(3):
        updates, state = jit(ours.update)(zero, state, zero)
    assert error(state.hparams, hparams) == 0
    assert error(updates, zero) == 0


def test_ultimate_needs_params_and_floats():
    ours = hj.online.ultimate(sgd, 0.1, optax.sgd(0.1))
    with pytest.raises(ValueError, match="ultimate: `params` is None"):
        ours.update(PARAMS, ours.init(PARAMS))
    with pytest.raises(TypeError, match="ultimate: every leaf of `hparams` must be a real"):
        hj.online.ultimate(sgd, jnp.asarray(1), optax.sgd(0.1))
    with pytest.raises(TypeError, match="ultimate: `over` must have functions `init` and `update`"):
        hj.online.ultimate(sgd, 0.1, lambda h: optax.sgd(h))  # pyright: ignore


def test_hypergradient_descent_refuses_what_is_out_of_range():
    make = hj.online.hypergradient_descent
    with pytest.raises(
        ValueError, match=r"`learning_rate` must be a finite number, >= 0; got -0.1"
    ):
        make(optax.identity(), -0.1, 0.1)
    with pytest.raises(ValueError, match="`rule` must be one of 'additive', 'multiplicative'"):
        make(optax.identity(), 0.1, 0.1, rule="both")  # pyright: ignore
    with pytest.raises(TypeError, match="`direction` must have functions `init` and `update`"):
        make(optax.sgd, 0.1, 0.1)  # pyright: ignore


# -------------------------------------------------------------------------------------- both


TRANSFORMS = {
    "hypergradient descent": lambda lr: hj.online.hypergradient_descent(
        optax.scale_by_adam(eps_root=1e-8), lr, 1e-4
    ),
    "multiplicative": lambda lr: hj.online.hypergradient_descent(
        optax.identity(), lr, 0.1, rule="multiplicative"
    ),
    "ultimate": lambda lr: hj.online.ultimate(lambda h: optax.sgd(h, 0.9), lr, optax.sgd(1e-4)),
    "tower": lambda lr: hj.online.ultimate(
        lambda h: hj.guarded.adam(h), lr, hj.online.ultimate(sgd, 1e-4, optax.adam(1e-5))
    ),
}


def types(tree):
    return jax.tree.map(lambda x: (jax.typeof(x), x.weak_type), tree)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_64_rates_at_once_are_separate_runs(name):
    rates = jnp.logspace(-4, -1.5, 64)
    end = lambda lr: jax.tree.map(lambda x: x[-1] + 0.0, train(TRANSFORMS[name](lr)))
    together, one = jit(jax.vmap(end))(rates), jit(end)
    for i in (0, 40, 63):
        row = jax.tree.map(lambda x, i=i: x[i], together)
        assert error(row, one(rates[i])) < 1e-12  # batched sums are taken in another order


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("rate", [0.01, jnp.asarray(0.01)], ids=["number", "float64"])
def test_types_of_init_are_those_of_update_and_float32_stays(name, rate):
    transform = TRANSFORMS[name](rate)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    state = transform.init(params)
    updates, after = jit(transform.update)(params, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(params)


def test_inside_chain_masked_and_multi_transform():
    make = TRANSFORMS["ultimate"]
    alone = {"a": PARAMS["a"]}
    updates = lambda t, p: t.update(p, t.init(p), p)[0]
    expected = updates(make(0.1), alone)["a"]
    mask = {"a": True, "b": False}
    chained = optax.chain(optax.clip(100.0), make(0.1))
    labels = {"a": "tuned", "b": "fixed"}
    for transform in (
        optax.masked(make(0.1), mask),
        optax.masked(chained, mask),
        optax.multi_transform({"tuned": make(0.1), "fixed": optax.set_to_zero()}, labels),
    ):
        assert error(updates(transform, PARAMS)["a"], expected) == 0
    descend = TRANSFORMS["hypergradient descent"]
    nobody = optax.multi_transform({"none": descend(0.1), "all": make(0.1)}, lambda _: "all")
    assert error(updates(nobody, PARAMS), updates(make(0.1), PARAMS)) == 0


def test_they_train_in_an_ordinary_loop_by_changing_one_line():
    inner = hj.inner(
        lambda p, h, t: loss(p, t),
        lambda h: hj.online.hypergradient_descent(optax.identity(), h, 1e-3),
    )
    response = hj.unroll(inner.step)
    score = lambda h: loss(response(h, inner.init(PARAMS, h), jnp.arange(STEPS))[0], STEPS)
    h = jnp.asarray(0.05)
    # Learnt rates still have a derivative in the first one.
    slope = jit(jax.grad(score))(h)
    assert error(slope, (score(h + 1e-6) - score(h - 1e-6)) / 2e-6) < 1e-8


# ------------------------------------------------------------------------------- real data


def test_digits_are_learnt_from_any_first_rate():
    """Baydin et al.: training hardly depends on the first rate, over a range of 1000.

    Logistic regression on the embedded digits with Nesterov momentum, full batch, 150 steps.
    """
    pixels, labels = digits()

    def objective(params):
        logits = pixels @ params["w"] + params["b"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = {"w": jnp.zeros((64, 10), jnp.float32), "b": jnp.zeros(10, jnp.float32)}

    def final(transform):
        def step(carry, _):
            params, state = carry
            updates, state = transform.update(jax.grad(objective)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, transform.init(params)
        return objective(jax.lax.scan(step, carry, None, 150)[0][0])

    direction = optax.trace(0.9, nesterov=True)
    tuned = lambda lr: final(hj.online.hypergradient_descent(direction, lr, 1e-2))
    plain = lambda lr: final(optax.sgd(lr, 0.9, nesterov=True))
    rates = jnp.asarray([1e-4, 1e-3, 1e-2, 1e-1], jnp.float32)
    losses, fixed = jax.jit(lambda r: (jax.lax.map(tuned, r), jax.lax.map(plain, r)))(rates)
    spread = lambda x: float(x.max() / x.min())
    assert spread(fixed) > 5
    assert spread(losses) < 1.5
    assert float(losses.max()) < 0.5


def digits():
    """The embedded images [1797, 64], standardized, and their labels."""
    resource = resources.files("hyperjax.tasks").joinpath("data", "digits.npz")
    archive = np.load(io.BytesIO(resource.read_bytes()))
    pixels = archive["images"].reshape(-1, 64) / 16.0
    return (
        jnp.asarray((pixels - 0.3) / 0.37, jnp.float32),
        jnp.asarray(archive["labels"], jnp.int32),
    )
