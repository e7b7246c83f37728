"""The schedules that self-tuned runs found, from the records of the stn_* benchmarks.

    python benchmarks/stn_plot.py

Draws docs/images/self_tuning.png: medians over the seeds, bands from the least to the largest. A
benchmark without a record is left out, and said to be.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _measure import ROOT

PICTURE = ROOT / "docs" / "images" / "self_tuning.png"


class Line(NamedTuple):
    label: str
    x: np.ndarray
    seeds: np.ndarray  # [seeds, len(x)]


class Panel(NamedTuple):
    title: str
    x: str
    lines: list[Line]


def digits(data: dict[str, Any]) -> Panel:
    lines = []
    for name, runs in data["schedules"].items():
        rates = np.asarray([run["dropout"] for run in runs])[..., 0]
        if name.startswith("STN"):
            lines.append(Line(name, runs[0]["every_steps"] * np.arange(rates.shape[1]), rates))
    return Panel("Digits: dropout of the inputs", "training step", lines)


def text(data: dict[str, Any]) -> Panel:
    lines = []
    for name, runs in data["schedules"].items():
        for place in ("input", "output") if name.startswith("self-tuned") else ():
            rates = np.asarray([run[place] for run in runs])
            label = f"{place}, {name.removeprefix('self-tuned ')}"
            lines.append(Line(label, 1 + np.arange(rates.shape[1]), rates))
    return Panel("WikiText-2, LSTM: dropout", "epoch", lines)


def seven(data: dict[str, Any]) -> Panel:
    runs, lines = data["schedules"], []
    for name in runs[0]:
        values = np.asarray([run[name] for run in runs])
        lines.append(Line(name, 1 + np.arange(values.shape[1]), values))
    return Panel("WikiText-2, LSTM: seven at once", "epoch", lines)


def images(title: str, keep: tuple[str, ...], data: dict[str, Any]) -> Panel:
    """Hyperparameters by name, each over its largest value where that is above 1."""
    runs, lines = [seed["STN"] for seed in data["seeds"]], []
    for i, name in enumerate(runs[0]["names"]):
        if name in keep:
            values = np.asarray([run["schedule"] for run in runs])[:, :, i]
            most = np.ceil(values.max()) if values.max() > 1 else 1
            label = name if most == 1 else f"{name} / {most:g}"
            x = runs[0]["schedule_every_steps"] * np.arange(values.shape[1])
            lines.append(Line(label, x, values / most))
    return Panel(title, "training step", lines)


def mnist(data: dict[str, Any]) -> Panel:
    keep = ("dropout[0]", "dropout[1]", "dropout[2]", "jitter")
    return images("MNIST, 8,500 images", keep, data)


def cifar(data: dict[str, Any]) -> Panel:
    keep = ("dropout[0]", "dropout[6]", "dropout[7]", "brightness", "holes", "length")
    return images("CIFAR-10, 8,500 images: six of fifteen", keep, data)


PANELS = {
    "stn_digits": digits,
    "stn_text": text,
    "stn_text_seven": seven,
    "stn_mnist": mnist,
    "stn_cifar": cifar,
}


def panels() -> Iterator[Panel]:
    for name, make in PANELS.items():
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        if path.exists():
            yield make(json.loads(path.read_text()))
        else:
            print(f"no {path.name}: run `python benchmarks/{name}.py`")


def main() -> None:
    found = list(panels())
    rows = -(-len(found) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.4 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, found, strict=False):
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(panel.lines)))
        for color, line in zip(colors, panel.lines, strict=True):
            axis.plot(line.x, np.median(line.seeds, axis=0), color=color, label=line.label)
            low, high = line.seeds.min(axis=0), line.seeds.max(axis=0)
            axis.fill_between(line.x, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(title=panel.title, xlabel=panel.x, ylabel="value", ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=80)
    print(PICTURE)


if __name__ == "__main__":
    main()
