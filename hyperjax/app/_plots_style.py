"""One look for all plots: size, colours, scales, and saving without a display."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._errors import AppError
from ._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# A plot is a function of the run; None says that the run has no data for it.
Draw = Callable[[Record], "Figure | None"]
SIZE = (12.0, 7.0)  # inches; at 100 dots per inch the width of a README
GREY, INK = "#9a9a9a", "#222222"
# Okabe and Ito's colours, told apart with every common colour blindness; black is left to text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ASIDE: dict[str, Any] = {"fontsize": 11, "color": "#777777"}
NOTE: dict[str, Any] = {"fontsize": 13, "color": INK}
_COLOURS = 256
_RC: dict[Any, Any] = {
    # Fonts that ship with matplotlib: a user's own settings must not change or break a report.
    "font.family": "DejaVu Sans",
    "text.usetex": False,
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.formatter.useoffset": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": INK,
    "axes.labelcolor": INK,
}


class MissingExtraError(AppError, ImportError):
    """An optional dependency is not installed; the message is the command that brings it."""


@contextmanager
def style() -> Iterator[None]:
    """Applies the look of the plots while a figure is built, and puts the settings back."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError('plots need matplotlib: pip install "hyperjax[demo]"') from error
    with matplotlib.rc_context(_RC):
        yield


def new_figure(record: Record, title: str) -> "Figure":
    """An empty figure under a title that says which run it shows."""
    return blank_figure(title, describe(record))


def blank_figure(title: str, aside: str, height: float = SIZE[1]) -> "Figure":
    """An empty figure under a title, with a remark in its corner; height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(literal(title), x=0.01, ha="left", fontsize=16, fontweight="bold")
    figure.supxlabel(literal(aside), x=0.99, ha="right", **ASIDE)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Writes a PNG of 256 colours, a fifth of the size, in one step that leaves no torn file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image = image.quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
    return path


def describe(record: Record) -> str:
    """The run in a few words: task, method, members and seeds."""
    config = record.config
    words = [str(config[key]) for key in ("task", "method") if config.get(key)]
    words.append(plural(record.members, "member"))
    words.append(plural(len(record.seeds), "seed"))
    return " · ".join(words)


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def literal(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def short(name: str, limit: int = 26) -> str:
    """A name that fits a panel: the middle of a long one gives way."""
    if len(name) > limit:
        head = (limit - 1) // 2
        name = f"{name[:head]}…{name[head + 1 - limit :]}"
    return literal(name)


def seed_colour(position: int) -> str:
    """The colour of a seed; they repeat after six, and labels then tell."""
    return PALETTE[position % len(PALETTE)]


def robust_limits(values: np.ndarray, *, log: bool, top: float = 98.0) -> tuple[float, float]:
    """Limits that show the bulk of losses: everything below, and the ``top`` percentile above.

    One diverged member would otherwise press all others into a line.
    """
    finite = values[np.isfinite(values)]
    if log:
        finite = np.log10(finite[finite > 0])
    if not finite.size:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(finite.min()), float(np.percentile(finite, top))
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - pad, high + pad
    return (10**low, 10**high) if log else (low, high)


def spans_decade(values: np.ndarray) -> bool:
    """Whether positive values spread widely enough for a logarithmic axis."""
    finite = values[np.isfinite(values)]
    if not finite.size or finite.min() <= 0:
        return False
    return bool(np.percentile(finite, 98) > 8 * finite.min())


def loss_scale(losses: np.ndarray) -> tuple[Any, str]:
    """A colour scale over final losses, cut at their 90th percentile, and which end is cut."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    finite = losses[np.isfinite(losses)]
    low, high = (float(finite.min()), float(np.percentile(finite, 90))) if finite.size else (0, 1)
    cut = "max" if finite.size and finite.max() > high else "neither"
    # Without the last, lightest fifth, which is hard to see on white; dark is good.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))
    return ScalarMappable(Normalize(low, high if high > low else low + 1e-12), colours), cut


def is_log(record: Record, name: str, values: np.ndarray) -> bool:
    """Whether a hyperparameter is drawn on a logarithmic axis: its space says so, and it can be."""
    finite = values[np.isfinite(values)]
    return record.space.get(name, {}).get("scale") == "log" and bool(
        finite.size and finite.min() > 0
    )


def tidy_log(axis: "Axis", low: float, high: float) -> None:
    """Ticks of a logarithmic axis that stay readable when it spans less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    decades = math.log10(high / low)
    if decades < 2:
        subs = (1.0, 2.0, 5.0) if decades > 0.7 else tuple(np.arange(1.0, 10.0))
        if decades > 0.2:
            axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        else:  # flatter than one minor tick: plain ticks at round values
            axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: "Axis", most: int) -> None:
    """At most so many ticks, none of them at a fraction of a step."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))


def number(value: float) -> str:
    """Three digits; powers of ten without their padding: ``2.4e-4`` for 0.00024."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def curves(
    axes: "Axes",
    x: np.ndarray,
    ys: np.ndarray,
    colours: Any,
    width: float,
    alpha: float | None,
) -> None:
    """Many curves at once: ``ys`` is [curves, len(x)]; NaN breaks a curve."""
    from matplotlib.collections import LineCollection

    lines = [np.column_stack([x, y]) for y in ys]
    axes.add_collection(
        LineCollection(lines, colors=colours, linewidths=width, alpha=alpha, capstyle="round")
    )
    if len(x) == 1:  # a line of one point draws nothing
        axes.scatter(np.repeat(x, len(ys)), ys[:, 0], color=colours, s=18, alpha=0.5)


def bold(axes: "Axes", x: np.ndarray, y: np.ndarray, colour: str, label: str | None) -> None:
    """A curve that stands out from thin ones: a white edge separates it from them."""
    from matplotlib.patheffects import Normal, Stroke

    edge = [Stroke(linewidth=4.6, foreground="white"), Normal()]
    marker = "o" if len(x) == 1 else ""
    axes.plot(x, y, color=colour, lw=2.6, marker=marker, label=label, zorder=3, path_effects=edge)
