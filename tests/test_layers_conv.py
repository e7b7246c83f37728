"""Convolutions by products: XLA's own in value and derivatives, under every transformation."""

# pyright: reportArgumentType=false
# Wrong types are the point of the refusals.

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from hyperjax.layers import conv, conv_general_dilated

# Sums of at most 36 terms, in another order: a few of float64's rounding errors of 2e-16 each, and
# after two derivatives of a sine sums of some hundred such.
RTOL = 1e-12
NUMBERS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=RTOL * max(1.0, float(jnp.abs(b).max())))


def data(rng, space, groups, members=()):
    """x [5, *odd sizes, 6] and kernels [..., *window, 6 / groups, 12 / groups in each]."""
    sizes, window = (7, 5, 6)[:space], (3, 2, 2)[:space]
    x = jnp.asarray(rng.normal(size=(2, *sizes, 6)))
    return x, jnp.asarray(rng.normal(size=(*members, *window, 6 // groups, 12)))


def product(space):
    """All of a small product: paddings, strides, dilations, groups (the last is depthwise)."""
    pads = ["SAME", "VALID", "SAME_LOWER", ((2, 1), (-1, 2), (0, 1))[:space]]
    kinds = pads, (1, (2, 1, 3)[:space]), (1, (2, 1, 2)[:space]), (1, 2, 6)
    return [(p, s, d, g) for p, s, d, g in itertools.product(*kinds)]


def truth(x, kernel, padding, strides, dilation, groups):
    space = kernel.ndim - 2
    each = lambda value: (value,) * space if isinstance(value, int) else value
    return lax.conv_general_dilated(
        x,
        kernel,
        each(strides),
        padding,
        rhs_dilation=each(dilation),
        dimension_numbers=NUMBERS[space],
        feature_group_count=groups,
    )


def ours(x, kernel, padding, strides, dilation, groups, implementation="auto"):
    options = {"padding": padding, "strides": strides, "dilation": dilation, "groups": groups}
    return conv(x, kernel, **options, implementation=implementation)


def scalar(apply, *options):
    """A nonlinear function of the outputs that tells each from the others."""

    def weighed(x, kernel):
        y = apply(x, kernel, *options)
        return jnp.sum(jnp.sin(y) * jnp.reshape(jnp.cos(jnp.arange(y.size)), y.shape))

    return weighed


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("space", [1, 2])
def test_values_over_the_product(rng, space, groups):
    x, kernel = data(rng, space, groups)
    options = [o for o in product(space) if o[-1] == groups]
    by = lambda apply, *way: jax.jit(lambda: [apply(x, kernel, *o, *way) for o in options])()
    expected = by(truth)
    close(by(ours), expected)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradients(rng, groups):
    x, kernel = data(rng, 2, groups)
    options = (((2, 1), (-1, 2)), (2, 1), (1, 2), groups)
    gradient = lambda *a: jax.jit(jax.grad(scalar(*a), argnums=(0, 1)))(x, kernel)
    close(gradient(ours, *options), gradient(truth, *options))


@pytest.mark.parametrize("implementation", ["auto", "xla", "patches"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_values_in_three_dimensions_and_by_every_implementation(rng, groups, implementation):
    x, kernel = data(rng, 3, groups)
    options = ("SAME", (2, 1, 1), (1, 2, 1), groups)
    close(ours(x, kernel, *options, implementation), truth(x, kernel, *options))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_second_derivatives_in_either_order(rng, groups):
    x, kernel = data(rng, 2, groups)
    options = ("SAME", (2, 1), 1, groups)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (x, kernel))

    def products(apply):
        gradient = jax.grad(scalar(apply, *options), argnums=(0, 1))
        dot = lambda x, k: sum(map(jnp.vdot, gradient(x, k), direction))
        return jax.grad(dot, argnums=(0, 1))(x, kernel), jax.jvp(gradient, (x, kernel), direction)[
            1
        ]

    expected, also = jax.jit(lambda: products(truth))()
    close(also, expected)
    close(jax.jit(lambda: products(ours))(), (expected, expected))


AXES = {"kernel": (None, 0), "x": (0, None), "both": (0, 0)}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("over", AXES)
def test_under_vmap_and_per_example_gradients(rng, over, groups):
    x, kernels = data(rng, 2, groups, (3,))
    xs = jnp.stack([x, 2 * x, x - 1])
    options = ("SAME", 1, 1, groups)
    arguments = (xs if AXES[over][0] == 0 else x, kernels if AXES[over][1] == 0 else kernels[0])
    take = lambda i: [
        a[i] if axis == 0 else a for a, axis in zip(arguments, AXES[over], strict=True)
    ]
    gradient = lambda apply: jax.value_and_grad(scalar(apply, *options), argnums=(0, 1))
    alone = jax.jit(gradient(truth))
    expected = jax.tree.map(lambda *a: jnp.stack(a), *[alone(*take(i)) for i in range(3)])
    close(jax.jit(jax.vmap(gradient(ours), AXES[over]))(*arguments), expected)
    # The same from outside: the gradient of what is vmapped.
    total = lambda *a: jnp.sum(jax.vmap(scalar(ours, *options), AXES[over])(*a))
    outside = jax.jit(jax.grad(total, argnums=(0, 1)))(*arguments)
    summed = [g if axis == 0 else g.sum(0) for g, axis in zip(expected[1], AXES[over], strict=True)]
    close(outside, tuple(summed))


def test_a_population_of_populations_in_a_scan(rng):
    x, kernels = data(rng, 1, 1, (2, 3))

    def train(kernel, x):
        step = lambda k, _: (k - 0.1 * jax.grad(scalar(ours, "SAME", 1, 1, 1), 1)(x, k), None)
        return lax.scan(step, kernel, length=3)[0]

    got = jax.jit(jax.vmap(jax.vmap(train, (0, None)), (0, None)))(kernels, x)
    alone = jax.jit(jax.grad(scalar(truth, "SAME", 1, 1, 1), 1))
    for index in np.ndindex(2, 3):
        kernel = kernels[index]
        for _ in range(3):
            kernel = kernel - 0.1 * alone(x, kernel)
        close(got[index], kernel)


def test_inside_shard_map(rng):
    # Members over devices, checks on; x is the same everywhere, so its gradient adds up over them.
    x, kernels = data(rng, 2, 2, (8,))
    mesh = jax.make_mesh((8,), ("members",), axis_types=(AxisType.Auto,))
    spread, same = PartitionSpec("members"), PartitionSpec()

    def gradients(apply):
        loss = scalar(apply, "SAME", 1, 1, 2)
        return jax.vmap(jax.grad(loss, 1), (None, 0))

    one_step = lambda x, k: (
        gradients(ours)(x, k),
        lax.psum(ours(x, k[0], "SAME", 1, 1, 2), "members"),
    )
    mapped = jax.shard_map(one_step, mesh=mesh, in_specs=(same, spread), out_specs=(spread, same))
    at_kernels, summed = jax.jit(mapped)(x, kernels)
    close(at_kernels, gradients(truth)(x, kernels))
    close(summed, truth(x, kernels.sum(0), "SAME", 1, 1, 2))
    total = lambda x: jnp.sum(mapped(x, kernels)[1] ** 2)
    plain = lambda x: jnp.sum(truth(x, kernels.sum(0), "SAME", 1, 1, 2) ** 2)
    close(jax.jit(jax.grad(total))(x), jax.grad(plain)(x))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_no_convolution_in_the_program_of_a_population(rng, groups):
    x, kernels = data(rng, 2, groups, (4,))

    def text(apply):
        gradient = jax.grad(scalar(apply, "SAME", 1, 1, groups), argnums=(0, 1))
        return jax.jit(jax.vmap(gradient, (None, 0))).lower(x, kernels).as_text()

    assert f"feature_group_count = {4 * groups}" in text(truth)
    assert "convolution" not in text(ours)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("groups", [1, 6])
def test_types_are_kept(rng, dtype, groups):
    x, kernel = jax.tree.map(lambda a: a.astype(dtype), data(rng, 2, groups))
    y, pull = jax.jit(lambda: jax.vjp(lambda *a: conv(*a, groups=groups), x, kernel))()
    assert {a.dtype for a in (y, *jax.eval_shape(pull, y))} == {jnp.dtype(dtype)}
    x, kernel = x.astype(jnp.float64), kernel.astype(jnp.float64)
    same = lambda x, kernel: truth(x, kernel, "SAME", 1, 1, groups)
    # One rounding to dtype, and before it at most one in float32 for each of 36 terms and its sum.
    bound = (jnp.finfo(dtype).eps + 72 * jnp.finfo(jnp.float32).eps) * same(abs(x), abs(kernel))
    assert (abs(y - same(x, kernel)) <= bound).all()


def test_leading_axes_are_examples(rng):
    x, kernel = data(rng, 2, 1)
    close(conv(x[0], kernel), conv(x, kernel)[0])
    close(conv(x[None], kernel), conv(x, kernel)[None])
    assert conv(x[:0], kernel).shape == (0, *x.shape[1:-1], 12)


# ----------------------------------------------------------- the arguments of lax's convolution

GENERAL = {
    "defaults": (("NCHW", "OIHW", "NCHW"), {}),
    "dilated": (("NCHW", "OIHW", "NCHW"), {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2)}),
    "mixed orders": (("HNCW", "WOIH", "CWNH"), {"lhs_dilation": (3, 2)}),
    "groups": (("NHWC", "HWIO", "NCHW"), {"feature_group_count": 2}),
    "depthwise": (("NHWC", "OHWI", "HWNC"), {"feature_group_count": 6, "precision": "highest"}),
}


@pytest.mark.parametrize("name", GENERAL)
def test_general_arguments_are_those_of_lax(rng, name):
    order, options = GENERAL[name]
    groups = options.get("feature_group_count", 1)
    x, kernel = data(rng, 2, groups)
    x = jnp.transpose(x, ["NHWC".index(letter) for letter in order[0]])
    kernel = jnp.transpose(kernel, ["HWIO".index(letter) for letter in order[1]])
    numbers = None if name in ("defaults", "dilated") else order
    arguments = ((2, 1), ((1, 2), (-1, 3)))

    def gradient(apply):
        f = lambda x, k: apply(x, k, *arguments, dimension_numbers=numbers, **options)
        y, pull = jax.vjp(f, x, kernel)
        return y, pull(jnp.cos(y))

    both = jax.jit(lambda: [gradient(f) for f in (conv_general_dilated, lax.conv_general_dilated)])
    close(*both())


@pytest.mark.parametrize("groups", [1, 6])
def test_a_wider_type_can_be_asked_for(rng, groups):
    x, kernel = jax.tree.map(lambda a: a.astype(jnp.bfloat16), data(rng, 1, groups))
    wide = {"preferred_element_type": jnp.float32, "feature_group_count": groups}
    numbers = {"dimension_numbers": NUMBERS[1]}
    y = conv_general_dilated(x, kernel, (1,), "SAME", **numbers, **wide)
    expected = truth(x.astype(jnp.float64), kernel.astype(jnp.float64), "SAME", 1, 1, groups)
    assert y.dtype == jnp.float32
    # Products of two bfloat16 are exact in float32; sums of 18 are not, to 18 roundings.
    size = float(jnp.abs(expected).max())
    np.testing.assert_allclose(y, expected, atol=18 * 1.2e-7 * size)


# -------------------------------------------------------------------------------- refusals

ones = lambda *shape: jnp.ones(shape)
general = lambda **options: conv_general_dilated(
    ones(1, 2, 6), ones(4, 2, 3), (1,), **{"padding": "SAME", **options}
)
REFUSALS = {
    "conv: the kernel [*window, in / groups, out] is float64[5, 4], expected 3 to 5 axes": lambda: (
        conv(ones(5), ones(5, 4))
    ),
    "conv: the kernel [*window, in / groups, out] is float64[0, 2, 4], expected no axis": lambda: (
        conv(ones(6, 2), ones(0, 2, 4))
    ),
    "conv: the input [..., *space, in] is float64[6, 3], expected 1 axes": lambda: conv(
        ones(6, 3), ones(3, 2, 4)
    ),
    "conv: the kernel [*window, in / groups, out] is float64[3, 1, 3], expected a last axis": (
        lambda: conv(ones(6, 2), ones(3, 1, 3), groups=2)
    ),
    "conv: the kernel is float32, expected the dtype of the input, float64": lambda: conv(
        ones(6, 2), jnp.ones((3, 2, 4), jnp.float32)
    ),
    "conv: `groups` must be an integer >= 1; got 0": lambda: conv(
        ones(6, 2), ones(3, 2, 4), groups=0
    ),
    "conv: `strides` is (1, 1), expected an integer >= 1 or 1 of them": lambda: conv(
        ones(6, 2), ones(3, 2, 4), strides=(1, 1)
    ),
    "conv: `padding` is 'FULL', expected one of 'SAME'": lambda: conv(
        ones(6, 2), ones(3, 2, 4), padding="FULL"
    ),
    "conv: the window reaches over (5,), further than `x` with its padding, (4,)": lambda: conv(
        ones(4, 2), ones(3, 2, 4), dilation=2, padding="VALID"
    ),
    "conv: `implementation` must be one of 'auto', 'xla', 'patches'; got 'fft'": (
        lambda: conv(ones(6, 2), ones(3, 2, 4), implementation="fft")
    ),
    "conv_general_dilated: `batch_group_count` must be 1; got 2. Take `jax.lax": (
        lambda: general(batch_group_count=2)
    ),
    "conv_general_dilated: `out_sharding` must be None; got": lambda: general(
        out_sharding=PartitionSpec()
    ),
    "conv_general_dilated: `padding` must be pairs of integers where `lhs_dilation` is more": (
        lambda: general(lhs_dilation=(2,))
    ),
    "conv_general_dilated: `lhs` and `rhs` need as many axes as each other; got float64[6, 2]": (
        lambda: conv_general_dilated(ones(6, 2), ones(3, 2, 4), (1,), "SAME")
    ),
    "conv_general_dilated: the input [..., *space, in] is float64[1, 6, 2], expected 1 axes": (
        lambda: general(feature_group_count=2)
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(ValueError) as caught:
        REFUSALS[message]()
    assert message in str(caught.value)
