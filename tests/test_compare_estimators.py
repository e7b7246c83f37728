"""`compare_estimators` measures what it says, names what does not apply, and recommends by rule."""

import functools
import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from PIL import Image

import hyperjax as hj
from hyperjax.app import (
    CONTESTANTS,
    Contestant,
    _cli,
    _contest_show,
    _study,
    compare_estimators,
    main,
)
from hyperjax.app._contest_rule import (
    Accuracy,
    Cost,
    Row,
    accuracy,
    draws_needed,
    duration,
    recommend,
)
from hyperjax.app._contest_show import footnotes, parse_bytes
from hyperjax.app._errors import AppError
from hyperjax.tasks import Task


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Programs are compiled without optimizations: these tests wait for the compiler alone."""
    monkeypatch.setattr(jax, "jit", problems.jit)


def named(*names):
    found = tuple(c for c in CONTESTANTS if c.name in names)
    assert len(found) == len(names)
    return found


def ridge(with_rate: bool = False, optimizer=None) -> Task:
    """`problems.ridge`: raw values are its hyperparameters; beside them perhaps a learning rate."""
    p = problems.ridge()
    ranges = {"l2": hj.real(shape=(problems.FEATURES,), init=np.asarray(p.hparams))}
    if with_rate:
        ranges["lr"] = hj.positive(init=0.6)
    train = problems.last(p.split.train)
    rate = (lambda h: h["lr"]) if with_rate else (lambda h: 0.6)
    return Task(
        name="ridge",
        init=lambda key: jax.random.normal(key, (problems.FEATURES,)),
        loss=lambda w, h, batch: p.loss(w, h["l2"], batch),
        score=lambda w, h, batch: p.score(w, h["l2"], batch),
        space=hj.space(ranges),
        optimizer=optimizer or (lambda h: optax.sgd(rate(h))),
        batches=lambda key, steps: problems.repeat(train, steps),
        whole=lambda key: train,
        valid=p.split.valid,
        test=p.split.valid,
        evaluate=lambda w, batch: {"loss": jnp.mean((batch[0] @ w - batch[1]) ** 2)},
    )


# ---- from estimates to numbers ----------------------------------------------------------------


LEAVES = {"a": slice(0, 2), "b": slice(2, 3)}


def test_accuracy_is_bias_deviation_and_blindness(rng):
    reference = np.array([3.0, 0.0, 4.0]) + 0.1 * rng.normal(size=(400, 3))
    own = rng.normal(size=(400, 3)) * 0.5
    found = accuracy(reference + own + [0.0, 1.0, 0.0], reference, LEAVES, 1e-16)
    # |mean| = 5. The bias is 1, its standard error sqrt(3 x 0.25 / 400), each estimate deviates by
    # sqrt(3 x 0.26); the tolerances are four standard errors of what 400 draws leave to chance.
    assert abs(found.bias - 0.2) < 4 * 0.5 / 20 / 5
    assert abs(found.bias_error - 0.75**0.5 / 20 / 5) < 4e-4
    assert abs(found.deviation - 0.78**0.5 / 5) < 0.02
    assert abs(found.cosine - 25 / (5 * 26**0.5)) < 0.01
    assert abs(found.leaves["a"] - 1 / 3) < 0.04 and found.leaves["b"] < 0.03
    assert found.finite == 400 and found.blind == () and found.seen == found.bias

    blind = accuracy(reference * [1.0, 1.0, 0.0], reference, LEAVES, 1e-16)
    assert blind.blind == ("b",) and blind.seen == 0 and abs(blind.bias - 0.8) < 0.01
    # What is rounding in the reference, one cannot be blind to.
    tiny = reference * [1.0, 1.0, 1e-15]
    assert accuracy(tiny * [1.0, 1.0, 0.0], tiny, LEAVES, 1e-16).blind == ()

    broken = reference.copy()
    broken[7, 1] = np.nan
    found = accuracy(broken, reference, LEAVES, 1e-16)
    assert found.finite == 399 and math.isnan(found.bias) and math.isnan(found.leaves["a"])
    one = accuracy(reference[:1], reference[:1], LEAVES, 1e-16)
    assert one.bias == 0 and one.deviation == math.inf


def row(
    name,
    bias=0.0,
    deviation=0.0,
    seconds: float | None = 1.0,
    blind=(),
    refused="",
    memory: int | None = 10,
) -> Row:
    found = Accuracy(bias, 0.001, 1.0, deviation, 4, {}, blind, bias)
    cost = Cost(seconds, 1.0, memory)
    return Row(name, name, "", refused, None if refused else found, cost, {})


def chosen(*rows: Row) -> str | None:
    return recommend(rows, 0.1).name


def test_recommendation_by_its_rule():
    exact, slow = row("exact"), row("slow", seconds=2.0)
    assert chosen(slow, exact) == "exact"
    # Cheaper and biased below the tolerance: taken, unless it is hardly cheaper.
    assert chosen(exact, row("biased", bias=0.09, seconds=0.7)) == "biased"
    assert chosen(exact, row("biased", bias=0.09, seconds=0.9)) == "exact"
    assert chosen(exact, row("biased", bias=0.11, seconds=0.1)) == "exact"
    # What is blind, refused (too large among that), or not finite takes no part.
    assert chosen(exact, row("blind", bias=0.01, seconds=0.1, blind=("lr",))) == "exact"
    assert chosen(exact, row("large", seconds=0.1, refused="needs 3 GiB")) == "exact"
    assert chosen(exact, row("nan", bias=math.nan, seconds=0.1)) == "exact"
    # Noise counts by the estimates it takes: 0.8^2 / 0.1^2 = 64 of 0.01 s, or of 0.1 s.
    assert draws_needed(row("noisy", deviation=0.8), 0.1) == 64
    assert draws_needed(row("both", bias=0.06, deviation=0.8), 0.1) == 100
    assert chosen(exact, row("noisy", deviation=0.8, seconds=0.01)) == "noisy"
    assert chosen(exact, row("noisy", deviation=0.8, seconds=0.1)) == "exact"


def test_rounding_is_no_bias():
    reference = row("reference", seconds=1.2)  # its own bias is exactly zero
    assert chosen(reference, row("other", bias=3e-7)) == "other"
    assert chosen(reference, row("other", bias=0.9e-3)) == "other"
    assert chosen(reference, row("other", bias=1.1e-3)) == "reference"
    # Of what is left the cheapest, whose memory may be larger; at one price the smallest.
    small = row("small", bias=2e-7, memory=5)
    assert chosen(reference, small, row("large", bias=1e-7, seconds=0.99)) == "large"
    assert chosen(row("large", bias=1e-7), row("unknown", memory=None), small) == "small"
    assert "a bias below 0.001 counts as none" in recommend([reference], 0.1).rule


def test_recommendation_when_nobody_passes():
    worse, better = row("worse", bias=0.9), row("better", bias=0.5, blind=("lr",))
    found = recommend([worse, better], 0.1)
    assert found.name == "better" and "blind to lr" in found.reason and "0.5" in found.reason
    assert recommend([row("alone", bias=0.0, deviation=math.inf)], 0.1).name == "alone"
    nothing = recommend([row("nan", bias=math.nan), row("off", refused="no")], 0.1)
    assert nothing.name is None and "no estimator" in nothing.reason
    assert all("0.1" in r.rule and "least biased" in r.rule for r in (found, nothing))


# ---- on a problem with a closed form ------------------------------------------------------------


def by_name(found) -> dict[str, Any]:
    return {r.name: r for r in found.rows}


def test_every_contestant_runs_or_says_why():
    """The long one: it compiles them all. Ridge converges, so most know its gradient exactly."""
    found = compare_estimators(ridge(), draws=2, budget=2**20)
    rows = by_name(found)
    assert {name for name, r in rows.items() if r.refused} == {"score function", "reversible"}
    assert rows["planned"].info["chosen"].startswith("reverse mode, ")
    assert "without a derivative" in rows["score function"].refused
    expected = np.linalg.norm(
        problems.ridge_answers(problems.ridge().hparams, problems.ridge().split).gradient
    )
    assert abs(found.reference.norm - expected) < 1e-12 * expected
    exact = [c.name for c in CONTESTANTS if c.exact]
    solved = ["implicit, cg", "implicit, jacobi cg", "implicit, minres", "implicit, dense", "rtho"]
    for name in exact + solved:  # 60 steps, or the fifth product, leave nothing but rounding
        assert rows[name].accuracy.bias < 1e-12, name
    # 20 terms or 15 steps leave 0.5^20 or 0.5^15 of the indirect part; one step half of it.
    assert 1e-12 < rows["implicit, neumann"].accuracy.bias < 0.5**20
    assert 1e-12 < rows["unroll, last quarter"].accuracy.bias < 0.5**15
    assert 0.01 < rows["unroll, last step"].accuracy.bias < 0.5
    assert rows["implicit, damped cg"].accuracy.bias > 1e-3
    assert (
        rows["implicit, cg"].info["residual"] < 1e-12 < rows["implicit, neumann"].info["residual"]
    )
    # Started three times from the last solution, five products each: as good as fifteen.
    assert rows["warm start, cg"].accuracy.bias < 1e-6
    for name in ("antithetic", "spsa", "persistent", "noise reuse"):
        noisy = rows[name].accuracy
        assert noisy.deviation > 0.1 and noisy.bias < 6 * noisy.bias_error + 0.1, name
    for r in rows.values():
        assert r.refused or (r.cost.seconds > 0 and r.cost.bytes > 0 and r.cost.compile_seconds > 0)
    json.dumps(found.as_json(), allow_nan=False)


@functools.cache
def short():
    names = ("unroll", "forward", "unroll, last step", "implicit, cg", "persistent")
    return compare_estimators(ridge(True), steps=6, draws=3, contestants=named(*names))


def test_what_implicit_differentiation_is_blind_to():
    found = short()
    rows = by_name(found)
    assert rows["implicit, cg"].accuracy.blind == ("lr",)
    assert rows["implicit, cg"].accuracy.leaves["lr"] == 1
    assert rows["implicit, cg"].accuracy.leaves["l2"] < 0.1
    assert rows["unroll, last step"].accuracy.blind == ()
    assert found.recommendation.name in ("unroll", "forward")
    assert "multiple of 4 steps" in rows["persistent"].refused
    text = "\n".join(footnotes(found))
    assert "implicit, cg: differentiates a solution, not the run; blind to lr" in text
    assert "not compared: persistent: cuts training" in text
    assert f"recommended: {found.recommendation.name}" in text and "rule: " in text


def test_a_budget_leaves_out_what_is_larger():
    sizes = {name: r.cost.bytes for name, r in by_name(short()).items() if r.cost}
    assert sizes["unroll"] < sizes["forward"]
    # In this order forward mode would be the reference; what does not fit is not even run.
    few = named("forward", "unroll")[::-1]
    budget = sizes["forward"] - 1
    found = compare_estimators(ridge(True), steps=6, draws=1, budget=budget, contestants=few)
    rows = by_name(found)
    assert found.reference.name == found.recommendation.name == "unroll"
    assert "above the budget" in rows["forward"].refused and rows["forward"].cost.seconds is None
    with pytest.raises(AppError, match=r"no exact hypergradient .* \(needs .* above the budget"):
        compare_estimators(ridge(True), steps=6, budget=16, contestants=named("unroll"))


def test_warm_up_goes_before():
    """After a hundred steps the last six of training are at the solution: lr has no effect left."""
    warm = compare_estimators(
        ridge(True), steps=6, draws=2, warmup=100, contestants=named("unroll", "implicit, cg")
    )
    rows = by_name(warm)
    cold = by_name(short())["implicit, cg"].info["stationarity"]
    assert rows["implicit, cg"].info["stationarity"] < 1e-12 < cold
    assert rows["implicit, cg"].accuracy.blind == ()


# ---- what goes wrong is said --------------------------------------------------------------------


@jax.custom_vjp
def reverse_only(x):
    return jnp.sum(x**2) / 2


reverse_only.defvjp(lambda x: (reverse_only(x), x), lambda x, ct: (ct * x,))


def test_a_task_without_forward_mode():
    task = ridge()
    plain = task.loss
    task = task._replace(loss=lambda w, h, batch: plain(w, h, batch) + 0.1 * reverse_only(w))
    rows = by_name(
        compare_estimators(
            task, steps=4, draws=2, contestants=named("unroll", "forward", "implicit, cg")
        )
    )
    assert "TypeError" in rows["forward"].refused and "custom_vjp" in rows["forward"].refused
    assert not rows["unroll"].refused and not rows["implicit, cg"].refused


def test_a_task_whose_hypergradient_is_not_finite():
    """Adam's is not where a gradient entry is exactly 0, and one feature here has no data."""
    task = ridge(optimizer=lambda h: optax.adam(0.1))
    idle = lambda w, h, batch: jnp.mean((batch[0] @ (w * jnp.arange(5.0)) - batch[1]) ** 2)
    task = task._replace(
        loss=lambda w, h, batch: idle(w, h, batch) + jnp.sum(h["l2"][1:] * w[1:] ** 2)
    )
    found = compare_estimators(task, steps=4, draws=2, contestants=named("unroll"))
    assert found.reference.finite == 0 and found.recommendation.name is None
    assert "not finite on any draw" in found.rows[0].refused
    text = "\n".join(footnotes(found))
    assert "NOT FINITE: unroll on 2 of 2 draws" in text and "hyperjax check" in text
    assert found.as_json()["reference"]["norm"] is None


def test_an_estimator_that_is_not_finite_is_shown_as_such():
    def broken(case, memory):
        grad = jax.tree.map(lambda x: x * jnp.nan, case.raw)
        return hj.Estimate(jnp.zeros(()), grad, ())

    mine = Contestant("mine", "mine()", broken)
    found = compare_estimators(ridge(), steps=4, draws=2, contestants=(*named("unroll"), mine))
    rows = by_name(found)
    assert rows["mine"].accuracy.finite == 0 and math.isnan(rows["mine"].accuracy.bias)
    assert "mine: NOT FINITE, except on 0 draws" in footnotes(found)[1]
    assert found.recommendation.name == "unroll"
    assert found.as_json()["rows"][1]["accuracy"]["bias"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be an integer >= 1; got 0"),
        ({"draws": 0}, "`draws` must be"),
        ({"warmup": -1}, "`warmup` must be an integer >= 0"),
        ({"tolerance": 1.0}, "`tolerance` must be below 1"),
        ({"budget": 0}, "`budget` must be"),
        ({"precision": "half"}, "'task', 'float64'; got 'half'"),
        ({"contestants": ()}, "none was entered"),
        ({"contestants": 2 * CONTESTANTS[:1]}, "different names"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(AppError, match=re.escape(message)):
        compare_estimators(ridge(), **options)
    with pytest.raises(AppError, match="unknown task 'digts'"):
        compare_estimators("digts")


def test_float64_on_request():
    with jax.enable_x64(False):
        task = ridge()
        few = named("unroll", "forward")
        double = compare_estimators(task, steps=4, draws=1, contestants=few, precision="float64")
        assert jnp.ones(()).dtype == jnp.float32
    assert double.precision == "float64"
    assert by_name(double)["forward"].accuracy.bias < 1e-14  # float32 leaves 1e-7


# ---- the command ---------------------------------------------------------------------------------


FEW = named("unroll", "implicit, cg", "score function")


@pytest.fixture
def few(monkeypatch):
    """The command with three contestants, since it has no option to choose them."""
    plain = _contest_show.compare_estimators
    choose = lambda task, **options: plain(task, **options, contestants=FEW)
    monkeypatch.setattr(_contest_show, "compare_estimators", choose)
    monkeypatch.setattr(_cli, "_prepare_jax", lambda args: None)
    monkeypatch.setattr(_study, "get", lambda name, data_dir: ridge())


def test_command_as_json(few, capsys, tmp_path):
    folder = tmp_path / "out"
    options = ["--steps", "4", "--draws", "2", "--budget", "1GiB", "--json", "--out", str(folder)]
    assert main(["estimators", "m:ridge", *options]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["budget"] == 2**30 and report["steps"] == 4
    assert [r["name"] for r in report["rows"]] == [c.name for c in FEW]
    assert report["recommendation"]["name"] in ("unroll", "implicit, cg")
    assert report["rows"][0]["draws_needed"] == 1 and report["rows"][0]["seconds_needed"] > 0
    assert report["files"] == [str(folder / "estimators.json"), str(folder / "estimators.png")]
    stored = json.loads((folder / "estimators.json").read_text())
    assert stored == {k: v for k, v in report.items() if k != "files"}
    pixels = np.asarray(Image.open(folder / "estimators.png").convert("RGB"))
    assert pixels.shape[1] == 1200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_command_as_text(few, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["estimators", "m:ridge", "--steps", "4", "--draws", "2"]) == 0
    out, err = capsys.readouterr()
    assert 'plots need matplotlib: pip install "hyperjax[demo]"' in err
    lines = out.splitlines()
    assert lines[0].startswith("ridge: gradient of the score after 4 steps, 2 draws")
    assert lines[1].split()[:3] == ["estimator", "bias", "cosine"]
    assert sum(" * " in line for line in lines) == 1
    (written,) = [line for line in lines if line.startswith("written: ")]
    assert written.startswith("written: runs/ridge-estimators-") and written.endswith(".json")


def test_command_refuses(few, capsys):
    for options in (["--budget", "12 parsecs"], ["--budget", "0"], ["--steps", "0"]):
        assert main(["estimators", "m:ridge", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 3 and "512MiB; got '12 parsecs'" in err


def test_bytes():
    sizes = {"1000": 1000, "2KiB": 2048, "1.5 kb": 1536, "3M": 3 * 2**20, "1g": 2**30}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    assert (duration(2.5), duration(0.0025), duration(2.5e-6)) == ("2.5 s", "2.5 ms", "2.5 µs")


# ---- the table that is generated from it ---------------------------------------------------------


@pytest.fixture
def which_method(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("which_method")


def test_the_page_has_the_table_of_the_committed_result(which_method):
    page, result = which_method.PAGE.read_text(), json.loads(which_method.RESULT.read_text())
    assert which_method.with_table(page, result) == page
    measured = {row["name"] for row in result["problems"]["digits"]["rows"]}
    assert measured == {c.name for c in CONTESTANTS}, "run benchmarks/which_method.py again"
    assert all(f"\n| {name} |" in page for name in ("unroll", "implicit, cg", "antithetic"))


def test_the_result_says_what_the_page_says(which_method):
    problems = json.loads(which_method.RESULT.read_text())["problems"]
    digits, pixels = (
        {row["name"]: row for row in problems[name]["rows"]} for name in ("digits", "pixels")
    )
    # A beginning of training has no solution to differentiate, and the rate is out of reach.
    assert digits["implicit, cg"]["accuracy"]["blind"] == ["lr", "momentum"]
    assert digits["implicit, cg"]["accuracy"]["bias"] > 0.9
    seen = lambda name: digits[name]["accuracy"]["seen"]
    assert max(seen("implicit, damped cg"), seen("implicit, neumann")) < seen("implicit, cg")
    # Where training nearly converges implicit differentiation is right, cheaper and smaller.
    solved, unrolled = pixels["implicit, cg"], pixels["unroll"]
    assert solved["accuracy"]["bias"] < 0.1 and solved["accuracy"]["blind"] == []
    assert solved["cost"]["seconds"] < unrolled["cost"]["seconds"]
    assert 10 * solved["cost"]["bytes"] < unrolled["cost"]["bytes"]
    assert pixels["implicit, damped cg"]["accuracy"]["bias"] > 0.5
    assert pixels["antithetic"]["accuracy"]["deviation"] > 1
    for rows in (digits, pixels):
        for name in (c.name for c in CONTESTANTS if c.exact):
            found = rows[name]["accuracy"]
            assert found is None or found["bias"] < 1e-4, name  # float32
