"""Images: the Kodak suite, anybody's own, noise that a key decides, and how far two are apart."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._types import Key, Scalar
from ._data import KODAK, DataError, read
from ._digits import digit_images

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue
_WHITE = {"uint8": 255, "uint16": 65535}
_WINDOW = 11  # pixels of a side, of structural similarity


def kodak(data_dir: str | Path | None = None) -> np.ndarray:
    """The 24 Kodak photographs, luma of 256 x 256 centres: float64 [24, 256, 256] in [0, 1].

    Usual parts: 0-11 to train, 12-17 to validate, 18-23 to test. Read from `data_dir` or the folder
    that the environment variable HYPERJAX_DATA names. Raises DataError if the file is missing or
    damaged.
    """
    return np.load(io.BytesIO(read(KODAK, data_dir)))["images"] / 255


def digit_mosaics(count: int, side: int = 2, *, seed: int = 0) -> np.ndarray:
    """Images of side x side handwritten digits: float64 [count, 24 side, 24 side] in [0, 1].

    The 8 x 8 digits that come with the package, each once, made 24 x 24 by linear interpolation.
    `seed` chooses them. Raises ValueError for numbers out of range.
    """
    _checks.positive_int("digit_mosaics", "count", count)
    _checks.positive_int("digit_mosaics", "side", side)
    pixels = digit_images()[0].reshape(-1, 8, 8) / 16
    wanted = count * side**2
    if wanted > len(pixels):
        raise ValueError(
            f"digit_mosaics: `count` * `side`^2 must be at most {len(pixels)}, the digits there "
            f"are; got {count} * {side}^2."
        )
    chosen = pixels[np.random.default_rng(seed).permutation(len(pixels))[:wanted]]
    # Pixel i covers [3 i, 3 i + 3) of the fine ones; beyond the outer centres it is constant.
    places = (np.arange(24) + 0.5) / 3 - 0.5
    ramps = np.stack([np.interp(places, np.arange(8), row) for row in np.eye(8)], axis=1)
    fine = np.einsum("ia,nab,jb->nij", ramps, chosen, ramps)
    grid = fine.reshape(count, side, side, 24, 24).swapaxes(2, 3)
    return grid.reshape(count, 24 * side, 24 * side)


def read_image(path: str | Path) -> np.ndarray:
    """One's own image as luma: float64 [H, W] in [0, 1].

    `path` ends in .npy, in .npz (with one array in it), or in anything that Pillow reads (.png,
    .jpg; Pillow comes with the extra `demo`). An array is [H, W] or [H, W, 3]; uint8 and uint16
    are divided by their largest value, floats must lie in [0, 1]. Red, green and blue become luma
    by ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B. Transparency is refused.

    Raises DataError if the file is missing, unreadable or something else, and ImportError where
    Pillow is needed and not installed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        fault = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {fault}; give the path of an image or of an array.")
    loader = _read_array if path.suffix in (".npy", ".npz") else _read_picture
    try:
        pixels = loader(path)
    except (DataError, ImportError):
        raise
    except Exception as error:  # NumPy, zip files and Pillow's decoders raise many kinds
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}") from error
    return _luma(path, pixels)


def centre_crop(images: np.ndarray, size: int) -> np.ndarray:
    """The middle [n, size, size] of images [n, H, W]. Raises ValueError if they are smaller."""
    _checks.positive_int("centre_crop", "size", size)
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise ValueError(
            f"centre_crop: `size` must be at most {min(height, width)}, since the images are "
            f"{height} x {width}; got {size}."
        )
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def add_noise(key: Key, clean: jax.Array, deviation: float | Scalar) -> jax.Array:
    """Images [..., H, W] with Gaussian noise of that standard deviation; nothing is clipped."""
    return clean + deviation * jax.random.normal(key, jnp.shape(clean), jnp.result_type(clean))


def psnr(images: jax.Array, clean: jax.Array) -> jax.Array:
    """-10 log10 of the mean squared error, in dB, of each image [..., H, W] in [0, 1]: [...]."""
    return -10 * jnp.log10(jnp.mean((images - clean) ** 2, axis=(-2, -1)))


def ssim(images: jax.Array, clean: jax.Array) -> jax.Array:
    """Structural similarity of each image [..., H, W] in [0, 1] to its clean one: [...], at most 1.

    The mean over all windows inside the image of Wang, Bovik, Sheikh and Simoncelli 2004 (IEEE
    Transactions on Image Processing 13, section III.B): Gaussian windows of 11 x 11 pixels with a
    deviation of 1.5, C1 = 0.01^2 and C2 = 0.03^2. Raises ValueError for images below 11 x 11.
    """
    sizes = jnp.shape(clean)[-2:]
    if min(sizes) < _WINDOW:
        raise ValueError(
            f"ssim: images must be at least {_WINDOW} x {_WINDOW}; got {sizes[0]} x {sizes[1]}."
        )
    rows, columns = (jnp.asarray(_windows(n), jnp.result_type(images, clean)) for n in sizes)
    mean = lambda x: jnp.einsum("ih,...hw,jw->...ij", rows, x, columns)
    one, two = mean(images), mean(clean)
    spread = mean(images**2) - one**2 + mean(clean**2) - two**2
    together = mean(images * clean) - one * two
    first, second = 0.01**2, 0.03**2
    brightness = (2 * one * two + first) / (one**2 + two**2 + first)
    return jnp.mean(brightness * (2 * together + second) / (spread + second), axis=(-2, -1))


def _windows(size: int) -> np.ndarray:
    """[size - 10, size]: the weights of each place of the window along one dimension."""
    weights = np.exp(-((np.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * 1.5**2))
    places = np.arange(size - _WINDOW + 1)
    matrix = np.zeros((len(places), size))
    matrix[places[:, None], places[:, None] + np.arange(_WINDOW)] = weights / weights.sum()
    return matrix


def _read_array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        names = found.files
        if len(names) != 1:
            raise DataError(
                f"{path} holds {len(names)} arrays ({', '.join(names)}); one was expected. "
                "Save the image alone with `numpy.save`."
            )
        return found[names[0]]


def _read_picture(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f'{path} needs Pillow: `pip install "hyperjax[demo]"`, or give a .npy file.'
        ) from error
    with Image.open(path) as picture:
        if "A" in picture.getbands() or "transparency" in picture.info:
            alpha = np.asarray(picture.convert("RGBA"))[..., 3]
            if alpha.min() < 255:
                raise DataError(f"{path} is transparent in places; flatten it first.")
        # A PNG has 16 bits at most; older versions of Pillow open such a one as 32.
        deep = picture.mode == "I" and picture.format == "PNG"
        if deep or picture.mode.startswith("I;16"):
            return np.asarray(picture).astype(np.uint16)
        # Of integers and floats a conversion would clip what does not fit into a byte.
        as_it_is = picture.mode in ("L", "I", "F")
        return np.asarray(picture if as_it_is else picture.convert("RGB"))


def _luma(path: Path, pixels: np.ndarray) -> np.ndarray:
    if (pixels.ndim != 2 and pixels.shape[2:] != (3,)) or 0 in pixels.shape:
        raise DataError(f"{path} must hold [H, W] or [H, W, 3]; got {_checks.describe(pixels)}.")
    white = _WHITE.get(pixels.dtype.name, 1)
    if white == 1 and not np.issubdtype(pixels.dtype, np.floating):
        raise DataError(
            f"{path} must hold uint8, uint16, or floats in [0, 1]; got {_checks.describe(pixels)}."
        )
    scaled = pixels.astype(np.float64) / white
    if not (scaled.min() >= 0 and scaled.max() <= 1):  # a NaN fails both
        raise DataError(
            f"{path} must hold values in [0, 1]; got {scaled.min():g} to {scaled.max():g}. "
            "Divide by the value of white."
        )
    return scaled if scaled.ndim == 2 else scaled @ np.asarray(_LUMA)
