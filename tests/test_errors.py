"""Bad input is refused before anything is computed: what came, what was expected, how to mend it.

Each case lists words that the message must hold: the function, the argument, what came, what was
expected.
"""

# pyright: reportArgumentType=false
# Wrong types are the point here.

import estimator_zoo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import hyperjax as hj

NAN = float("nan")


def refuse(kind, call, *words):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def some_space() -> hj.Space:
    return hj.space({"lr": hj.loguniform(1e-4, 1.0), "l2": hj.positive(shape=(3,))})


# -------------------------------------------------------------------------------- spaces

SPACES = {
    "low above high": (
        lambda: hj.loguniform(1.0, 1e-4),
        ("loguniform", "0 < low < high", "low=1.0", "high=0.0001"),
    ),
    "low zero": (lambda: hj.loguniform(0.0, 1.0), ("loguniform", "0 < low < high", "low=0.0")),
    "bounds nan": (lambda: hj.uniform(NAN, 1.0), ("uniform", "finite low < high", "low=nan")),
    "bounds infinite": (
        lambda: hj.uniform(0.0, np.inf),
        ("uniform", "finite low < high", "high=inf"),
    ),
    "scale zero": (lambda: hj.real(scale=0.0), ("real", "`scale`", "positive", "0.0")),
    "scale nan": (lambda: hj.positive(scale=NAN), ("positive", "`scale`", "positive", "nan")),
    "init out of range": (
        lambda: hj.uniform(0.0, 1.0, init=2.0),
        ("uniform", "init", "2.", "(0, 1)"),
    ),
    "init on the bound": (
        lambda: hj.uniform(0.0, 1.0, init=1.0),
        ("uniform", "init", "1.", "(0, 1)"),
    ),
    "init nan": (
        lambda: hj.loguniform(1e-4, 1.0, init=NAN),
        ("loguniform", "init", "NaN", "(0.0001, 1)"),
    ),
    "one init nan": (
        lambda: hj.positive(init=np.asarray([1.0, NAN]), shape=(2,)),
        ("positive", "init", "NaN", "(0, inf)"),
    ),
    "init infinite": (lambda: hj.positive(init=np.inf), ("positive", "init", "inf", "(0, inf)")),
    "init shape": (
        lambda: hj.real(init=np.zeros(2), shape=(3,)),
        ("real", "`init`", "(3,)", "(2,)"),
    ),
    "no ranges": (lambda: hj.space({}), ("space", "no ranges", "loguniform")),
}


@pytest.mark.parametrize("name", SPACES)
def test_space_refuses(name):
    call, words = SPACES[name]
    refuse(ValueError, call, *words)


def test_space_refuses_what_is_not_a_range():
    refuse(TypeError, lambda: hj.space({"lr": 0.1}), "space", "lr is float", "loguniform")


METHODS = {
    "constrain": lambda s, tree: s.constrain(tree),
    "unconstrain": lambda s, tree: s.unconstrain(tree),
    "ravel": lambda s, tree: s.ravel(tree),
    "fan_out": lambda s, tree: s.fan_out(jax.random.key(0), tree, 4, 0.1),
}


@pytest.mark.parametrize("name", METHODS)
def test_hparams_must_match_the_space(name):
    call = lambda tree: lambda: METHODS[name](some_space(), tree)
    refuse(ValueError, call({"lr": jnp.ones(())}), name, "structure of the space", "'l2'")
    wrong = {"lr": jnp.ones(()), "l2": jnp.ones(2)}
    refuse(ValueError, call(wrong), name, "l2 is float64[2]", "(3,)")
    flat = {"lr": jnp.ones(()), "l2": jnp.ones(())}
    refuse(ValueError, call(flat), name, "l2 is float64[]", "(3,)")


def test_values_out_of_range_are_refused():
    s = some_space()
    tree = lambda lr, l2: {"lr": jnp.asarray(lr), "l2": jnp.asarray(l2)}
    call = lambda lr, l2: lambda: s.unconstrain(tree(lr, l2))
    refuse(ValueError, call(2.0, [1.0] * 3), "unconstrain", "lr is 2.", "(0.0001, 1)")
    refuse(ValueError, call(NAN, [1.0] * 3), "unconstrain", "lr is NaN", "(0.0001, 1)")
    # All faults in one message.
    refuse(ValueError, call(2.0, [1.0, -1.0, 1.0]), "lr is 2.", "l2 is [ 1. -1.  1.]", "(0, inf)")
    # Traced values have no number to look at; the map goes on.
    assert jax.jit(s.unconstrain)(tree(0.5, [1.0] * 3))["lr"] > 0


def test_unravel_refuses_another_length():
    refuse(ValueError, lambda: some_space().unravel(jnp.ones(5)), "unravel", "[..., 4]", "[5]")
    refuse(ValueError, lambda: some_space().unravel(jnp.ones(())), "unravel", "[..., 4]", "[]")


@pytest.mark.parametrize("points", [0, -1, 2.5, True])
def test_grid_needs_a_count(points):
    refuse(ValueError, lambda: some_space().grid(points), "grid", "`points`", ">= 1", repr(points))


def test_fan_out_needs_a_size():
    s = some_space()
    call = lambda: s.fan_out(jax.random.key(0), s.init(), 0, 0.1)
    refuse(ValueError, call, "fan_out", "`size`", ">= 1", "got 0")


# ----------------------------------------------------------------------------- factories

step = lambda state, hparams, batch: state
loss = lambda params, hparams, batch: jnp.zeros(())
response = lambda hparams, carry, batches: (carry, carry)
init = lambda params, hparams: params
explore = lambda key, hparams: hparams
prox = hj.prox.non_negative()
fitted = hj.implicit(response, hj.stationary(loss))
tuner = hj.tune(hj.score_only(response, loss, init), optax.sgd(0.1))


def amortize(**changes):
    exact = hj.Preconditioner(lambda matvec, like: (), lambda state, v: v)
    options = {"preconditioner": exact, "solve": lambda p: hj.linsolve.cg(), "refresh": 5}
    return hj.amortize(fitted, loss, init, **{**options, **changes})


NOT_CALLABLE = {
    "inner loss": (lambda: hj.inner(3, optax.sgd), "inner", "`loss`"),
    "inner optimizer": (lambda: hj.inner(loss, optax.sgd(0.1)), "inner", "`optimizer`"),
    "stationary": (lambda: hj.stationary(None), "stationary", "`loss`"),
    "unroll": (lambda: hj.unroll(hj.inner(loss, optax.sgd)), "unroll", "`step`"),
    "implicit response": (lambda: hj.implicit(3, loss), "implicit", "`response`"),
    "implicit optimality": (lambda: hj.implicit(response, "x"), "implicit", "`optimality`"),
    "implicit solve": (lambda: hj.implicit(response, loss, solve="cg"), "implicit", "`solve`"),
    "fixed_point": (lambda: hj.fixed_point(3), "fixed_point", "`map`"),
    "iterate": (lambda: hj.iterate(3), "iterate", "`map`"),
    "proximal loss": (lambda: hj.proximal(3, prox, 0.1), "proximal", "`loss`"),
    "proximal prox": (lambda: hj.proximal(loss, 3, 0.1), "proximal", "`prox`"),
    "proximal_descent": (lambda: hj.proximal_descent(loss, 3, 0.1), "proximal_descent", "`prox`"),
    "lasso": (lambda: hj.prox.lasso(0.1), "lasso", "`weight`"),
    "elastic_net": (lambda: hj.prox.elastic_net(abs, 0.1), "elastic_net", "`l2`"),
    "box lower": (lambda: hj.prox.box(0.0, abs), "box", "`lower`"),
    "box upper": (lambda: hj.prox.box(abs, 1.0), "box", "`upper`"),
    "warm_start score": (lambda: hj.warm_start(fitted, 3, init), "warm_start", "`score`"),
    "warm_start init": (lambda: hj.warm_start(fitted, loss, 3), "warm_start", "`init`"),
    "amortize solve": (lambda: amortize(solve=3), "amortize", "`solve`"),
    "best_response apply": (lambda: hj.best_response(3, response), "best_response", "`apply`"),
    "best_response train": (lambda: hj.best_response(loss, 3), "best_response", "`train`"),
    "hypergradient response": (
        lambda: hj.hypergradient(3, loss, init),
        "hypergradient",
        "`response`",
    ),
    "hypergradient score": (
        lambda: hj.hypergradient(response, 3, init),
        "hypergradient",
        "`score`",
    ),
    "hypergradient init": (
        lambda: hj.hypergradient(response, loss, 3),
        "hypergradient",
        "`init`",
    ),
    "score_only response": (lambda: hj.score_only(3, loss, init), "score_only", "`response`"),
    "score_only score": (lambda: hj.score_only(response, 3, init), "score_only", "`score`"),
    "score_only init": (lambda: hj.score_only(response, loss, 3), "score_only", "`init`"),
    "truncation": (lambda: hj.exchange.truncation(0.2, 3), "truncation", "`explore`"),
    "tournament": (lambda: hj.exchange.tournament(3), "tournament", "`explore`"),
}


NOT_A_PAIR = {
    "amortize preconditioner": (
        lambda: amortize(preconditioner=hj.linsolve.jacobi),
        "amortize",
        "`preconditioner`",
    ),
    "tune estimator": (lambda: hj.tune(response, optax.sgd(0.1)), "tune", "`estimator`"),
    "tune optimizer": (
        lambda: hj.tune(hj.hypergradient(response, loss, init), optax.sgd),
        "tune",
        "`optimizer`",
    ),
    "population tuner": (
        lambda: hj.population(response, hj.exchange.isolation()),
        "population",
        "`tuner`",
    ),
    "population exchange": (
        lambda: hj.population(tuner, hj.exchange.isolation),
        "population",
        "`exchange`",
    ),
}


@pytest.mark.parametrize("name", NOT_A_PAIR)
def test_pairs_of_functions_must_be_whole(name):
    call, where, argument = NOT_A_PAIR[name]
    refuse(TypeError, call, f"{where}: ", argument, "must have functions", "got ")


@pytest.mark.parametrize("name", NOT_CALLABLE)
def test_functions_must_be_functions(name):
    call, where, argument = NOT_CALLABLE[name]
    refuse(TypeError, call, f"{where}: ", argument, "must be a function", "got ")


VALUES = {
    "checkpoint word": (
        lambda: hj.unroll(step, checkpoint="log"),
        ("unroll", "`checkpoint`", "'sqrt'", "'binomial'", "'log'"),
    ),
    "checkpoint zero": (
        lambda: hj.unroll(step, checkpoint=0),
        ("unroll", "`checkpoint`", ">= 1", "got 0"),
    ),
    "checkpoint float": (
        lambda: hj.unroll(step, checkpoint=2.5),
        ("unroll", "`checkpoint`", "got 2.5"),
    ),
    "checkpoint bool": (
        lambda: hj.unroll(step, checkpoint=True),
        ("unroll", "`checkpoint`", "got True"),
    ),
    "truncate zero": (
        lambda: hj.unroll(step, truncate=0),
        ("unroll", "`truncate`", ">= 1", "got 0"),
    ),
    "truncate float": (
        lambda: hj.unroll(step, truncate=1.0),
        ("unroll", "`truncate`", ">= 1", "got 1.0"),
    ),
    "mode": (
        lambda: hj.hypergradient(response, loss, init, mode="backward"),
        ("hypergradient", "`mode`", "'reverse'", "'forward'", "'backward'"),
    ),
    "cg maxiter": (lambda: hj.linsolve.cg(maxiter=0), ("cg", "`maxiter`", ">= 1", "got 0")),
    "cg tol": (lambda: hj.linsolve.cg(tol=-1.0), ("cg", "`tol`", ">= 0", "-1.0")),
    "cg tol nan": (lambda: hj.linsolve.cg(tol=NAN), ("cg", "`tol`", ">= 0", "nan")),
    "cg damping": (lambda: hj.linsolve.cg(damping=-0.1), ("cg", "`damping`", ">= 0", "-0.1")),
    "neumann terms": (lambda: hj.linsolve.neumann(0, 0.1), ("neumann", "`terms`", ">= 1", "got 0")),
    "neumann scale": (
        lambda: hj.linsolve.neumann(3, 0.0),
        ("neumann", "`scale`", "positive", "0.0"),
    ),
    "neumann scale nan": (
        lambda: hj.linsolve.neumann(3, NAN),
        ("neumann", "`scale`", "positive", "nan"),
    ),
    "convexity zero": (
        lambda: hj.implicit(response, loss, convexity=0.0),
        ("implicit", "`convexity`", "positive", "0.0"),
    ),
    "convexity nan": (
        lambda: hj.implicit(response, loss, convexity=NAN),
        ("implicit", "`convexity`", "positive", "nan"),
    ),
    "rate": (lambda: hj.proximal(loss, prox, -1.0), ("proximal", "`rate`", "positive", "-1.0")),
    "rate word": (
        lambda: hj.proximal_descent(loss, prox, "0.1"),
        ("proximal_descent", "`rate`", "positive", "'0.1'"),
    ),
    "refresh": (lambda: amortize(refresh=0), ("amortize", "`refresh`", ">= 1", "got 0")),
    "every": (
        lambda: hj.exchange.tournament(explore, every=0),
        ("tournament", "`every`", ">= 1", "got 0"),
    ),
    "chunk zero": (
        lambda: hj.population(tuner, hj.exchange.isolation(), chunk=0),
        ("population", "`chunk`", ">= 1", "got 0"),
    ),
    "chunk word": (
        lambda: hj.population(tuner, hj.exchange.isolation(), chunk="all"),
        ("population", "`chunk`", ">= 1", "'all'"),
    ),
}
for value in (0.0, -0.1, 0.6, 1.5, NAN):
    VALUES[f"fraction {value}"] = (
        lambda value=value: hj.exchange.truncation(value, explore),
        ("truncation", "`fraction`", "(0, 0.5]", repr(value)),
    )


@pytest.mark.parametrize("name", VALUES)
def test_values_must_be_in_range(name):
    call, words = VALUES[name]
    refuse(ValueError, call, *words)


# -------------------------------------------------------------------------- while tracing


def ridge_run(train, **options):
    p = problems.ridge(steps=6)
    respond = hj.unroll(p.inner.step, **options)
    return lambda: jax.eval_shape(respond, p.hparams, p.inner.init(p.params, p.hparams), train)


def test_truncation_longer_than_the_run_is_refused():
    train = problems.ridge(steps=6).split.train
    call = ridge_run(train, truncate=7)
    refuse(ValueError, call, "unroll", "`truncate` is 7", "6 steps", "truncate <= 6")
    ridge_run(train, truncate=6)()


RUNS = {"unroll": hj.unroll, "implicit": lambda step: hj.implicit(hj.unroll(step), loss)}


@pytest.mark.parametrize("name", RUNS)
def test_batches_must_have_a_common_leading_axis(name):
    p = problems.ridge(steps=6)
    carry = p.inner.init(p.params, p.hparams)
    x, y = p.split.train
    call = lambda *train: lambda: jax.eval_shape(RUNS[name](p.inner.step), p.hparams, carry, train)
    refuse(ValueError, call(x, y[:5]), name, "`batches`", "leading axis", "[6, 40, 5]", "[5, 40]")
    refuse(ValueError, call(x, 1.0), name, "`batches`", "leading axis", "[1]: float64[]")
    refuse(ValueError, call(), name, "`batches`", "no leaves", "leading axis")
    refuse(ValueError, call(x[:0], y[:0]), name, "`batches`", "no step", "at least one")


def test_run_needs_a_common_leading_axis():
    p = problems.ridge(steps=2)
    estimator = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    tune = hj.tune(estimator, optax.sgd(0.1))
    state = tune.init(p.params, p.hparams)
    splits = problems.repeat(p.split, 3)
    short = splits._replace(valid=jax.tree.map(lambda x: x[:2], splits.valid))
    refuse(ValueError, lambda: hj.run(tune, state, short), "run", ".train[1]", "[3, 2", "[2, 40")
    none = jax.tree.map(lambda x: x[:0], splits)
    refuse(ValueError, lambda: hj.run(tune, state, none), "run", "no step", "at least one")


OPTIMALITIES = {
    "structure": (lambda w, h, batch: {"w": w}, ("structure of params", "'w'")),
    "shape": (lambda w, h, batch: w[:3], ("float64[3]", "expected float64[5]")),
    "type": (
        lambda w, h, batch: w.astype(jnp.float32),
        ("float32[5]", "expected float64[5]"),
    ),
    "a loss": (lambda w, h, batch: jnp.sum(w), ("float64[]", "expected float64[5]")),
}


@pytest.mark.parametrize("name", OPTIMALITIES)
def test_optimality_must_be_like_params(name):
    optimality, words = OPTIMALITIES[name]
    p = problems.ridge(steps=2)
    respond = hj.implicit(hj.unroll(p.inner.step), optimality)
    carry = p.inner.init(p.params, p.hparams)
    call = lambda: jax.eval_shape(respond, p.hparams, carry, p.split.train)
    refuse(ValueError, call, "implicit", "`optimality`", *words)


@pytest.mark.parametrize("value", [jnp.ones(3), jnp.ones((), int), jnp.ones((), complex)])
def test_losses_and_scores_must_be_real_scalars(value):
    got = f"{value.dtype}[{'3' if value.ndim else ''}]"
    bad = lambda params, hparams, batch: value
    inner = hj.inner(bad, lambda h: optax.sgd(0.1))
    state = inner.init(jnp.ones(2), jnp.ones(()))
    words = ("must return a real scalar", got, "mean or a sum")
    refuse(TypeError, lambda: inner.step(state, jnp.ones(()), None), "inner", "`loss`", *words)
    slope = hj.stationary(bad)
    refuse(TypeError, lambda: slope(jnp.ones(2), 1.0, None), "stationary", "`loss`", *words)
    split = hj.Split(jnp.arange(2), None)
    for make in (hj.hypergradient, hj.score_only):
        estimate = make(response, bad, init).estimate
        call = lambda estimate=estimate: estimate(jnp.ones(()), jnp.ones(2), split)
        refuse(TypeError, call, make.__name__, "`score`", *words)


@pytest.mark.parametrize("name", estimator_zoo.KINDS)
def test_every_estimator_refuses_a_score_that_is_no_scalar(name):
    p = problems.ridge(steps=4)
    estimator = estimator_zoo.KINDS[name].make(p._replace(score=lambda w, h, batch: w))
    call = lambda: estimator.estimate(p.hparams, estimator.init(p.params, p.hparams), p.split)
    refuse(TypeError, call, "`score`", "must return a real scalar", "float64[5]", "mean or a sum")


@pytest.mark.parametrize("name", estimator_zoo.KINDS)
def test_every_estimator_refuses_hparams_that_are_not_floating_point(name):
    p = problems.ridge(steps=4)
    estimator = estimator_zoo.KINDS[name].make(p)
    carry = estimator.init(p.params, p.hparams)
    call = lambda: estimator.estimate(jnp.arange(5), carry, p.split)
    refuse(TypeError, call, "every leaf of `hparams`", "the root is int64[", "floating-point")


INTEGERS = {"a": jnp.ones(2), "b": jnp.ones((), int)}


def test_hparams_must_be_floating_point():
    words = ("`hparams`", "['b'] is int64[]", "floating-point")
    tune = hj.tune(hj.hypergradient(response, loss, init), optax.sgd(0.1))
    refuse(TypeError, lambda: tune.init(jnp.ones(2), INTEGERS), "tune", *words)
    refuse(TypeError, lambda: tune.init(jnp.ones(2), {"a": 1.0, "b": 3}), "tune", "['b'] is int")
    estimate = hj.hypergradient(response, loss, init).estimate
    call = lambda: estimate(INTEGERS, jnp.ones(2), hj.Split(jnp.arange(2), None))
    refuse(TypeError, call, "hypergradient", *words)


def test_params_must_be_floating_point():
    inner = hj.inner(loss, lambda h: optax.sgd(0.1))
    call = lambda: inner.init(INTEGERS, jnp.ones(()))
    refuse(TypeError, call, "inner", "`params`", "['b'] is int64[]", "floating-point")


def test_estimates_must_fit_hparams():
    estimate = lambda h, carry, split: (hj.Estimate(jnp.zeros(()), h["a"], ()), carry)
    tune = hj.tune(hj.Estimator(init, estimate), optax.sgd(0.1))
    state = tune.init((), {"a": jnp.ones(2)})
    refuse(ValueError, lambda: tune.step(state, None), "tune", "`Estimate.grad`", "structure")


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "kind", [float, np.float32, np.float64, np.asarray, jnp.float32, jnp.bfloat16, jnp.asarray]
)
def test_numbers_of_every_kind_are_looked_at(kind):
    hj.linsolve.cg(tol=kind(0.5))
    refuse(ValueError, lambda: hj.linsolve.cg(tol=kind(-1.5)), "cg", "`tol`", "finite", "-1.5")
    refuse(ValueError, lambda: hj.linsolve.cg(tol=kind(np.nan)), "cg", "`tol`", "finite", "nan")
    rtho = lambda decay: hj.online.rtho(lambda s, h, b: s, loss, init, decay=decay)
    rtho(kind(0.5))
    refuse(ValueError, lambda: rtho(kind(1.5)), "rtho", "`decay`", "[0, 1]", "1.5")


def test_what_is_no_number_is_refused_and_what_is_traced_is_not():
    for bad in (
        True,
        np.bool_(True),
        jnp.asarray(True),
        "1",
        1j,
        np.asarray(1j),
        np.ones(1),
        [1.0],
    ):
        refuse(ValueError, lambda bad=bad: hj.linsolve.cg(tol=bad), "cg", "`tol`", repr(bad))
    jax.jit(lambda tol: (hj.linsolve.cg(tol=tol), tol)[1])(-1.0)


# ------------------------------------------------------------------------- populations


def start(params, hparams, mesh=None):
    pop = hj.population(tuner, hj.exchange.isolation(), mesh=mesh)
    return lambda: pop.init(jax.random.key(0), params, hparams)


def test_populations_must_have_members():
    empty = start(jnp.ones((0, 3)), jnp.ones((0,)))
    refuse(ValueError, empty, "population", "no members", "at least one")
    refuse(
        ValueError,
        start({"w": jnp.ones((4, 3))}, {"lr": jnp.ones(5)}),
        "population",
        "leading axis",
        "['w']: float64[4, 3]",
        "['lr']: float64[5]",
    )
    refuse(ValueError, start(jnp.ones((4, 3)), 0.1), "population", "leading axis", "[]")


@pytest.mark.parametrize(("size", "better"), [(12, "8 or 16"), (5, "8"), (17, "16 or 24")])
def test_members_must_be_divided_by_the_devices(size, better):
    call = start(jnp.ones((size, 3)), jnp.ones(size), problems.mesh("member"))
    refuse(ValueError, call, "population", f"{size} members", "8 devices", f"take {better} members")
    start(jnp.ones((16, 3)), jnp.ones(16), problems.mesh("member"))()
