"""Forecasts: bytes of arguments, outputs and what lies between, and the size that still fits."""

from typing import Any

import cli_runs
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType

import hyperjax as hj
from hyperjax.app import _memory, _program, _tune
from hyperjax.app._errors import AppError
from hyperjax.app._folder import create
from hyperjax.app._output import silent
from hyperjax.app._settings import make_settings
from hyperjax.app._signals import Stop


def shapes(*lengths: int):
    return tuple(jax.ShapeDtypeStruct((n,), jnp.float32) for n in lengths)


def test_bytes_are_those_of_the_arrays():
    found = hj.forecast(lambda x, y: jnp.sum(x) * y, shapes(1000, 500))
    assert found.argument_bytes == 4 * 1500
    assert found.output_bytes == 4 * 500
    assert found.aliased_bytes == 0
    assert found.total_bytes == 4 * 2000 + found.temporary_bytes + found.code_bytes


def test_donated_arguments_count_once():
    step = lambda x: x + 1.0
    plain = hj.forecast(step, shapes(1000))
    donated = hj.forecast(step, shapes(1000), donate=(0,))
    assert donated.aliased_bytes == 4000
    assert plain.total_bytes - donated.total_bytes == 4000
    jitted = jax.jit(step, donate_argnums=0)
    assert hj.forecast(jitted, shapes(1000)) == donated
    with pytest.raises(ValueError, match=r"jitted already; got `donate` \(0,\) beside it"):
        hj.forecast(jitted, shapes(1000), donate=(0,))


def test_temporaries_are_what_a_program_must_hold():
    # A product of two matrices of n^2 entries goes into a sum: n^2 entries in between.
    n = 200
    square = jax.ShapeDtypeStruct((n, n), jnp.float32)
    found = hj.forecast(lambda a, b: jnp.sum(jnp.sin(a @ b)), (square, square))
    assert 4 * n * n <= found.temporary_bytes <= 3 * 4 * n * n
    assert found.output_bytes == 4


def counted(bytes_of):
    """A forecast made up, and the sizes for which it was asked."""
    asked = []

    def forecast_of(n):
        asked.append(n)
        return hj.Forecast(0, 0, 0, bytes_of(n), 0)

    return forecast_of, asked


@pytest.mark.parametrize("memory", [101, 5_000, 123_456, 999_999])
def test_the_largest_size_is_named(memory):
    forecast_of, asked = counted(lambda n: 100 + 7 * n)
    largest = (memory - 100) // 7
    if largest == 0:
        with pytest.raises(MemoryError, match="not even 1 fits"):
            hj.largest_fit(forecast_of, 10**6, memory)
        return
    with pytest.raises(MemoryError, match=f"the largest that fits is {largest:,}, with"):
        hj.largest_fit(forecast_of, 10**6, memory)
    assert len(asked) <= 5  # bytes are linear
    assert hj.largest_fit(forecast_of, largest, memory).size == largest


def test_the_largest_size_among_multiples_and_along_a_curve():
    forecast_of, asked = counted(lambda n: n * n)
    with pytest.raises(MemoryError, match="the largest that fits is 96, with 9,216"):
        hj.largest_fit(forecast_of, 800, 10_000, multiple=8)
    assert all(n % 8 == 0 for n in asked)
    with pytest.raises(ValueError, match=r"multiple of 8; got 801\. Take 800"):
        hj.largest_fit(forecast_of, 801, 10_000, multiple=8)


def test_the_largest_population_of_a_real_program():
    estimate = lambda h, w, data: (hj.Estimate(jnp.sum(w**2) * h, h, ()), 0.9 * w)
    tuner = hj.tune(hj.Estimator(lambda params, h: params, estimate), optax.sgd(0.1))
    pop = hj.population(tuner, hj.exchange.isolation(), chunk=1)

    def forecast_of(size):
        arrays = jax.ShapeDtypeStruct((size, 1000), jnp.float64), *shapes(size)
        state = jax.eval_shape(pop.init, jax.random.key(0), *arrays)
        return hj.forecast(pop.step, (state, None), donate=(0,))

    limit = 2**20
    with pytest.raises(MemoryError, match="the largest that fits is") as caught:
        hj.largest_fit(forecast_of, 1000, limit)
    size = int(str(caught.value).split("fits is ")[1].split(",")[0])
    assert 55 <= size <= 131  # 8 kB of weights each, after a step beside those before it
    assert forecast_of(size).total_bytes <= limit < forecast_of(size + 1).total_bytes


# ------------------------------------------------------------------------------- the command


def test_a_run_that_does_not_fit_is_refused_before_it_begins(monkeypatch, tmp_path):
    names: dict = {}
    exec(cli_runs.TASK, names)
    compiled = []

    def compile_program(task, method, settings, mesh):
        compiled.append(settings.members)
        forecast = hj.Forecast(0, 0, 0, 100 + 7 * settings.members, 0)
        layout: Any = None
        never = lambda *_: pytest.fail("it ran")
        return _program.Program(never, never, 0.0, forecast, layout)

    for module in (_tune, _memory):
        monkeypatch.setattr(module, "compile_program", compile_program)
    settings = make_settings({"task": "ridge", "members": 300, "seeds": 2}, [])
    folder = create(tmp_path / "run", settings, "tune")
    mesh = jax.make_mesh((4,), ("member",), (AxisType.Auto,), devices=jax.devices()[:4])

    def refused(memory, mesh, message):
        monkeypatch.setattr(_tune, "device_memory", lambda mesh: memory)
        with pytest.raises(AppError, match=message):
            _tune.tune(folder, settings, names["ridge"], mesh, silent(), Stop())

    refused(1000, None, r"^300 members in .* 2 studies take 2\.1 KiB .*are --members 128\. Fewer")
    assert len(compiled) <= 5
    refused(2199, None, "are --members 299")
    with pytest.raises(pytest.fail.Exception, match="it ran"):
        refused(2200, None, "refused")
    refused(1004, mesh, "the most that fit are --members 128")  # a multiple of four
    refused(105, None, "not even 1 fit")
    assert not (folder / "metrics.jsonl").exists()


def test_devices_of_a_machine_share_its_memory():
    whole = _memory.device_memory(None)
    assert 2**20 < whole < 2**50
    assert _memory.device_memory(jax.make_mesh((4,), ("member",))) == whole // 4
