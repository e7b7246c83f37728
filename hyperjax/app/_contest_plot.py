"""The picture of a comparison of estimators: error, time and memory side by side."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _plots_style as look
from ._contest import Comparison
from ._contest_rule import Row, duration
from ._grid import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BIAS, _NOISE, _BEST = look.PALETTE[1], look.PALETTE[0], look.PALETTE[2]
_LEAST = 1e-4  # of the reference: nobody tunes so exactly, so what is below is at the edge
_MOST = 1e3


def draw_comparison(found: Comparison, path: Path) -> Path:
    """Draws the comparison into a PNG. Raises MissingExtraError without matplotlib."""
    with look.style():
        return look.save(_figure(found), path)


def _figure(found: Comparison) -> "Figure":
    rows = [row for row in found.rows if row.accuracy is not None]
    best = found.recommendation.name
    title = f"Estimators on {found.task}: " + (f"take “{best}”" if best else "none to recommend")
    figure = look.blank_figure(title, _describe(found), height=max(4.0, 1.9 + 0.31 * len(rows)))
    if not rows:
        figure.text(0.5, 0.5, look.literal(found.recommendation.reason), ha="center", **look.NOTE)
        return figure
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(2.1, 1, 1))
    _errors(panels[0], rows, found.tolerance)
    _bars(panels[1], [row.cost and row.cost.seconds for row in rows], rows, best, duration)
    _bars(panels[2], [row.cost and row.cost.bytes for row in rows], rows, best, quantity)
    panels[1].set_title("time of one estimate")
    panels[2].set_title("memory (dashed: budget)" if found.budget else "temporary memory")
    if found.budget is not None:
        panels[2].axvline(found.budget, color=look.INK, lw=1.2, ls="--")
    panels[0].set_yticks(range(len(rows)), [look.short(row.name, 30) for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        if row.name == best:
            label.set_color(_BEST)
            label.set_fontweight("bold")
    return figure


def _describe(found: Comparison) -> str:
    refused = sum(bool(row.refused) for row in found.rows)
    words = [look.plural(found.steps, "step"), look.plural(found.draws, "draw"), found.precision]
    return " · ".join(words + ([f"{refused} not compared"] if refused else []))


def _errors(axes: "Axes", rows: list[Row], tolerance: float) -> None:
    """Bias with its standard error, and the deviation of one estimate, on one logarithmic axis."""
    place = np.arange(len(rows))
    bias, error, noise = (
        np.array([getattr(row.accuracy, name) for row in rows])
        for name in ("bias", "bias_error", "deviation")
    )
    clip = lambda x: np.clip(x, _LEAST, _MOST)
    axes.hlines(place, clip(bias - error), clip(bias + error), color=_BIAS, lw=2, alpha=0.6)
    dots: dict[str, Any] = {"ls": "", "zorder": 4}
    axes.plot(clip(noise), place, "s", ms=7, mfc="white", mec=_NOISE, mew=1.8, **dots,
              label="deviation of one estimate")  # fmt: skip
    axes.plot(clip(bias), place, "o", ms=8, color=_BIAS, label="bias (line: ± s.e.)", **dots)
    for i in np.flatnonzero(~np.isfinite(bias)).tolist():
        axes.text(0.02, i, "not finite", transform=axes.get_yaxis_transform(), va="center",
                  **look.ASIDE)  # fmt: skip
    axes.axvline(tolerance, color=look.INK, lw=1.2, ls="--", label="tolerance")
    axes.set_xscale("log")
    shown = clip(np.concatenate([bias, bias + error, noise, [tolerance, 1.0]]))
    shown = shown[np.isfinite(shown)]
    axes.set_xlim(shown.min() / 2, shown.max() * 2)
    edge = " (below 1e-4: at the edge)" if shown.min() <= _LEAST else ""
    axes.set_xlabel(f"error, in units of the reference gradient{edge}")
    place_above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.995)}
    axes.legend(ncols=3, columnspacing=1.2, handletextpad=0.3, borderpad=0.1, **place_above)


def _bars(axes: "Axes", values: list, rows: list[Row], best: str | None, text) -> None:
    known = np.array([math.nan if v is None else float(v) for v in values])
    positive = known[known > 0]
    axes.grid(visible=False, axis="y")
    if not positive.size:
        return
    colours = [_BEST if row.name == best else look.GREY for row in rows]
    low, high = positive.min() / 2, positive.max()
    axes.barh(np.arange(len(rows)), known - low, 0.62, left=low, color=colours, alpha=0.85)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.45)
    under = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides lines behind
    for i in np.flatnonzero(known > 0).tolist():
        axes.text(
            known[i] * 1.08, i, text(known[i]), va="center", fontsize=11, color=look.INK, bbox=under
        )
    axes.tick_params(axis="x", labelbottom=False, which="both", length=0)
