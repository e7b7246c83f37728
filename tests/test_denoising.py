"""Convex imaging and penalty problems: constants are bounds, operators are what they claim."""

import io
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import jit

import hyperjax as hj
from hyperjax import tasks
from hyperjax.tasks import _data, _denoising, _weight_penalties

needs_data = pytest.mark.skipif(
    not os.environ.get("HYPERJAX_DATA"), reason="set HYPERJAX_DATA to a folder with the data"
)


def picture(rng, *shape) -> jax.Array:
    """Images with an edge and a slope, and a little noise."""
    down, across = np.indices(shape[-2:]) / max(shape)
    clean = 0.3 + 0.3 * (across > 0.4) + 0.2 * down
    return jnp.asarray(clean + 0.05 * rng.normal(size=shape))


def scalars(weight=-2.0, smoothing=-3.0):
    return {"weight": jnp.asarray(weight), "smoothing": jnp.asarray(smoothing)}


def weight_map(rng, height, width):
    return {
        "weight": jnp.asarray(rng.normal(size=(height, width)) - 2.0),
        "smoothing": jnp.asarray(-3.0),
    }


def experts(rng, count=4, size=3):
    return {
        "filters": jnp.asarray(rng.normal(size=(count, size, size))),
        "weight": jnp.asarray(rng.normal(size=count) - 2.0),
        "smoothing": jnp.asarray(rng.normal(size=count) - 2.0),
    }


def rows(rng, count=30, features=6):
    x = jnp.asarray(rng.normal(size=(count, features)))
    return {"x": x, "y": jnp.asarray(rng.integers(0, 3, count), jnp.int32)}


PROBLEMS = ("tv", "tv map", "experts", "penalties")


def problem(name, rng):
    """(problem, params, hparams, batch) in float64."""
    if name == "penalties":
        hparams = jnp.asarray(rng.normal(size=(6, 3)) - 1)
        made = tasks.weight_penalties()
        return made, jnp.asarray(rng.normal(size=(6, 3))), hparams, rows(rng)
    noisy = picture(rng, 2, 7, 6)
    if name == "experts":
        return tasks.fields_of_experts(), noisy, experts(rng), noisy
    hparams = scalars() if name == "tv" else weight_map(rng, 7, 6)
    return tasks.total_variation(), noisy, hparams, noisy


def hessian(made, params, hparams, batch) -> np.ndarray:
    flat = lambda v: made.loss(v.reshape(params.shape), hparams, batch)
    return np.asarray(jit(jax.hessian(flat))(params.ravel()))


# ------------------------------------------------------------------------------- constants


@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenvalues_lie_between_convexity_and_smoothness(name, rng):
    made, params, hparams, batch = problem(name, rng)
    low, high = made.convexity(hparams, batch), made.smoothness(hparams, batch)
    for point in (params, 3 * params**2, jnp.full_like(params, 0.3)):
        eigenvalues = np.linalg.eigvalsh(hessian(made, point, hparams, batch))
        # Rounding of an eigenvalue is that of the largest.
        assert low - 1e-12 * high <= eigenvalues[0] and eigenvalues[-1] <= high * (1 + 1e-12)


def test_bounds_are_not_idle(rng):
    # At a constant image penalties have their largest curvature: experts reach the bound there,
    # and total variation comes as near as grad' grad comes to 8 on an image of that size.
    noisy = jnp.full((1, 8, 9), 0.5)
    hparams = experts(rng)
    made = tasks.fields_of_experts()
    top = np.linalg.eigvalsh(hessian(made, noisy, hparams, noisy))[-1]
    assert abs(top / made.smoothness(hparams, noisy) - 1) < 1e-12
    made = tasks.total_variation()
    top = np.linalg.eigvalsh(hessian(made, noisy, scalars(), noisy))[-1]
    largest = sum(4 * np.sin(np.pi * (n - 1) / (2 * n)) ** 2 for n in (8, 9))
    assert abs(top - (1 + largest * np.exp(-2.0 + 3.0))) < 1e-10
    assert 0.95 * made.smoothness(scalars(), noisy) < top


def test_penalties_bound_is_reached_by_two_equal_classes():
    # With p = (1/2, 1/2) the matrix diag(p) - p p' has the eigenvalue 1/2.
    batch = {"x": jnp.ones((4, 1)), "y": jnp.array([0, 1, 0, 1], jnp.int32)}
    made, hparams = tasks.weight_penalties(), jnp.full((1, 2), -1.0)
    top = np.linalg.eigvalsh(hessian(made, jnp.zeros((1, 2)), hparams, batch))[-1]
    assert abs(top - made.smoothness(hparams, batch)) < 1e-12
    assert made.convexity(hparams, batch) == jnp.exp(-1.0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_power_iteration_stays_below_the_bound(name, rng):
    made, params, hparams, batch = problem(name, rng)
    gradient = lambda p: jax.grad(made.loss)(p, hparams, batch)

    @jit
    def largest(v):
        def step(v, _):
            product = jax.jvp(gradient, (params,), (v,))[1]
            return product / jnp.linalg.norm(product), jnp.linalg.norm(product)

        return jax.lax.scan(step, v / jnp.linalg.norm(v), length=100)[1][-1]

    found = largest(jnp.asarray(rng.normal(size=params.shape)))
    assert made.convexity(hparams, batch) < found <= made.smoothness(hparams, batch)


@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_is_strongly_convex_along_random_segments(name, rng):
    made, params, hparams, batch = problem(name, rng)
    loss = jit(lambda p: made.loss(p, hparams, batch))
    for _ in range(20):
        a, b = (params + jnp.asarray(rng.normal(size=params.shape)) for _ in range(2))
        t = rng.uniform()
        chord = (1 - t) * loss(a) + t * loss(b)
        gap = made.convexity(hparams, batch) * t * (1 - t) * jnp.sum((a - b) ** 2) / 2
        assert loss((1 - t) * a + t * b) <= chord - gap + 1e-12 * abs(chord)


# ------------------------------------------------------------------------------- operators


def test_differences_and_their_transpose_are_those_of_a_loop(rng):
    x = rng.normal(size=(2, 4, 3))
    down, right = _denoising.differences(jnp.asarray(x))
    wanted = np.zeros((2, *x.shape))
    for n, i, j in np.ndindex(x.shape):
        wanted[0][n, i, j] = x[n, i + 1, j] - x[n, i, j] if i < 3 else 0
        wanted[1][n, i, j] = x[n, i, j + 1] - x[n, i, j] if j < 2 else 0
    assert np.allclose(down, wanted[0], atol=1e-15) and np.allclose(right, wanted[1], atol=1e-15)
    # Minus the divergence: what leaves a pixel less what enters it.
    p, q = rng.normal(size=x.shape), rng.normal(size=x.shape)
    (transposed,) = jax.vjp(_denoising.differences, jnp.asarray(x))[1]((p, q))
    p[:, -1], q[:, :, -1] = 0, 0
    divergence = np.diff(p, axis=1, prepend=0) + np.diff(q, axis=2, prepend=0)
    assert np.allclose(transposed, -divergence, atol=1e-14)


def test_correlation_is_that_of_a_loop_and_its_transpose_is_adjoint(rng):
    images, filters = rng.normal(size=(2, 5, 4)), rng.normal(size=(3, 3, 3))
    got = _denoising.correlate(jnp.asarray(images), jnp.asarray(filters)).reshape(3, 2, 5, 4)
    wanted = np.zeros((3, 2, 5, 4))
    for m, n, i, j, a, b in np.ndindex(3, 2, 5, 4, 3, 3):
        wanted[m, n, i, j] += filters[m, a, b] * images[n, (i + a) % 5, (j + b) % 4]
    assert np.allclose(got, wanted, atol=1e-13)
    by_image = lambda x: _denoising.correlate(x, jnp.asarray(filters))
    v = rng.normal(size=(3, 40))
    (back,) = jax.vjp(by_image, jnp.asarray(images))[1](v)
    assert abs(np.sum(got.reshape(3, 40) * v) - np.sum(images * np.asarray(back))) < 1e-12


@pytest.mark.parametrize("size", [2, 7])
def test_cosine_filters_are_orthonormal_without_mean(size):
    filters = tasks.dct_filters(size)
    flat = filters.reshape(len(filters), -1)
    assert filters.shape == (size**2 - 1, size, size)
    assert np.allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-13)
    assert np.allclose(flat.sum(1), 0, atol=1e-13)


def test_spectrum_of_the_cosine_filters_has_the_bound_of_a_tight_frame(rng):
    # sum_i |k_i(frequency)|^2 = size^2 less the constant filter's, which is 0 at some frequencies.
    filters = jnp.asarray(tasks.dct_filters(4))
    hparams = {"filters": filters, "weight": jnp.full(15, -1.0), "smoothing": jnp.full(15, -2.0)}
    bound = tasks.fields_of_experts().smoothness(hparams, jnp.zeros((1, 8, 8)))
    assert abs(bound - (1 + 16 * np.exp(1.0))) < 1e-10


def test_a_mean_of_the_filters_changes_nothing(rng):
    made, noisy, hparams = tasks.fields_of_experts(), picture(rng, 2, 7, 6), experts(rng)
    shifted = {**hparams, "filters": hparams["filters"] + 3.0}
    difference = made.loss(noisy, hparams, noisy) - made.loss(noisy, shifted, noisy)
    assert abs(difference) < 1e-12
    assert jnp.allclose(made.smoothness(hparams, noisy), made.smoothness(shifted, noisy))


def test_small_smoothing_gives_total_variation(rng):
    x = rng.normal(size=(1, 6, 5))
    down, right = np.diff(x, axis=1), np.diff(x, axis=2)
    length = np.hypot(
        np.pad(down, ((0, 0), (0, 1), (0, 0))), np.pad(right, ((0, 0),) * 2 + ((0, 1),))
    )
    exact = 0.5 * np.sum(x**2) + np.exp(-2.0) * np.sum(length)
    loss = lambda s: float(tasks.total_variation().loss(jnp.asarray(x), scalars(-2.0, s), 0 * x))
    errors = np.array([loss(s) - exact for s in (-3.0, -6.0, -12.0)])
    # gamma at the one flat corner, and less than gamma everywhere else
    assert np.all(errors > 0) and np.all(errors <= 30 * np.exp(-2.0 + np.array([-3, -6, -12])))
    assert errors[2] > 0.9 * np.exp(-2.0 - 12.0)


def test_a_constant_map_is_a_scalar_weight(rng):
    made, noisy = tasks.total_variation(), picture(rng, 2, 7, 6)
    flat = {**scalars(), "weight": jnp.full((7, 6), -2.0)}
    assert jnp.allclose(made.loss(noisy, flat, noisy), made.loss(noisy, scalars(), noisy))
    assert made.smoothness(flat, noisy) == made.smoothness(scalars(), noisy)


@pytest.mark.parametrize("name", PROBLEMS[:3])
def test_any_small_smoothing_has_finite_derivatives_in_float32(name, rng):
    """On a flat image, where the square root is at gamma^2, and on one that is not."""
    made, params, hparams, _ = problem(name, rng)
    single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    params, hparams = single((params, hparams))
    at = lambda low: {**hparams, "smoothing": jnp.full_like(hparams["smoothing"], low)}

    @jit
    def derivatives(x, h):
        gradient = lambda x, h: jax.value_and_grad(made.loss, argnums=(0, 1))(x, h, params)
        return jax.jvp(gradient, (x, h), (params, jax.tree.map(jnp.ones_like, h)))

    double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    expected = made.loss(*double((params, at(-100.0), params)))
    for low in (-30.0, -44.0, -60.0, -200.0):
        for x in (jnp.full_like(params, 0.5), params):
            found = derivatives(x, at(low))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        assert np.isfinite(made.smoothness(at(low), params))
        # The value of no smoothing: 2e-13 for gamma is far below the rounding of a sum of 84.
        assert abs(found[0][0] / expected - 1) < 1e-5


# ------------------------------------------------------------------------------ hypergradients


@pytest.mark.parametrize("name", PROBLEMS)
def test_implicit_hypergradient_is_the_central_difference(name, rng):
    made, start, hparams, batch = problem(name, rng)
    target = rows(rng) if name == "penalties" else jnp.asarray(rng.normal(size=start.shape))
    rate = 2 / (made.smoothness(hparams, batch) + made.convexity(hparams, batch))
    inner = hj.inner(made.loss, lambda _: optax.sgd(rate))

    def trained(hparams, state, batches):
        step = lambda s, _: (inner.step(s, hparams, batch), None)
        state = jax.lax.scan(step, state, length=1500)[0]
        return state.params, state

    response = hj.implicit(
        trained, hj.stationary(made.loss), solve=hj.linsolve.cg(maxiter=200, tol=1e-13)
    )
    split = hj.Split(jax.tree.map(lambda x: x[None], batch), target)

    def objective(hparams):
        params, _ = response(hparams, inner.init(start, hparams), split.train)
        return made.score(params, hparams, target)

    gradient = jit(jax.grad(objective))(hparams)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), hparams)
    value = jit(objective)
    move = lambda t: value(jax.tree.map(lambda x, d: x + t * d, hparams, direction))
    step = 1e-5
    difference = (move(step) - move(-step)) / (2 * step)
    exact = sum(
        jnp.sum(g * d)
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    # Third derivatives leave 1e-10 times their size, rounding 1e-16 / 1e-5.
    assert abs(exact) > 1e-6 and abs(difference - exact) < 1e-6 * abs(exact) + 1e-11


@pytest.mark.parametrize("name", PROBLEMS)
def test_settings_vmap_and_float32_stays(name, rng):
    made, params, hparams, batch = problem(name, rng)
    settings = jax.tree.map(lambda x: jnp.stack([x, x - 0.5, x + 0.5]), hparams)
    gradient = jit(lambda h: jax.grad(made.loss, argnums=(0, 1))(params, h, batch))
    together = jax.vmap(gradient)(settings)
    for i in range(3):
        alone = gradient(jax.tree.map(lambda x, i=i: x[i], settings))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert jnp.allclose(a[i], b, rtol=1e-12, atol=1e-13)
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
    params, hparams, batch = map(single, (params, hparams, batch))
    values = [made.loss(params, hparams, batch), made.score(params, hparams, batch)]
    values += [made.smoothness(hparams, batch), made.convexity(hparams, batch)]
    assert [v.dtype for v in values] == [jnp.float32] * 4


# ----------------------------------------------------------------------------------- images


def test_ssim_is_the_mean_over_windows(key):
    clean, noise = jax.random.uniform(key, (2, 2, 13, 12))
    images = 0.7 * clean + 0.3 * noise
    place = jnp.arange(11) - 5
    weights = jnp.exp(-(place[:, None] ** 2 + place[None] ** 2) / 4.5)
    weights = weights / weights.sum()

    def window(a, b):
        mean = lambda x: jnp.sum(weights * x)
        va, vb, both = mean((a - mean(a)) ** 2), mean((b - mean(b)) ** 2), mean(a * b)
        both = both - mean(a) * mean(b)
        light = (2 * mean(a) * mean(b) + 1e-4) / (mean(a) ** 2 + mean(b) ** 2 + 1e-4)
        return light * (2 * both + 9e-4) / (va + vb + 9e-4)

    places = [(i, j) for i in range(3) for j in range(2)]
    cut = lambda x, i, j: x[i : i + 11, j : j + 11]
    for found, image, truth in zip(tasks.ssim(images, clean), images, clean, strict=True):
        every = [window(cut(image, i, j), cut(truth, i, j)) for i, j in places]
        assert jnp.allclose(found, jnp.mean(jnp.stack(every)), rtol=1e-5)
    assert jnp.allclose(tasks.ssim(clean, clean), 1) and jnp.all(tasks.ssim(images, clean) < 0.99)
    assert tasks.ssim(jnp.float32(images), jnp.float32(clean)).dtype == jnp.float32
    with pytest.raises(ValueError, match="at least 11 x 11"):
        tasks.ssim(images[:, :10], clean[:, :10])


def test_psnr_is_its_closed_form_image_by_image():
    clean = jnp.zeros((2, 4, 4))
    images = jnp.stack([jnp.full((4, 4), 0.1), jnp.full((4, 4), 0.01)])
    assert jnp.allclose(tasks.psnr(images, clean), jnp.array([20.0, 40.0]))


def test_noise_has_its_deviation_and_follows_the_key(key):
    clean = jnp.full((4, 64, 64), 0.5)
    noise = tasks.add_noise(key, clean, 0.1) - clean
    count = clean.size
    # five standard errors of a mean and of a variance
    assert abs(noise.mean()) < 5 * 0.1 / count**0.5
    assert abs(noise.var() / 0.01 - 1) < 5 * (2 / count) ** 0.5
    assert jnp.array_equal(noise, tasks.add_noise(key, clean, 0.1) - clean)
    assert not jnp.array_equal(noise, tasks.add_noise(jax.random.key(1), clean, 0.1) - clean)
    assert tasks.add_noise(key, clean.astype(jnp.float32), 0.1).dtype == jnp.float32


def test_crop_is_the_middle():
    images = np.arange(2 * 6 * 8).reshape(2, 6, 8)
    assert np.array_equal(tasks.centre_crop(images, 4), images[:, 1:5, 2:6])
    with pytest.raises(ValueError, match=r"`size` must be at most 6, .* got 7"):
        tasks.centre_crop(images, 7)


def test_mosaics_are_digits_each_once_made_larger():
    images = tasks.digit_mosaics(3, seed=1)
    assert images.shape == (3, 48, 48) and images.min() == 0 and images.max() <= 1
    # Where a fine pixel lies at the centre of a coarse one, it has its value: offset 1 of 3.
    coarse = images.reshape(3, 2, 24, 2, 24)[:, :, 1::3, :, 1::3]
    tiles = coarse.transpose(0, 1, 3, 2, 4).reshape(12, 64)
    pixels = np.load(io.BytesIO(_data.embedded(_data.DIGITS)))["images"].reshape(-1, 64) / 16
    rows = [np.flatnonzero(np.abs(pixels - tile).max(1) < 1e-12) for tile in tiles]
    assert all(len(row) for row in rows) and len({int(row[0]) for row in rows}) == 12
    assert not np.array_equal(images, tasks.digit_mosaics(3, seed=2))
    with pytest.raises(ValueError, match=r"at most 1797, .* got 500 \* 2\^2"):
        tasks.digit_mosaics(500)


def test_own_images_become_luma(tmp_path):
    grey = np.array([[0, 51], [102, 255]], np.uint8)
    colour = np.stack([grey, grey.T, 255 - grey], axis=-1)
    luma = colour / 255 @ [0.299, 0.587, 0.114]
    cases: dict = {"a.npy": grey, "b.npy": grey.astype(np.uint16) * 257, "c.npy": grey / 255}
    for name, array in cases.items():
        np.save(tmp_path / name, array)
        assert np.allclose(tasks.read_image(tmp_path / name), grey / 255, atol=1e-15)
    np.savez(tmp_path / "d.npz", only=colour)
    assert np.allclose(tasks.read_image(str(tmp_path / "d.npz")), luma, atol=1e-15)


def test_pictures_are_read_by_pillow(tmp_path):
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    colour = np.stack([grey, grey.T, 255 - grey], axis=-1)
    image.fromarray(grey).save(tmp_path / "grey.png")
    image.fromarray(colour).save(tmp_path / "colour.png")
    image.fromarray(colour).save(tmp_path / "colour.jpg", quality=95)
    image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    opaque = np.concatenate([colour, np.full((8, 8, 1), 255, np.uint8)], axis=-1)
    image.fromarray(opaque).save(tmp_path / "opaque.png")
    luma = colour / 255 @ [0.299, 0.587, 0.114]
    assert np.array_equal(tasks.read_image(tmp_path / "grey.png"), grey / 255)
    assert np.allclose(tasks.read_image(tmp_path / "deep.png"), grey / 255, atol=1e-15)
    for name in ("colour.png", "opaque.png"):
        assert np.allclose(tasks.read_image(tmp_path / name), luma, atol=1e-15)
    assert abs(tasks.read_image(tmp_path / "colour.jpg") - luma).max() < 0.1  # it loses some
    opaque[0, 0, 3] = 0
    image.fromarray(opaque).save(tmp_path / "holes.png")
    with pytest.raises(tasks.DataError, match="transparent in places"):
        tasks.read_image(tmp_path / "holes.png")


def test_integers_and_floats_of_pictures_are_not_clipped(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    ramp = np.arange(64).reshape(8, 8)
    image.fromarray((ramp * 1000).astype(np.int32)).save(tmp_path / "integers.tiff")
    image.fromarray((ramp / 63).astype(np.float32)).save(tmp_path / "floats.tiff")
    image.fromarray((ramp * 1000).astype(np.uint16)).save(tmp_path / "deep.tiff")
    with pytest.raises(tasks.DataError, match=r"integers.tiff must hold uint8.*got int32\[8, 8\]"):
        tasks.read_image(tmp_path / "integers.tiff")
    read = tasks.read_image(tmp_path / "floats.tiff")
    assert np.array_equal(read, (ramp / 63).astype(np.float32))
    assert np.allclose(tasks.read_image(tmp_path / "deep.tiff"), ramp * 1000 / 65535, atol=1e-15)
    # As Pillow opened a PNG of 16 bits once.
    older = image.fromarray((ramp * 1000).astype(np.int32))
    older.format = "PNG"
    monkeypatch.setattr(image, "open", lambda path: older)
    (tmp_path / "deep.png").write_bytes(b"")
    assert np.allclose(tasks.read_image(tmp_path / "deep.png"), ramp * 1000 / 65535, atol=1e-15)


def test_damaged_arrays_are_named(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04garbage")
    np.savez_compressed(tmp_path / "whole.npz", a=np.zeros((40, 40), np.uint8))
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[60] ^= 0xFF
    content[62] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    np.save(tmp_path / "short.npy", np.zeros((40, 40)))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:9])
    for name in ("empty.npy", "broken.npz", "flipped.npz", "short.npy"):
        with pytest.raises(tasks.DataError, match=f"{re.escape(name)} cannot be read: ."):
            tasks.read_image(tmp_path / name)
    with pytest.raises(tasks.DataError, match="is not a file; give the path"):
        tasks.read_image(tmp_path)


def test_a_picture_too_large_for_pillow_is_named(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 100)  # it refuses twice as many
    with pytest.raises(tasks.DataError, match=r"bomb\.png cannot be read: Image size"):
        tasks.read_image(tmp_path / "bomb.png")


def test_files_that_are_no_image_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "stack.npy", np.zeros((4, 4, 7)))
    np.save(tmp_path / "signed.npy", np.zeros((4, 4), np.int32))
    np.save(tmp_path / "wide.npy", np.full((4, 4), 200.0))
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan))
    np.save(tmp_path / "objects.npy", np.array([None, 1]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    faults = {
        "none.png": "does not exist",
        "text.png": "cannot be read",
        "text.npy": "cannot be read",
        "stack.npy": r"\[H, W\] or \[H, W, 3\]; got float64\[4, 4, 7\]",
        "signed.npy": r"uint8, uint16, or floats in \[0, 1\]; got int32",
        "wide.npy": r"values in \[0, 1\]; got 200 to 200",
        "nan.npy": r"values in \[0, 1\]; got nan",
        "objects.npy": "cannot be read",
        "two.npz": r"holds 2 arrays \(a, b\); one was expected",
    }
    for name, fault in faults.items():
        with pytest.raises(tasks.DataError, match=f"{re.escape(name)}.*{fault}"):
            tasks.read_image(tmp_path / name)


def test_without_pillow_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"hyperjax\[demo\]"):
        tasks.read_image(tmp_path / "a.png")


def test_area_average_keeps_means_and_shares_pixels():
    images = np.arange(2 * 9.0).reshape(2, 3, 3)
    got = _weight_penalties.area_average(images, 2)
    # A new pixel is 1.5 old ones wide: it has all of the first and half of the second.
    share = np.array([[1, 0.5, 0], [0, 0.5, 1]]) / 1.5
    assert np.allclose(got, share @ images @ share.T, atol=1e-13)
    assert np.allclose(got.mean((1, 2)), images.mean((1, 2)))
    assert np.allclose(_weight_penalties.area_average(images, 3), images, atol=1e-13)


# ---------------------------------------------------------------------------------- refusals


def test_shapes_that_do_not_fit_are_named(rng):
    noisy, made = picture(rng, 2, 7, 6), tasks.total_variation()
    with pytest.raises(
        ValueError, match=r"one shape .* got float64\[2, 7, 6\] and float64\[7, 6\]"
    ):
        made.loss(noisy, scalars(), noisy[0])
    with pytest.raises(ValueError, match=r"scalar or a map .*\(7, 6\); got float64\[6, 7\]"):
        made.loss(noisy, weight_map(rng, 6, 7), noisy)
    made = tasks.fields_of_experts()
    for bad in (experts(rng, size=8), {**experts(rng), "weight": jnp.zeros(3)}):
        with pytest.raises(ValueError, match=r"fields_of_experts: hparams must be"):
            made.loss(noisy, bad, noisy)
    with pytest.raises(ValueError, match=r"one penalty a weight; got float64\[\]"):
        tasks.weight_penalties().loss(jnp.zeros((6, 3)), jnp.zeros(()), rows(rng))


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"`size` must be an integer >= 2; got 1"):
        tasks.dct_filters(1)
    with pytest.raises(ValueError, match=r"`train` must be an integer >= 1; got 0"):
        tasks.small_mnist(train=0)


def test_without_data_the_loaders_say_so(tmp_path):
    for load in (tasks.kodak, tasks.small_mnist):
        with pytest.raises(tasks.DataError, match=f"{re.escape(str(tmp_path))}.* does not exist"):
            load(tmp_path)


# ------------------------------------------------------------------------------------- data


@needs_data
def test_kodak_is_24_photographs():
    images = tasks.kodak()
    assert images.shape == (24, 256, 256) and images.dtype == np.float64
    assert images.min() == 0 and images.max() == 1
    assert all(image.std() > 0.05 for image in images)


@needs_data
def test_small_mnist_has_other_images_to_validate():
    split = tasks.small_mnist(seed=3, train=200, valid=100)
    assert split.train["x"].shape == (1, 200, 144) and split.valid["x"].shape == (100, 144)
    ends = split.train["x"].min(), split.train["x"].max()
    assert np.allclose(ends, (0, 1), atol=1e-12)  # some pixel of the middle is white all over
    every = np.concatenate([split.train["x"][0], split.valid["x"]])
    assert len(np.unique(every, axis=0)) == 300
    assert set(np.unique(split.valid["y"])) == set(range(10))
    again = tasks.small_mnist(seed=4, train=200, valid=100)
    assert not np.array_equal(again.train["y"], split.train["y"])
    with pytest.raises(ValueError, match="`train` \\+ `valid` must be at most 60000"):
        tasks.small_mnist(train=60_000)
