"""Regression problems of UCI: splits, units, and what is refused."""

import os

import numpy as np
import pytest

from hyperjax import tasks
from hyperjax.tasks import _data, _uci


@pytest.fixture
def yacht(monkeypatch, rng) -> tuple[np.ndarray, np.ndarray]:
    """Forty rows of three columns, and ten splits of four test rows each."""
    rows = rng.normal(size=(40, 3)) * [1, 10, 100] + [0, 5, -7]
    splits = np.repeat(np.eye(10, dtype=int), 4, axis=0)
    text = lambda table: "\n".join(",".join(map(repr, row)) for row in table.tolist()).encode()
    content = {_data.YACHT: text(rows), _data.YACHT_SPLITS: text(splits)}
    monkeypatch.setattr(_uci._data, "read", lambda file, data_dir: content[file])
    return rows, splits


def test_a_split_is_in_the_units_of_its_training_rows(yacht):
    rows, splits = yacht
    found = tasks.uci("yacht", 3)
    assert found.x.shape == (36, 2) and found.test_x.shape == (4, 2)
    train = np.column_stack([found.x, found.y])
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(train.std(0), 1, rtol=1e-12)
    kept = rows[splits[:, 3] == 0]
    np.testing.assert_allclose(found.deviation, kept[:, -1].std())
    back = found.test_y * found.deviation + kept[:, -1].mean()
    np.testing.assert_allclose(back, rows[splits[:, 3] == 1, -1])


def test_splits_test_every_row_once(yacht):
    rows, _ = yacht
    tested = [tasks.uci("yacht", s) for s in range(10)]
    assert sum(len(part.test_y) for part in tested) == len(rows)
    assert not np.array_equal(tested[0].test_y, tested[1].test_y)


@pytest.mark.parametrize("split", [-1, 10, 0.5, True])
def test_splits_are_ten(split):
    with pytest.raises(ValueError, match="`split` must be an integer from 0 to 9"):
        tasks.uci("yacht", split)


def test_names_are_listed():
    with pytest.raises(ValueError, match="boston") as error:
        tasks.uci("boston")  # pyright: ignore[reportArgumentType]
    assert all(name in str(error.value) for name in _uci._FILES)


def test_files_are_missing(tmp_path):
    with pytest.raises(tasks.DataError, match=r"yacht\.data\.csv\.gz does not exist"):
        tasks.uci("yacht", data_dir=tmp_path)


@pytest.mark.skipif("HYPERJAX_DATA" not in os.environ, reason="needs the data folder")
@pytest.mark.parametrize(
    ("name", "rows", "features"),
    [("autompg", 392, 7), ("concrete", 1030, 8), ("energy", 768, 8), ("yacht", 308, 6)],
)
def test_sets_are_what_they_claim(name, rows, features):
    counts = []
    for split in range(10):
        found = tasks.uci(name, split)
        assert len(found.y) + len(found.test_y) == rows
        assert found.x.shape[1] == found.test_x.shape[1] == features
        counts.append(len(found.test_y))
    assert sum(counts) == rows  # every row is tested once
