"""What runs is read from the lowered program; kernels lower for machines that are not here.

The public ops ask for the machine's own backend, so lowering for another one starts below them. It
ends where Triton's or Mosaic's compiler would begin: no tile is proved to fit a chip by this.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from problems import mesh

from hyperjax.kernels import Sgd, population_apply, vector_update
from hyperjax.kernels import _gated_dense as gated
from hyperjax.kernels import _gated_dense_cases as gated_cases
from hyperjax.kernels import _vector_update as vector

# The platform to lower for, the name of its kernels here, and what they are in a program.
TARGETS = {"cuda": ("gpu", "__gpu$xla.gpu.triton"), "tpu": ("tpu", "@tpu_custom_call")}
LAYER = gated_cases.CASES["forward"]
UPDATE = vector.CASES["conjugate gradients"]

platforms = pytest.mark.parametrize("platform", TARGETS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def arguments(case, shape, dtype, *members: int):
    """Types instead of arrays: nothing is computed, and so nothing is too large."""
    types = jax.eval_shape(lambda: case.make(jax.random.key(0), shape, dtype))
    return tuple(jax.ShapeDtypeStruct((*members, *t.shape), t.dtype) for t in types)


def layer(platform: str, backward: str = "xla", activation=None) -> Callable:
    return partial(gated._by_kernel, TARGETS[platform][0], backward, activation)


def update(platform: str) -> Callable:
    return partial(vector._by_kernel, TARGETS[platform][0])


def slopes(f: Callable, count: int) -> Callable:
    loss = lambda *args: sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(f(*args)))
    return jax.grad(loss, range(count))


def lowered(platform: str, f: Callable, args: tuple) -> tuple[int, int]:
    """How many kernels of that platform a program has, and how many products of XLA's."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return text.count(TARGETS[platform][1]), text.count("stablehlo.dot_general")


def everything(module) -> dict:
    return {**module.SHAPES, **module.LARGE}


@platforms
@dtypes
@pytest.mark.parametrize("shape", everything(gated).values(), ids=everything(gated))
def test_gated_dense(platform, dtype, shape):
    args = arguments(LAYER, shape, dtype)
    assert lowered(platform, layer(platform, activation=jax.nn.relu), args) == (1, 0)
    # One kernel that keeps what the gate multiplies, then four products of XLA's, or two kernels.
    assert lowered(platform, slopes(layer(platform), 6), args) == (1, 4)
    assert lowered(platform, slopes(layer(platform, "kernel"), 6), args) == (3, 0)


@platforms
@dtypes
@pytest.mark.parametrize("shape", everything(vector).values(), ids=everything(vector))
def test_vector_update(platform, dtype, shape):
    args = arguments(UPDATE, shape, dtype)
    assert lowered(platform, update(platform), args) == (1, 0)
    both = lambda *args: (update(platform)(*args), slopes(update(platform), 5)(*args))
    # The derivative is XLA's and needs nothing of the kernel, so there is still only one.
    assert lowered(platform, both, args)[0] == 1


@platforms
@pytest.mark.parametrize("backward", ["xla", "kernel"])
def test_members_of_members(platform, backward):
    twice = lambda f: jax.vmap(jax.vmap(f))
    args = arguments(LAYER, gated.SHAPES["ragged"], "float32", 2, 3)
    count = {"xla": (1, 4), "kernel": (3, 0)}[backward]
    assert lowered(platform, twice(slopes(layer(platform, backward), 6)), args) == count
    args = arguments(UPDATE, vector.SHAPES["ragged"], "float32", 2, 3)
    assert lowered(platform, twice(update(platform)), args) == (1, 0)


@platforms
@pytest.mark.parametrize("backward", ["xla", "kernel"])
def test_members_on_eight_devices(platform, backward):
    """With the checks of types on: each device has the kernel for its own members."""
    on = PartitionSpec("members")
    split = lambda f, specs: jax.shard_map(f, mesh=mesh("members"), in_specs=specs, out_specs=on)
    kernels = {"xla": 1, "kernel": 3}[backward]
    f = layer(platform, backward, jnp.tanh)
    args = arguments(LAYER, (5, 4, 3), "float32", 16)
    members = split(jax.vmap(slopes(f, 6)), on)
    assert lowered(platform, members, args)[0] == kernels
    # Rows on devices and matrices shared: the gradient of those is a sum over devices.
    args = arguments(LAYER, (16, 4, 3), "float32")
    rows = split(f, (on, PartitionSpec(), PartitionSpec(), on, PartitionSpec(), PartitionSpec()))
    text = jax.jit(slopes(rows, 6)).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(TARGETS[platform][1]) == kernels
    assert "all_reduce" in text
    args = arguments(UPDATE, (100,), "float32", 16)
    assert lowered(platform, split(jax.vmap(update(platform)), on), args) == (1, 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about what a CPU does")
@pytest.mark.parametrize("case", [LAYER, UPDATE], ids=["gated_dense", "vector_update"])
def test_on_cpu_auto_is_xla(case):
    shape = {LAYER: (7, 5, 3), UPDATE: (7,)}[case]
    args = case.make(jax.random.key(0), shape, "float32")
    run = lambda name: jax.jit(partial(case.run, name))
    texts = {name: run(name).lower(*args).as_text() for name in ("auto", "xla", "interpret")}
    assert texts["auto"] == texts["xla"] != texts["interpret"]
    jaxprs = {name: str(jax.make_jaxpr(partial(case.run, name))(*args)) for name in texts}
    assert {name: "pallas_call" in text for name, text in jaxprs.items()} == {
        "auto": False,
        "xla": False,
        "interpret": True,
    }
    assert "interpret=True" in jaxprs["interpret"]
    assert not any("custom_call" in text for text in texts.values())
    with pytest.raises(ValueError, match=r"backend 'cpu', expected one of \('gpu', 'tpu'\)"):
        run("pallas").lower(*args)


@platforms
def test_a_kernel_that_was_measured_faster_is_what_auto_takes(platform, monkeypatch):
    """On a machine of that kind, once `FASTER_ON` names it."""
    backend, call = TARGETS[platform]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for module, case, shape in ((gated, LAYER, (7, 5, 3)), (vector, UPDATE, (7,))):
        args = arguments(case, shape, "float32")
        program = lambda name: jax.jit(partial(case.run, name)).trace(*args)  # noqa: B023
        text = lambda name: program(name).lower(lowering_platforms=(platform,)).as_text()  # noqa: B023
        assert call in text("pallas") and call not in text("auto")
        monkeypatch.setattr(module, "FASTER_ON", (backend,))
        assert call in text("auto") and call not in text("xla")
    for run, case, shape in ((LAYER.run, LAYER, (7, 5, 3)), (UPDATE.run, UPDATE, (7,))):
        wide = arguments(case, shape, "float64")
        auto = jax.jit(partial(run, "auto")).trace(*wide)
        assert call not in auto.lower(lowering_platforms=(platform,)).as_text()
        with pytest.raises(ValueError, match="`x` is float64, expected one of"):
            run("pallas", *case.make(jax.random.key(0), shape, "float64"))


@platforms
def test_operands_that_vary_differently(platform, monkeypatch):
    """Over devices: the kernel wants them alike, and so does its derivative."""
    backend, call = TARGETS[platform]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    on, all_alike = PartitionSpec("members"), PartitionSpec()
    total = lambda out: sum(jnp.sum(x) for x in jax.tree.leaves(out))

    def solve(r, x):
        return total(vector_update(x, r, x, r, 0.5, implementation="pallas"))

    def train(params, grads):
        step = partial(population_apply, Sgd(0.1, 0.9), implementation="pallas")
        return total(step(params, grads, (grads,)))

    here, everywhere = (jax.ShapeDtypeStruct((n, 128), "float32") for n in (8, 1))
    for f in (solve, train):

        def both(varying, same, f=f):
            value, slope = jax.jvp(partial(f, varying), (same,), (same,))
            return value[None], slope[None]

        split = jax.shard_map(both, mesh=mesh("members"), in_specs=(on, all_alike), out_specs=on)
        traced = jax.jit(split).trace(here, everywhere)
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()


@platforms
def test_lowers_in_single_precision(platform):
    """As users have it: the other tests are in double precision."""
    with jax.enable_x64(False):
        for f, case, shape in (
            (layer(platform), LAYER, (7, 5, 3)),
            (update(platform), UPDATE, (7,)),
        ):
            args = arguments(case, shape, "float32")
            assert lowered(platform, f, args)[0] == 1
