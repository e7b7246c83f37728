"""What `versus.py` found: compared, drawn, and tabled in docs/versus.md.

This needs neither JAX nor a search, so that a test can make the tables anew.
"""

from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versus.md"
MARKS = {name: f"<!-- table:begin {name} (written by benchmarks/versus.py" for name in ("a", "b")}
END = "<!-- table:end -->"
STEPS, GRADIENTS, SECONDS, VALID, TEST = range(5)
AXES = {"steps": STEPS, "gradients": GRADIENTS, "seconds": SECONDS}
ORDER = ("a9a", "ett", "digits", "text", "mnist")
SHARE = 1 / 3


# ---------------------------------------------------------------------------------- comparison


def mean_curve(runs: list, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the test loss of any seed changes, its mean over the seeds there, its standard error.

    It begins where every seed has a model.
    """
    tables = [np.asarray(run, float) for run in runs]
    start = max(table[0, axis] for table in tables)
    x = np.unique(np.concatenate([table[:, axis] for table in tables]))
    x = x[x >= start]
    values = np.stack([at(table, axis, x) for table in tables])
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
    return x, values.mean(0), error


def at(table: np.ndarray, axis: int, x: np.ndarray) -> np.ndarray:
    """The test loss of the best model when `x` had been paid."""
    return table[np.searchsorted(table[:, axis], x, side="right") - 1, TEST]


def reached(runs: list, axis: int, target: float) -> float | None:
    """When the mean test loss first was at `target` or below."""
    x, mean, _ = mean_curve(runs, axis)
    below = np.flatnonzero(mean <= target * (1 + 1e-9))
    return float(x[below[0]]) if len(below) else None


def final(runs: list) -> tuple[float, float]:
    last = np.array([run[-1][TEST] for run in runs])
    error = last.std(ddof=1) / len(last) ** 0.5 if len(last) > 1 else float("nan")
    return float(last.mean()), float(error)


def paid(runs: list, axis: int) -> float:
    return float(np.mean([run[-1][axis] for run in runs]))


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """The best of the others, and what each of ours paid to be where it ended.

    `share_<axis>` is that over what the other paid in all, `share_of_its_way_<axis>` over what it
    had paid when its own mean first was where it ended. None: never got there.
    """
    peers = {k: m["runs"] for k, m in found["methods"].items() if not m["ours"]}
    best = min(peers, key=lambda label: final(peers[label])[0])
    target = final(peers[best])[0]
    ours = {}
    for label, method in found["methods"].items():
        if not method["ours"]:
            continue
        facts: dict[str, Any] = {"final": final(method["runs"])[0]}
        for name, axis in AXES.items():
            there = reached(method["runs"], axis, target)
            own = reached(peers[best], axis, target)
            facts[name] = there
            facts[f"share_{name}"] = None if there is None else there / paid(peers[best], axis)
            facts[f"share_of_its_way_{name}"] = None if there is None or not own else there / own
        facts["held"] = facts["share_steps"] is not None and facts["share_steps"] <= SHARE
        ours[label] = facts
    return {"best": best, "target": target, "ours": ours}


# -------------------------------------------------------------------------------------- tables


def with_tables(page: str, result: dict[str, Any]) -> str:
    """The page with the tables of `result` between their marks."""
    for name, text in (("a", verdicts(result)), ("b", finals(result))):
        before, rest = page.split(MARKS[name], 1)
        mark, rest = rest.split("\n", 1)
        after = rest.split(END, 1)[1]
        page = f"{before}{MARKS[name]}{mark}\n{text}{END}{after}"
    return page


def tasks_of(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result["tasks"][name] for name in ORDER if name in result["tasks"]}


def verdicts(result: dict[str, Any]) -> str:
    lines = [
        "| problem | best of the others | its test loss | ours | test loss | "
        "share of its steps | of gradients | of seconds | a third of its steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    held, missed = 0, []
    for name, found in tasks_of(result).items():
        facts = compared(found)
        for i, (label, ours) in enumerate(facts["ours"].items()):
            first = (found["title"], facts["best"], number(found, facts["best"]))
            cells = [*(first if i == 0 else ("", "", "")), label, number(found, label)]
            cells += [share(ours[f"share_{name}"]) for name in AXES]
            held += i == 0 and ours["held"]
            if i == 0 and not ours["held"]:
                above = 100 * (ours["final"] / facts["target"] - 1)
                missed.append(f"{name}, where {facts['best']} ends {above:.1f} % below")
            lines.append(f"| {' | '.join([*cells, verdict(ours, i)])} |")
    count = len(result["tasks"])
    lines.append(f"\nReached by the first of ours: {held} of {count}. Not: {'; '.join(missed)}.")
    return "\n".join(lines) + "\n"


def verdict(ours: dict[str, Any], place: int) -> str:
    word = "reached" if ours["held"] else "not"
    return f"**{word}**" if place == 0 else word


def finals(result: dict[str, Any]) -> str:
    found = tasks_of(result)
    labels = list(dict.fromkeys(k for f in found.values() for k in f["methods"]))
    ours = {k for f in found.values() for k, m in f["methods"].items() if m["ours"]}
    lines = [
        f"| test loss, inner steps, seconds | {' | '.join(found)} |",
        "|---|" + "---|" * len(found),
    ]
    for label in [k for k in labels if k in ours] + [k for k in labels if k not in ours]:
        cells = []
        for f in found.values():
            if label not in f["methods"]:
                cells.append("")
                continue
            runs = f["methods"][label]["runs"]
            seconds = f"{paid(runs, SECONDS):.2g} s"
            cells.append(f"{number(f, label)}, {paid(runs, STEPS):,.0f}, {seconds}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    seeds = len(next(iter(found.values()))["seeds"])
    cores, jax = result["env"]["cores"], result["env"]["versions"]["jax"]
    lines.append(
        f"\nMean ± standard error over {seeds} seeds; seconds a seed of one core without "
        f"compilation; CPU cores used: {cores}, JAX {jax}."
    )
    return "\n".join(lines) + "\n"


def number(found: dict[str, Any], label: str) -> str:
    mean, error = final(found["methods"][label]["runs"])
    return f"{mean:.4f} ± {error:.4f}"


def share(value: float | None) -> str:
    return "never" if value is None else f"{value:.2g}"


# ------------------------------------------------------------------------------------ pictures

BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"  # Okabe and Ito
PURPLE, GREY, BLACK = "#CC79A7", "#777777", "#000000"
PEERS = {
    "random search": GREY,
    "TPE": ORANGE,
    "Gaussian process": BLACK,
    "CMA-ES": GREEN,
    "CMA-ES of evosax": PURPLE,
}


def draw(name: str, found: dict[str, Any], folder: Path = ROOT / "docs" / "images") -> Path:
    """Test loss against inner steps and against seconds: docs/images/versus_<name>.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#e6e6e6", "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
        for axis, by in zip(axes, (STEPS, SECONDS), strict=True):
            for label, line in _lines(found).items():
                _band(axis, found["methods"][label]["runs"], by, label, line)
            axis.set_xscale("log")
        axes[0].set(xlabel="inner training steps", ylabel=f"test {found['unit']}")
        axes[1].set(xlabel="seconds of one core, without compilation")
        axes[0].set_title(found["title"])
        axes[0].set_ylim(_limits(found))
        handles, labels = axes[0].get_legend_handles_labels()
        room = {"ncols": 4, "fontsize": 8, "columnspacing": 1.5, "handlelength": 1.8}
        figure.legend(handles, labels, loc="outside lower center", **room)
        path = folder / f"versus_{name}.png"
        figure.savefig(path, dpi=100)
        plt.close(figure)
    return path


def _lines(found: dict[str, Any]) -> dict[str, dict]:
    """Ours last, so that they lie on top."""
    lines, ours = {}, iter(({"color": BLUE}, {"color": RED}))
    for label, method in found["methods"].items():
        if method["ours"]:
            lines[label] = next(ours) | {"linewidth": 2.2, "zorder": 3}
            continue
        plain = label.removesuffix(", Hyperband")
        dash = "-" if plain == label else "--"
        lines[label] = {"color": PEERS[plain], "linestyle": dash, "linewidth": 1.3}
    return lines


def _band(axis, runs: list, by: int, label: str, line: dict) -> None:
    x, mean, error = mean_curve(runs, by)
    label = label if "zorder" not in line else f"hyperjax: {label}"
    axis.step(x, mean, where="post", label=label, **line)
    colour = {"color": line["color"], "alpha": 0.2 if "zorder" in line else 0.1, "linewidth": 0}
    axis.fill_between(x, mean - error, mean + error, step="post", **colour)


def _limits(found: dict[str, Any]) -> tuple[float, float]:
    """From the best to where the searches stood after their first training."""
    curves = [mean_curve(m["runs"], STEPS) for m in found["methods"].values()]
    low = min(mean.min() for _, mean, _ in curves)
    high = max(mean[np.searchsorted(x, found["steps_of_a_training"], "right") - 1]
               for (x, mean, _), m in zip(curves, found["methods"].values(), strict=True)
               if not m["ours"] and x[0] <= found["steps_of_a_training"])  # fmt: skip
    gap = high - low
    return low - 0.08 * gap, high + 0.05 * gap
