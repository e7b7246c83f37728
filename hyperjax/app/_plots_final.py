"""Plots of the end of a run: final hyperparameters, what mattered, and the closing table."""

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _plots_data as data
from . import _plots_style as look
from . import _tables as tables
from ._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_AXES = 12
_MAX_BARS = 20
_MAX_LINES = 2000
_FULL_LINES = 80  # lines that can be told apart


def parallel(record: Record) -> "Figure | None":
    """Final hyperparameters in parallel coordinates, coloured by the final validation loss."""
    if record.valid.size == 0:
        return None
    losses = data.final_losses(record).ravel()
    kept = np.flatnonzero(np.isfinite(losses))
    if len(kept) < 2:
        return None
    named = data.final_hparams(record)
    ranked = list(data.ranking(record))[:_MAX_AXES]
    names = [n for n in named if n in ranked and np.isfinite(named[n]).any()]
    title = "Final hyperparameters of all members"
    if len(names) < len(named):
        title += f": {len(names)} of {len(named):,}"
    figure = look.new_figure(record, title)
    axes = figure.subplots()
    kept = kept[np.argsort(-losses[kept])][-_MAX_LINES:]  # best on top
    columns = [(n, named[n].ravel()[kept], look.is_log(record, n, named[n])) for n in names]
    columns.append(("final loss", losses[kept], look.spans_decade(losses)))
    heights = np.array([_height(values, log) for _, values, log in columns])  # [axes, lines]
    scale, cut = look.loss_scale(losses)
    colours = np.array(scale.to_rgba(losses[kept]))
    # The good ones stand out of the crowd; the larger it is, the more of it fades.
    fade = max(0.5, len(kept) / _FULL_LINES - 1)
    colours[:, 3] = np.maximum(0.06, 0.95 * np.linspace(0, 1, len(kept)) ** fade)
    look.curves(axes, np.arange(len(columns)), heights.T, colours, 1.2, None)
    _axes_of(axes, columns)
    figure.colorbar(scale, ax=axes, label="final validation loss", extend=cut, pad=0.02)
    return figure


def _height(values: np.ndarray, log: bool) -> np.ndarray:
    """Position between the smallest value (0) and the largest (1); a constant is at 0.5."""
    values = np.log(values) if log else values
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low) if high > low else np.full_like(values, 0.5)


def _axes_of(axes: "Axes", columns: list[tuple[str, np.ndarray, bool]]) -> None:
    """Vertical axes with the extremes written at their ends."""
    axes.set_xlim(-0.4, len(columns) - 0.6)
    axes.set_ylim(-0.1, 1.1)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    many = len(columns) > 7
    gap = " " if many else "\n"
    labels = [look.short(n, 18) + (f"{gap}(log)" if log else "") for n, _, log in columns]
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), labels, **(turned if many else {}))
    axes.tick_params(axis="x", length=0)
    for i, (_, values, _) in enumerate(columns):
        low, high = np.nanmin(values), np.nanmax(values)
        axes.plot([i, i], [0, 1], color="white", lw=3.5, zorder=3)
        axes.plot([i, i], [0, 1], color="#555555", lw=1.2, zorder=3)
        if high > low:
            axes.text(i, -0.02, look.number(low), ha="center", va="top", fontsize=12)
            axes.text(i, 1.02, look.number(high), ha="center", va="bottom", fontsize=12)
        else:
            axes.text(i, 1.02, f"all {look.number(low)}", ha="center", va="bottom", fontsize=12)


def sensitivity(record: Record) -> "Figure | None":
    """Rank correlation of each hyperparameter with the final validation loss."""
    if record.valid.size == 0:
        return None
    bars = data.importances(record, _MAX_BARS)
    if not bars:
        return None
    figure = look.new_figure(record, "Which hyperparameters go with the final loss")
    axes = figure.subplots()
    values = np.array([b.correlation for b in bars])
    errors = np.nan_to_num([b.error for b in bars])
    place = np.arange(len(bars))
    colours = [look.PALETTE[1] if v > 0 else look.PALETTE[0] for v in values]
    style: dict[str, Any] = {"ecolor": look.INK, "capsize": 4, "elinewidth": 1.3}
    axes.barh(place, values, 0.66, xerr=errors, color=colours, alpha=0.85, error_kw=style)
    axes.axvline(0, color="#555555", lw=1)
    axes.set_yticks(place, [look.short(b.name, 32) for b in bars])
    axes.set_ylim(max(len(bars), 4) - 0.4, -0.6)
    reach = min(1.05, max(0.25, 1.15 * float((np.abs(values) + errors).max())))
    axes.set_xlim(-reach, reach)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(
        "Spearman rank correlation with the final validation loss, within seeds"
        " (bars: bootstrap s.e. over members)"
    )
    axes.set_title("←  larger values go with a lower loss", loc="left", color=look.PALETTE[0])
    axes.set_title("larger values go with a higher loss  →", loc="right", color=look.PALETTE[1])
    return figure


def table(record: Record) -> "Figure | None":
    """Test loss, and accuracy where there is one, of each row of the table with its seeds."""
    rows = tables.summarise(record.table or {})
    shown = [
        k
        for k in ("test_loss", "test_accuracy")
        if any(k in r.metrics and r.metrics[k].count for r in rows)
    ]
    if not shown:
        return None
    figure = look.new_figure(record, "On the test set")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True).ravel()
    raw = (record.table or {})["rows"]
    for axes, key in zip(panels, shown, strict=True):
        _bars(axes, rows, [r.get(key) or [] for r in raw], key)
    panels[0].set_yticks(range(len(rows)), [look.short(r.name) for r in rows])
    panels[0].set_ylim(max(len(rows), 3) - 0.4, -0.6)
    return figure


def _bars(axes: "Axes", rows: list[tables.Row], raw: list[list], key: str) -> None:
    everything = np.concatenate([np.asarray(values, float) for values in raw])
    finite = everything[np.isfinite(everything)]
    # Near 1 all accuracies look alike from zero, and a bar that starts elsewhere misleads.
    from_zero = not (key.endswith("accuracy") and finite.min() > 0.5) and finite.min() >= 0
    for i, (row, values) in enumerate(zip(rows, raw, strict=True)):
        mean = row.metrics[key].mean if key in row.metrics else None
        if mean is None:
            continue
        colour = look.PALETTE[0] if row.key == "tuned" else look.GREY
        if from_zero:
            axes.barh(i, mean, 0.62, color=colour, alpha=0.55)
        points = np.asarray(values, float)
        offsets = np.linspace(-0.2, 0.2, len(points)) if len(points) > 1 else np.zeros(1)
        axes.scatter(points, i + offsets, s=22, color=look.INK, alpha=0.6, lw=0, zorder=4)
        bar: dict[str, Any] = {"capsize": 6, "lw": 2, "zorder": 5}
        axes.errorbar(mean, i, xerr=row.metrics[key].error, color=look.INK, **bar)
        axes.plot(mean, i, "D", ms=9, color=colour, mec=look.INK, zorder=6)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=6)
    name = tables.METRICS[key].replace("acc", "accuracy")
    axes.set_xlabel(name if from_zero else f"{name} (axis does not start at zero)")
    several = max(len(values) for values in raw) > 1
    axes.set_title("diamonds: mean ± s.e.   dots: seeds" if several else "one seed")
