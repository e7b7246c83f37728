"""Time series and characters: what is read is what the files say, and lags look back."""

import gzip
import os
import re

import numpy as np
import pytest

from hyperjax import tasks
from hyperjax.tasks import _ett, _shakespeare

needs_data = pytest.mark.skipif(
    not os.environ.get("HYPERJAX_DATA"),
    reason="set HYPERJAX_DATA to a folder with ett and tinyshakespeare",
)


def test_lagged_looks_back_from_each_time():
    values = np.arange(40.0).reshape(20, 2)
    times = np.array([4, 19, 7])
    found = tasks.lagged(values, times, lags=5)
    assert found.shape == (3, 5, 2)
    for row, time in zip(found, times, strict=True):
        assert np.array_equal(row, values[time - 4 : time + 1][::-1])
    assert tasks.lagged(values, times[:0], lags=5).shape == (0, 5, 2)


@pytest.mark.parametrize("time", [3, 20, -1])
def test_lagged_refuses_times_without_a_past(time):
    expected = re.escape("lagged: `times` must lie in [4, 20) for 5 lags of 20 hours; got")
    with pytest.raises(ValueError, match=expected):
        tasks.lagged(np.zeros((20, 2)), np.array([10, time]), lags=5)
    with pytest.raises(ValueError, match="lagged: `lags` must be an integer >= 1; got 0"):
        tasks.lagged(np.zeros((20, 2)), np.array([10]), lags=0)


def test_small_files_by_hand(tmp_path, monkeypatch):
    table = "date,A,OT\n2016-07-01 00:00:00,5.5,30.25\n2016-07-01 01:00:00,-1.0,2e1\n"
    monkeypatch.setattr(_ett, "read", lambda file, data_dir: table.encode())
    series = tasks.ett(tmp_path)
    assert series.names == ("A", "OT") and series.values.tolist() == [[5.5, 30.25], [-1.0, 20.0]]
    monkeypatch.setattr(_shakespeare, "read", lambda file, data_dir: b"to be or not to be\n" * 2)
    text = tasks.shakespeare(tmp_path)
    assert text.names == "\n benort"
    assert [len(part) for part in (text.train, text.valid, text.test)] == [34, 2, 2]
    whole = np.concatenate([text.train, text.valid, text.test])
    assert "".join(text.names[i] for i in whole) == "to be or not to be\n" * 2


def test_without_their_data_they_say_so(tmp_path):
    for load in (tasks.ett, tasks.shakespeare):
        with pytest.raises(tasks.DataError, match=f"{re.escape(str(tmp_path))}.* does not exist"):
            load(tmp_path)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt.gz").write_bytes(gzip.compress(b"To be"))
    with pytest.raises(tasks.DataError, match="is not the expected file: 5 bytes"):
        tasks.shakespeare(tmp_path)


@needs_data
def test_real_files():
    series = tasks.ett()
    assert series.values.shape == (17_420, 7) and series.names[-1] == "OT"
    assert np.isfinite(series.values).all()
    assert series.values[0, -1] == pytest.approx(30.531, abs=1e-5)
    text = tasks.shakespeare()
    assert [len(part) for part in (text.train, text.valid, text.test)] == [
        1_003_854,
        55_770,
        55_770,
    ]
    assert len(text.names) == 65 == len(set(text.names)) and text.train.dtype == np.int32
    assert "".join(text.names[i] for i in text.train[:14]) == "First Citizen:"
