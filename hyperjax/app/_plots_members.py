"""Plots over time: losses, hyperparameter trajectories, and who copied whom."""

import math
from typing import TYPE_CHECKING

import numpy as np

from . import _plots_data as data
from . import _plots_style as look
from ._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_CURVES = 400  # thin curves per panel; more of them only darken it
_MAX_PANELS = 12


def history(record: Record) -> "Figure | None":
    """Validation loss against inner steps: all members, the best ones, and the mean over seeds."""
    if not np.isfinite(record.valid).any():
        return None
    figure = look.new_figure(record, "Validation loss")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    log = look.spans_decade(record.valid)
    _all_members(left, record, log)
    _mean_best(right, record, log)
    for axes in (left, right):
        axes.set_xlabel("inner steps per member")
        axes.set_xlim(*_time_limits(record.inner_steps))
        look.whole_numbers(axes.xaxis, 7)
    return figure


def _all_members(axes: "Axes", record: Record, log: bool) -> None:
    time = record.inner_steps
    for s in range(len(record.seeds)):
        grid = record.valid[:, s, _thinned(record.members, len(record.seeds))]
        look.curves(axes, time, grid.T, look.seed_colour(s), *_thin(record))
    best = data.best_members(record)
    for s, member in best.items():
        slots = data.ancestry(record, s, member)
        loss = record.valid[np.arange(len(slots)), s, slots]
        label = f"seed {record.seeds[s]}: member {member}"
        look.bold(axes, time[: len(slots)], loss, look.seed_colour(s), label)
    low, high = look.robust_limits(record.valid, log=log)
    axes.set_ylim(low, high)
    if log:
        axes.set_yscale("log")
        look.tidy_log(axes.yaxis, low, high)
    axes.set_ylabel("validation loss" + (" (log scale)" if log else ""))
    above = int((record.valid > high).sum())
    lost = int(np.isnan(record.valid).sum())
    hidden = [f"{above:,} above the frame"] * (above > 0) + [f"{lost:,} not finite"] * (lost > 0)
    note = f" ({', '.join(hidden)}, of {record.valid.size:,} values)" if hidden else ""
    axes.set_title(f"All members{note}" if hidden else "All members; the best of each seed bold")
    if 0 < len(best) <= len(look.PALETTE):
        title = "bold: best of each seed" if hidden else None
        axes.legend(loc="upper right", title=title, frameon=True, framealpha=0.85, edgecolor="w")


def _mean_best(axes: "Axes", record: Record, log: bool) -> None:
    smallest = data.best_so_far(record.valid)
    mean, error = data.mean_and_error(smallest)
    time = record.inner_steps
    for s in range(len(record.seeds)):
        axes.plot(time, smallest[:, s], color=look.seed_colour(s), lw=1, alpha=0.6)
    axes.fill_between(time, mean - error, mean + error, color=look.INK, alpha=0.18, lw=0)
    look.bold(axes, time, mean, look.INK, None)
    several = len(record.seeds) > 1
    seeds = look.plural(len(record.seeds), "seed")
    axes.set_title(f"Best so far: mean ± s.e. of {seeds}" if several else "Best so far")
    low, high = look.robust_limits(smallest, log=log, top=100)
    axes.set_ylim(low, high)
    if log:
        axes.set_yscale("log")
        look.tidy_log(axes.yaxis, low, high)


def hparams(record: Record) -> "Figure | None":
    """A panel per hyperparameter: all members thin, the schedules of the best ones bold."""
    names = [n for n, grid in record.hparams.items() if np.isfinite(grid).any()]
    if not names:
        return None
    title, ranked = "Hyperparameters during training", names
    if len(names) > _MAX_PANELS:
        ranked = [name for name in data.ranking(record) if name in names][:_MAX_PANELS]
        title += f": {_MAX_PANELS} of {len(names):,}"
    figure = look.new_figure(record, title)
    rows, columns = _grid_of(len(ranked))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    best = {s: data.ancestry(record, s, m) for s, m in data.best_members(record).items()}
    for axes, name in zip(panels, ranked, strict=False):
        _trajectories(axes, record, name, best)
    for axes in panels[len(ranked) :]:
        axes.set_axis_off()
    if len(ranked) < len(panels) and 1 < len(best) <= len(look.PALETTE):
        curves = panels[0].get_lines()  # in the order of `best`
        panels[len(ranked)].legend(curves, [f"seed {record.seeds[s]}" for s in best], loc="center")
    bold = "bold: schedule of the best member of each seed" if best else ""
    shaded = "grey: outside the space" if record.space else ""
    words = ("inner steps per member", bold, shaded)
    figure.supxlabel("   ·   ".join(filter(None, words)), x=0.01, ha="left", **look.NOTE)
    figure.text(0.99, 0.972, look.literal(look.describe(record)), ha="right", **look.ASIDE)
    _label_above_gaps(figure, panels, len(ranked), columns)
    return figure


def _label_above_gaps(figure: "Figure", panels: np.ndarray, count: int, columns: int) -> None:
    """Tick labels for panels with an empty cell below, without the layout making room for them."""
    # The last label reaches beyond its panel.
    figure.set_layout_engine("constrained", rect=(0, 0, 0.985, 1))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for i in range(count):
        if i + columns >= count:
            panels[i].tick_params(labelbottom=True)


def _trajectories(axes: "Axes", record: Record, name: str, best: dict[int, np.ndarray]) -> None:
    grid, time = record.hparams[name], record.inner_steps
    for s in range(len(record.seeds)):
        some = grid[:, s, _thinned(record.members, len(record.seeds))]
        look.curves(axes, time, some.T, look.seed_colour(s), *_thin(record))
    for s, slots in best.items():
        schedule = grid[np.arange(len(slots)), s, slots]
        look.bold(axes, time[: len(slots)], schedule, look.seed_colour(s), None)
    log = look.is_log(record, name, grid)
    low, high = look.robust_limits(grid, log=log, top=100)
    bounds = record.space.get(name, {})
    low, high = _with_bounds(axes, low, high, bounds.get("low"), bounds.get("high"), log)
    axes.set_ylim(low, high)
    if log:
        axes.set_yscale("log")
        look.tidy_log(axes.yaxis, low, high)
    else:
        axes.locator_params(axis="y", nbins=5)
    axes.set_xlim(*_time_limits(time))
    look.whole_numbers(axes.xaxis, 4)
    axes.set_title(look.short(name) + (" (log scale)" if log else ""))


def _with_bounds(
    axes: "Axes", low: float, high: float, lower: float | None, upper: float | None, log: bool
) -> tuple[float, float]:
    """Shades what the space forbids; a bound close to the data widens the limits to show it."""
    scale = (lambda v: math.log10(v) if v > 0 else -math.inf) if log else float
    height = scale(high) - scale(low)
    new = [low, high]
    for end, bound, side in ((0, lower, -1), (1, upper, 1)):
        if bound is None or not math.isfinite(scale(bound)):
            continue
        if abs(scale(bound) - scale(new[end])) <= 0.3 * height:
            edge = scale(bound) + side * 0.06 * height
            new[end] = 10**edge if log else edge
        far = bound * 10 ** (side * 3) if log else bound + side * 10 * (height + abs(bound))
        axes.axhspan(min(bound, far), max(bound, far), color="#b0b0b0", alpha=0.35, lw=0)
    return new[0], new[1]


def lineage(record: Record) -> "Figure | None":
    """Who copied whom in the first seed; nothing if no member ever copied another."""
    last = data.last_logged(record)
    if not len(last) or last[0] < 0:
        return None
    parents = record.parents[: last[0] + 1, 0]
    own = np.arange(record.members)
    copied = parents != own
    if not copied.any():
        return None
    slots = data.ancestry(record, 0, own)  # [T, M]
    losses = record.valid[last[0], 0, parents[-1]]
    founders = len(np.unique(slots[0]))
    title = f"Who copied whom (seed {record.seeds[0]}): the final {record.members} members"
    title += f" descend from {founders} of the first {record.members}"
    figure = look.new_figure(record, title)
    axes = figure.subplots()
    _survivors(figure, axes, record.steps[: last[0] + 1], slots, losses)
    at, child = np.nonzero(copied)
    size = float(np.clip(1200 / record.members, 3, 28))
    axes.scatter(record.steps[at] + 0.5, child, s=size, color=look.INK, zorder=4, lw=0)
    axes.set_xlabel("outer step (dots: this slot was overwritten with a copy)")
    axes.set_ylabel("slot of the population")
    axes.set_ylim(record.members - 0.3, -0.7)
    axes.grid(visible=False)
    look.whole_numbers(axes.xaxis, 10)
    look.whole_numbers(axes.yaxis, 10)
    return figure


def _survivors(
    figure: "Figure", axes: "Axes", steps: np.ndarray, slots: np.ndarray, losses: np.ndarray
) -> None:
    members = slots.shape[1]
    # A slot is flat while it trains and moves in the gap between two steps.
    time = np.column_stack([steps - 0.35, steps + 0.35]).ravel()
    axes.hlines(np.arange(members), time[0], time[-1], color="#dddddd", lw=0.8)
    order = np.argsort(-np.nan_to_num(losses, nan=np.inf))  # best on top
    scale, cut = look.loss_scale(losses)
    width = float(np.clip(90 / members, 0.8, 3.0))
    paths = np.repeat(slots, 2, axis=0).T[order].astype(float)
    colours = np.array(scale.to_rgba(losses[order]))
    colours[~np.isfinite(losses[order])] = (0.6, 0.6, 0.6, 1.0)
    ends = np.column_stack([paths, order])  # where the last exchange put them
    look.curves(axes, np.append(time, steps[-1] + 1), ends, colours, width, 0.9)
    axes.set_xlim(time[0], steps[-1] + 1)
    figure.colorbar(scale, ax=axes, label="final validation loss", extend=cut, pad=0.01)


def _thinned(members: int, seeds: int) -> np.ndarray:
    """Evenly spaced members, so that all seeds together draw at most `_MAX_CURVES`."""
    count = max(1, min(members, _MAX_CURVES // max(seeds, 1)))
    return np.linspace(0, members - 1, count).round().astype(int)


def _thin(record: Record) -> tuple[float, float]:
    """Width and opacity of the thin curves: a few can be stronger than hundreds."""
    count = min(record.members * len(record.seeds), _MAX_CURVES)
    return float(np.clip(30 / count, 0.65, 1.1)), float(np.clip(16 / count, 0.2, 0.6))


def _time_limits(time: np.ndarray) -> tuple[float, float]:
    low, high = float(time[0]), float(time[-1])
    pad = 0.02 * (high - low) or 1.0
    return low - pad, high + pad


def _grid_of(count: int) -> tuple[int, int]:
    columns = next(c for c in (1, 2, 3, 4) if count <= c * min(c, 3))
    return math.ceil(count / columns), columns
