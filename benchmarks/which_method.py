"""Every estimator on a network and on a convex problem; writes the table of docs/which_method.md.

    python benchmarks/which_method.py

`compare_estimators` on two problems with real data, float32, at their initial hyperparameters:

- digits: the perceptron of `hyperjax tune digits`, 60 steps, nine hyperparameters of which
  learning rate and momentum matter most. Expected: what differentiates the run is right and what
  differentiates a solution is not, since there is none yet, and is blind to the two.
- pixels: softmax regression on the same images with one L2 penalty for each of 64 pixels, 200
  steps over the whole training set. Expected: implicit differentiation is right, for less time and
  memory than the unroll.

Some 50 programs are compiled, which takes most of the five minutes on two free cores. It must be
run again whenever an estimator is added or becomes faster.
"""

import io
import json
import math
from importlib import resources
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hyperjax as hj
from hyperjax.app import compare_estimators
from hyperjax.tasks import Task, digits

RESULT = _measure.RESULTS / "which_method.json"
PAGE = _measure.ROOT / "docs" / "which_method.md"
BEGIN, END = "<!-- table:begin", "<!-- table:end -->"
PROBLEMS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 60, "draws": 16},
    "pixels": {"steps": 200, "draws": 8},
}


def main() -> None:
    results = {}
    for name, options in PROBLEMS.items():
        task = pixels() if name == "pixels" else digits()
        found = compare_estimators(task, tell=lambda line, n=name: print(n, line), **options)
        results[name] = found.as_json()
    _measure.record("which_method", {"problems": results})
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RESULT.read_text())))


def pixels() -> Task:
    """Softmax regression on digits with one L2 penalty per pixel, trained on all rows at once."""
    data = resources.files("hyperjax.tasks").joinpath("data", "digits.npz").read_bytes()
    archive = np.load(io.BytesIO(data))
    images = archive["images"].reshape(-1, 64).astype(np.float32)
    table = jnp.asarray((images - images.mean()) / images.std())
    labels = jnp.asarray(archive["labels"], jnp.int32)
    network = digits()  # for its split

    def fit(params, batch):
        logits = table[batch["index"]] @ params["w"] + params["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch["index"]])
        return jnp.mean(losses)

    def loss(params, hparams, batch):
        return fit(params, batch) + jnp.sum(hparams["l2"][:, None] * params["w"] ** 2) / 2

    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (64, 10)), "b": jnp.zeros(10)}

    def batches(key, steps):
        repeat = lambda x: jnp.broadcast_to(x, (steps, *x.shape))
        return jax.tree.map(repeat, whole(key))

    train = network.whole(jax.random.key(0))["index"]
    whole = lambda key: {"index": train}
    return Task(
        name="pixels",
        init=init,
        loss=loss,
        score=lambda params, hparams, batch: fit(params, batch),
        space=hj.space({"l2": hj.loguniform(1e-4, 10.0, init=0.03, shape=(64,))}),
        optimizer=lambda hparams: optax.sgd(0.1, momentum=0.9, nesterov=True),
        batches=batches,
        whole=whole,
        valid=network.valid,
        test=network.test,
        evaluate=lambda params, batch: {"loss": fit(params, batch)},
    )


# ---- the table ----------------------------------------------------------------------------------


def with_table(page: str, result: dict) -> str:
    """The page with the table of `result` between its two marks."""
    before, rest = page.split(BEGIN, 1)
    mark, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}{mark}\n{markdown(result)}{END}{after}"


def markdown(result: dict) -> str:
    problems = result["problems"]
    header = "| estimator |" + "".join(
        f" {name}: bias | deviation | time | memory |" for name in problems
    )
    lines = [header, "|---|" + "---|" * (4 * len(problems))]
    tables = [{row["name"]: row for row in found["rows"]} for found in problems.values()]
    best = [found["recommendation"]["name"] for found in problems.values()]
    for name in tables[0]:
        rows = [table[name] for table in tables]
        if all(row["accuracy"] is None for row in rows):
            continue
        cells = [cell for row, b in zip(rows, best, strict=True) for cell in _cells(row, b)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, "", *_notes(result), ""])


def _cells(row: dict, best: str) -> list[str]:
    found, cost = row["accuracy"], row["cost"]
    if found is None:
        return ["-", "", "", ""]
    if found["bias"] is None:
        return ["not finite", "", _time(cost["seconds"]), _memory(cost["bytes"])]
    bias = f"{_figure(found['bias'])} ± {_figure(found['bias_error'])}"
    if found["blind"]:
        bias = f"{_figure(found['bias'])}, seen {_figure(found['seen'])}"
    bias = f"**{bias}**" if row["name"] == best else bias
    return [bias, _figure(found["deviation"]), _time(cost["seconds"]), _memory(cost["bytes"])]


def _notes(result: dict) -> list[str]:
    parts = []
    for name, found in result["problems"].items():
        reference = found["reference"]
        parts.append(
            f"{name}: {found['steps']} steps, {found['hparams']} hyperparameters, "
            f"{found['params']:,} parameters, {found['draws']} draws, the standard error of the "
            f"reference {_figure(reference['error'])}."
        )
    env = result["env"]
    machine = f"{env['cores']} {env['backend'].upper()} cores, JAX {env['versions']['jax']}"
    seen = "*seen*: without the hyperparameters to which the estimator is blind"
    return [*parts, f"Bold: recommended; {seen}. {machine}."]


def _figure(value: float) -> str:
    """Two digits; rounding errors of float32 are zero here."""
    if value < 1e-5:
        return "0"
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = 1 - math.floor(math.log10(value))
    return f"{value:.{max(digits, 0)}f}"


def _time(seconds: float) -> str:
    milli = seconds * 1e3
    return f"{milli:.2g} ms" if milli < 10 else f"{milli:.0f} ms"


def _memory(size: int) -> str:
    return f"{size / 2**20:.2g} MiB" if size < 10 * 2**20 else f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
