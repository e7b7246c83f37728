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
    return mean_and_error([run[-1][TEST] for run in runs])


def mean_and_error(values: list) -> tuple[float, float]:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


def within(part: float | None) -> bool:
    return part is not None and part <= SHARE


def paid(runs: list, axis: int) -> float:
    return float(np.mean([run[-1][axis] for run in runs]))


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """The best of the others, and what each of ours paid to be where it ended.

    `share_<axis>` is that over what the other paid in all; None: never got there. `share_compiled`
    is that of seconds, compilation added on both sides. `above` is the final test loss of ours less
    that of the other: the mean over seeds and its standard error.
    """
    peers = {k: m["runs"] for k, m in found["methods"].items() if not m["ours"]}
    best = min(peers, key=lambda label: final(peers[label])[0])
    target = final(peers[best])[0]
    ours = {}
    for label, method in found["methods"].items():
        if not method["ours"]:
            continue
        gaps = [a[-1][TEST] - b[-1][TEST] for a, b in zip(method["runs"], peers[best], strict=True)]
        facts: dict[str, Any] = {"final": final(method["runs"])[0], "above": mean_and_error(gaps)}
        for name, axis in AXES.items():
            there = reached(method["runs"], axis, target)
            facts[name] = there
            facts[f"share_{name}"] = None if there is None else there / paid(peers[best], axis)
        other = found["methods"][best]["compile_s"] + paid(peers[best], SECONDS)
        there = facts["seconds"]
        facts["share_compiled"] = None if there is None else (there + method["compile_s"]) / other
        facts["held"] = {name: within(facts[f"share_{name}"]) for name in (*AXES, "compiled")}
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
        "| problem | best of the others | ours | ours less theirs | share of its steps "
        "| of gradients | of seconds | with compilation | a third of its steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = []
    for found in tasks_of(result).values():
        facts = compared(found)
        for i, (label, ours) in enumerate(facts["ours"].items()):
            head = (found["title"], f"{facts['best']}: {number(found, facts['best'])}")
            cells = [*(head if i == 0 else ("", "")), f"{label}: {number(found, label)}"]
            cells += ["{:+.4f} ± {:.4f}".format(*ours["above"])]
            cells += [share(ours[f"share_{name}"]) for name in (*AXES, "compiled")]
            word = "reached" if ours["held"]["steps"] else "not"
            lines.append(f"| {' | '.join([*cells, f'**{word}**' if i == 0 else word])} |")
            first += [ours["held"]] if i == 0 else []
    counts = {axis: sum(held[axis] for held in first) for axis in first[0]}
    lines.append(
        f"\nThe first of ours takes a third or less on {counts['steps']} problems of "
        f"{len(first)} by steps, on {counts['gradients']} by gradients, on {counts['seconds']} by "
        f"seconds, on {counts['compiled']} with compilation."
    )
    return "\n".join(lines) + "\n"


def finals(result: dict[str, Any]) -> str:
    found = tasks_of(result)
    labels = list(dict.fromkeys(k for f in found.values() for k in f["methods"]))
    ours = {k for f in found.values() for k, m in f["methods"].items() if m["ours"]}
    lines = [
        f"| test loss, inner steps, seconds | {' | '.join(map(short, found.values()))} |",
        "|---|" + "---|" * len(found),
        f"| *budget of the others, trainings* | {' | '.join(map(trainings, found.values()))} |",
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


def short(found: dict[str, Any]) -> str:
    return found["title"].split(":")[0]


def trainings(found: dict[str, Any]) -> str:
    return f"{found['budget'] / found['steps_of_a_training']:.0f}"


def number(found: dict[str, Any], label: str) -> str:
    mean, error = final(found["methods"][label]["runs"])
    return f"{mean:.4f} ± {error:.4f}"


def share(value: float | None) -> str:
    return "never" if value is None else f"{value:.1g}" if value < 0.1 else f"{value:.2f}"


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
