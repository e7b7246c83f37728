"""What the notebooks share: the setting, one style of pictures, and records of full runs.

`python notebooks/NAME.py` runs the small setting, with `--full` the one that is on record:
`notebooks/results/NAME.json` with machine, versions, commit and seconds. In Jupyter, set
`HYPERJAX_FULL=1` before it starts.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "benchmarks"))

import _measure

FULL = "--full" in sys.argv or os.environ.get("HYPERJAX_FULL") == "1"
DATA = bool(os.environ.get("HYPERJAX_DATA"))  # a folder with the data sets, which loaders read
START = time.time()

# Okabe and Ito's colours, which everybody can tell apart.
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#777777"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY)

plt.rcParams.update(
    {
        "figure.figsize": (9, 3.8),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
    }
)


def band(axes: plt.Axes, x, runs, label: str, colour: str, **style) -> None:
    """The mean of runs [seeds, steps] and one standard error to each side of it."""
    runs = np.asarray(runs)
    mean = runs.mean(0)
    axes.plot(x, mean, color=colour, label=label, **style)
    if len(runs) > 1:
        error = runs.std(0, ddof=1) / np.sqrt(len(runs))
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def mean_and_error(values) -> tuple[float, float]:
    """Mean and standard error over the first axis; the error of one value is NaN."""
    values = np.asarray(values, float)
    spread = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean(0)), float(spread)


def record(name: str, facts: dict[str, Any]) -> None:
    """Writes `notebooks/results/<name>.json` in the full setting, and nothing in the small one."""
    if FULL:
        facts = {"seconds": round(time.time() - START, 1), **facts}
        _measure.record(name, facts, HERE / "results")


def benchmark(name: str) -> dict[str, Any]:
    """What `benchmarks/<name>.py` has measured on record: several seeds at full size."""
    return json.loads((_measure.RESULTS / f"{name}.json").read_text())
