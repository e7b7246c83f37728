"""`hyperjax check` passes good tasks and finds planted faults, by name and step."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import hyperjax as hj
from hyperjax.app._check import check, forecast, look_at_end
from hyperjax.app._check_finite import Doctor
from hyperjax.app._check_gradient import check_gradient, plateau
from hyperjax.app._check_problem import make_point, make_problem
from hyperjax.app._errors import AppError
from hyperjax.app._output import Output
from hyperjax.tasks import Task, check_task

CURVATURES = np.array([1.0, 2.0, 4.0])


# ---- tiny tasks -------------------------------------------------------------------------------


def quadratic(params, hparams, batch):
    """Convex; `b` moves only by its penalty, so from 0 its gradient is exactly 0."""
    pull = jnp.sum(CURVATURES * (params["w"] - batch) ** 2)
    return (pull + hparams["l2"] * (jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2))) / 2


def distance(params, hparams, batch):
    return (jnp.sum((params["w"] - batch) ** 2) + jnp.sum(params["b"] ** 2)) / 2


def sgd(hparams):
    return optax.sgd(hparams["lr"])


def tiny(loss=quadratic, score=distance, optimizer=sgd, lr=0.3, w=0.5, dtype=jnp.float64) -> Task:
    """Three weights that follow a noisy target, and two idle ones."""
    target = jnp.asarray([1.0, -1.0, 0.5], dtype)

    def batches(key, steps):
        return target[None] + 1e-3 * jax.random.normal(key, (steps, 3), dtype)

    return Task(
        name="tiny",
        init=lambda key: {"w": jnp.full(3, w, dtype), "b": jnp.zeros(2, dtype)},
        loss=loss,
        score=score,
        space=hj.space({"lr": hj.positive(init=lr), "l2": hj.loguniform(1e-3, 1.0, init=0.1)}),
        optimizer=optimizer,
        batches=batches,
        whole=lambda key: target,
        valid=target + 1,
        test=target + 1,
        evaluate=lambda params, batch: {"loss": distance(params, {}, batch)},
    )


def examine(task: Task, steps: int = 3, where: str = "initial"):
    problem, point = make_problem(task), make_point(task, steps, 0)
    return Doctor(problem, point).examine(where, point.raw)


def gradients(task: Task, steps: int = 3):
    return check_gradient(make_problem(task), make_point(task, steps, 0), 1, 0)


@jax.custom_vjp
def half_square(x):
    return jnp.sum(x**2) / 2


# The derivative is x; this rule says 1.1 x.
half_square.defvjp(lambda x: (half_square(x), x), lambda x, ct: (1.1 * ct * x,))


def run_as_json(capsys, task: Task, steps: int) -> tuple[int, dict]:
    """The exit code of `check`, and the one JSON object that it writes."""
    out = Output(as_json=True, notes=Console(file=io.StringIO()))
    code = check(task, out, steps=steps)
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    return code, json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# ---- check ------------------------------------------------------------------------------------


def test_check_passes_a_good_task(capsys):
    code, report = run_as_json(capsys, check_task(tiny()), steps=30)
    assert code == 0 and report["ok"]
    assert report["gradient"]["precision"] == "float64"
    assert report["gradient"]["error"] < 1e-8 and report["gradient"]["notes"] == []
    names = [row["direction"] for row in report["gradient"]["rows"]]
    assert names == ["loss", "score", *(f"hyperparameters {i}" for i in (1, 2, 3))]
    assert all(row["forward"] is not None and row["settled"] for row in report["gradient"]["rows"])
    assert report["finite"] == []
    assert report["convergence"]["implicit_trusted"]
    assert report["convergence"]["implicit_blind_to"] == ["lr"]
    assert report["convergence"]["curvature"] >= 1.1 - 1e-9  # the smallest, and the penalty
    assert [m["method"] for m in report["memory"]][-2:] == ["forward", "implicit"]
    assert all(m["bytes"] > 0 for m in report["memory"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gradients_are_checked_in_float64_in_any_process(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        report = gradients(tiny(dtype=dtype))
        assert jnp.ones(()).dtype == dtype
    assert report.ok and report.precision == "float64" and report.error < 1e-8


def test_float32_inside_the_task_widens_the_tolerance():
    def single(params, hparams, batch):
        w = params["w"].astype(jnp.float32)
        return quadratic({"w": w, "b": params["b"]}, hparams, batch)

    report = gradients(tiny(single))
    assert report.ok and report.precision == "float32"
    assert report.tolerance == pytest.approx(np.finfo(np.float32).eps ** (1 / 3))
    assert "float32" in report.notes[0]


def test_a_task_that_refuses_float64_is_checked_in_float32():
    offset = jnp.ones(3, jnp.float32)

    def strict(params, hparams, batch):
        # lax does not promote: float64 beside float32 raises.
        moved = jax.lax.sub(params["w"], offset)
        return jnp.sum(moved**2) / 2 + hparams["l2"] * jnp.sum(params["w"] ** 2)

    report = gradients(tiny(strict, dtype=jnp.float32, lr=0.01))
    assert report.ok and report.precision == "float32"
    assert "refuses float64" in report.notes[0]


@pytest.mark.parametrize("wrong", ["loss", "score"])
def test_a_wrong_custom_gradient_is_suspicious(wrong):
    def loss(params, hparams, batch):
        return half_square(params["w"] - batch) + hparams["l2"] * jnp.sum(params["w"] ** 2)

    task = tiny(loss=loss) if wrong == "loss" else tiny(score=lambda p, h, b: loss(p, h, b))
    report = gradients(task)
    rows = {row.direction: row for row in report.rows}
    assert not report.ok
    assert not rows[wrong].ok and rows[wrong].settled and rows[wrong].error > 1e-2
    assert rows["score" if wrong == "loss" else "loss"].ok
    assert rows[wrong].forward is None and "forward" in report.notes[0]
    # Wrong training has a right derivative; a wrong score spoils that of every hyperparameter.
    assert rows["hyperparameters 1"].ok == (wrong == "loss")
    assert ("l2" in rows) == (wrong == "score")


def test_a_wrong_gradient_gives_exit_code_1_and_says_where():
    def score(params, hparams, batch):
        return half_square(params["w"] - batch)

    file = io.StringIO()
    assert check(tiny(score=score), Output(console=Console(file=file)), steps=2, directions=1) == 1
    text = file.getvalue()
    assert "gradients, through 2 steps: SUSPICIOUS" in text
    assert any(line.startswith("score ") and "differs" in line for line in text.splitlines())
    assert "not possible: " in text  # forward mode, in the table of memory


def test_hyperparameters_without_effect_are_named():
    report = gradients(tiny(loss=lambda p, h, b: quadratic(p, {"l2": 0.1}, b)))
    assert report.ok and report.unused == ["l2"]


def test_plateau_of_a_known_derivative():
    steps = 0.2 / 4.0 ** np.arange(10)
    value, error, step = plateau(np.exp(steps) - np.exp(-steps), steps)
    assert value == pytest.approx(1.0, abs=1e-10) and error < 1e-9 and step in steps


def test_plateau_ignores_differences_that_round_to_zero():
    steps = 0.2 / 4.0 ** np.arange(12)
    rough = 3.0 + 1e-3 * (-1.0) ** np.arange(12)
    differences = np.where(np.arange(12) < 6, 2 * rough * steps, 0.0)
    assert plateau(differences, steps)[0] == pytest.approx(3.0, rel=1e-2)


def test_plateau_of_a_jump_does_not_settle():
    steps = 0.2 / 4.0 ** np.arange(8)
    value, error, _ = plateau(np.ones(8), steps)  # a step function at its step
    assert error > 0.5 * abs(value)


def test_adam_without_eps_root_is_named():
    adam = lambda h: optax.adam(h["lr"])
    loss = lambda p, h, b: quadratic(p, h, b) - h["l2"] * jnp.sum(p["b"] ** 2) / 2
    found = examine(tiny(loss, optimizer=adam))
    assert found is not None and not found.expected
    assert (found.kind, found.step, found.cause) == ("meta-gradient", 1, "adam")
    assert found.leaves == ["params['b']"]
    assert "pass eps_root=1e-8 to optax.adam" in found.text
    assert "2 entries of exactly 0" in found.text
    assert examine(tiny(loss, optimizer=lambda h: optax.adam(h["lr"], eps_root=1e-8))) is None


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda h: optax.amsgrad(h["lr"]),
        lambda h: optax.rmsprop(h["lr"], eps_in_sqrt=False),
    ],
)
def test_another_root_of_squares_is_not_called_adam(optimizer):
    found = examine(tiny(optimizer=optimizer))
    assert found is not None and (found.cause, found.leaves) == ("root", ["params['b']"])


def test_the_norm_of_a_gradient_of_zero_is_named():
    clipped = lambda h: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(h["lr"]))

    def flat(params, hparams, batch):
        # Everything at its minimum from the start.
        return hparams["l2"] * (jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2))

    found = examine(tiny(flat, optimizer=clipped, w=0.0))
    assert found is not None and (found.step, found.cause) == (1, "norm")
    assert "clip_by_global_norm" in found.text
    assert examine(tiny(flat, w=0.0)) is None


def test_a_diverging_learning_rate_is_diagnosed_with_its_step(capsys):
    quartic = lambda p, h, b: jnp.sum(p["w"] ** 4) / 4
    w, step = np.full(3, 0.5), 1
    with np.errstate(over="ignore"):
        while np.isfinite(np.sum(w**4)):  # the same training, in NumPy
            w, step = w - 50.0 * w**3, step + 1
    code, report = run_as_json(capsys, tiny(quartic, lr=50.0), steps=step + 3)
    assert code == 1 and not report["ok"]
    initial = report["finite"][0]
    assert (initial["where"], initial["kind"], initial["cause"]) == (
        "initial",
        "training",
        "diverged",
    )
    # The cube of the weights may overflow one step before their fourth power is looked at.
    assert initial["step"] in (step - 1, step)
    assert "lr=50" in initial["setting"] and "learning rate" in initial["text"]
    assert report["convergence"] is None


def test_divergence_far_from_the_initial_setting_is_expected():
    quartic = lambda p, h, b: jnp.sum(p["w"] ** 4) / 4
    found = examine(tiny(quartic, lr=50.0), 12, where="sampled 1")
    assert found is not None and found.cause == "diverged" and found.expected


def test_a_root_at_zero_in_the_loss_is_named():
    norm = lambda p, h, b: quadratic(p, h, b) + jnp.sqrt(jnp.sum(p["b"] ** 2))
    found = examine(tiny(norm))
    assert found is not None
    assert (found.kind, found.step, found.cause) == ("training", 1, "kink")
    assert found.leaves == ["params['b']"] and "square root" in found.text


def test_a_logarithm_of_zero_is_not_called_divergence():
    def flags(key, steps):
        return jnp.where(jnp.arange(steps) == 2, 0.0, 1.0)  # the third batch has a zero

    task = tiny(lambda p, h, b: jnp.sum(p["w"] ** 2) - jnp.log(b), lr=0.1)
    found = examine(task._replace(batches=flags), 5)
    assert found is not None and not found.expected
    assert (found.kind, found.step, found.cause) == ("training", 3, "loss")
    assert "logarithm" in found.text


def test_overflow_of_float32_is_found_where_float64_is_fine(capsys):
    large = lambda p, h, b: quadratic(p, h, b) + 1e-39 * jnp.exp(90 + 1e-3 * p["w"][0])
    code, report = run_as_json(capsys, tiny(large, dtype=jnp.float32), steps=3)
    assert report["gradient"]["verdict"] == "ok" and report["gradient"]["precision"] == "float64"
    found = [(f["where"], f["step"], f["cause"]) for f in report["finite"]]
    assert ("initial", 1, "loss") in found and code == 1


def test_an_optimizer_that_divides_by_zero_is_named():
    unit = lambda g: g / jnp.sqrt(jnp.sum(g**2))
    normalized = optax.stateless(lambda grads, params: jax.tree.map(unit, grads))
    found = examine(tiny(optimizer=lambda h: optax.chain(normalized, optax.sgd(h["lr"]))))
    assert found is not None
    assert (found.kind, found.step, found.cause) == ("training", 1, "update")
    assert found.leaves == ["params['b']"]


def test_a_loss_without_a_second_derivative_is_named():
    power = lambda p, h, b: quadratic(p, h, b) + h["l2"] * jnp.sum(jnp.abs(p["b"]) ** 1.5)
    found = examine(tiny(power))
    assert found is not None
    assert (found.kind, found.cause, found.leaves) == (
        "meta-gradient",
        "loss-kink",
        ["params['b']"],
    )


def test_a_root_at_zero_in_the_score_is_named():
    norm = lambda p, h, b: distance(p, h, b) + jnp.sqrt(jnp.sum(p["b"] ** 2))
    found = examine(tiny(score=norm))
    assert found is not None and (found.kind, found.cause) == ("meta-gradient", "score")


def test_a_derivative_that_explodes_is_told_from_a_fault():
    wild = lambda p, h, b: jnp.sum(jnp.cos(1e40 * p["w"])) / 1e40 + 0 * h["l2"]
    found = examine(tiny(wild, lr=1.0), 12)
    assert found is not None and (found.kind, found.cause) == ("meta-gradient", "explodes")
    assert found.step > 3


def test_indefinite_and_unfinished_training_is_not_trusted():
    saddle = lambda p, h, b: quadratic(p, h, b) - 3 * p["w"][0] ** 2
    for loss, reason in ((saddle, "indefinite"), (quadratic, "not converged")):
        problem, point = make_problem(tiny(loss, lr=1e-3)), make_point(tiny(), 2, 0)
        seen = look_at_end(problem, point, Doctor(problem, point).end())
        assert not seen["implicit_trusted"] and reason in seen["text"]
        assert (seen["curvature"] < 0) == (loss is saddle)


def test_memory_is_forecast_without_running_and_falls_with_checkpoints():
    task = tiny()
    big = task._replace(
        init=lambda key: {"w": jnp.ones((1000, 3)), "b": jnp.zeros(2)},
        loss=lambda p, h, b: jnp.sum(jnp.sin(p["w"] * h["l2"]) * b[None, :]),
        score=lambda p, h, b: jnp.sum(p["w"] ** 2),
    )
    found = forecast(make_problem(big), make_point(big, 100, 0))
    seen = {m.method: m.bytes for m in found if m.bytes is not None}
    assert len(seen) == len(found) == 5
    states = 100 * 1000 * 3 * 8
    assert seen["reverse"] > states
    assert seen['reverse, checkpoint="sqrt"'] < seen["reverse"] / 2
    assert seen['reverse, checkpoint="binomial"'] < seen["reverse"] / 2
    assert max(seen["forward"], seen["implicit"]) < seen["reverse"] / 2


def test_check_refuses_no_steps():
    with pytest.raises(AppError) as error:
        check(tiny(), Output(), steps=0)
    assert "at least one step" in str(error.value) and "\n" not in str(error.value)
