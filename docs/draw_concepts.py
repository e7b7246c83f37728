"""Draws images/concepts.png: a response, its derivatives, and the score of a population along it.

    python docs/draw_concepts.py

Every line is computed by the method that it is named after.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import hyperjax as hj

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "notebooks"))

from common import BLUE, GREEN, GREY, ORANGE, PURPLE, RED  # noqa: E402

STEPS, AT = 3, -0.9  # training steps, and the h where derivatives are taken

loss = lambda w, h, _: (w - 1.0) ** 2 / 2 + jnp.exp(h) * w**2 / 2
score = lambda w, h, _: (w - 0.5) ** 2
inner = hj.inner(loss, lambda h: optax.sgd(0.3))
batches = jnp.arange(STEPS)


def trained(response, h):
    return response(h, inner.init(jnp.array(0.0), h), batches)[0]


def main() -> None:
    run = hj.unroll(inner.step)
    responses = {
        "unroll": (run, RED, "-"),
        "unroll, last step only": (hj.unroll(inner.step, truncate=1), ORANGE, "--"),
        "implicit": (hj.implicit(run, hj.stationary(loss)), GREEN, "-."),
    }
    h = jnp.linspace(-3.0, 1.1, 101)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9))
    left.plot(h, 1 / (1 + jnp.exp(h)), color=GREY, lw=1.5, label="exact solution")
    curve = jax.vmap(lambda x: trained(run, x))(h)
    left.plot(h, curve, color=BLUE, lw=2.5, label=f"response: {STEPS} training steps")
    value, near = trained(run, AT), jnp.linspace(AT - 1.1, AT + 1.1, 3)
    for name, (response, colour, style) in responses.items():
        slope = jax.grad(lambda x, r=response: trained(r, x))(AT)
        left.plot(near, value + slope * (near - AT), style, color=colour, lw=1.8, label=name)
    points = jnp.linspace(AT - 0.7, AT + 0.7, 4)
    line = jnp.polyfit(points, jax.vmap(lambda x: trained(run, x))(points), 1)
    left.plot(
        near, jnp.polyval(line, near), ":", color=PURPLE, lw=2.2, label="best response, fitted"
    )
    left.plot(AT, value, "o", color="black", ms=6)
    left.set(xlabel="hyperparameter h, log of the penalty", ylabel="trained parameter w(h)")
    left.set(title="A response, and ways to give it a derivative", ylim=(0, 1))
    left.legend(fontsize=8.5)

    along = lambda x: score(trained(run, x), x, None)
    right.plot(h, jax.vmap(along)(h), color=BLUE, lw=2.5, label="score of the response")
    members = jnp.array([-2.6, -1.7, AT, 0.1, 0.85])
    scores = jax.vmap(along)(members)
    right.plot(members, scores, "o", color="black", ms=7, label="members of a population")
    for at, value, slope in zip(members, scores, jax.vmap(jax.grad(along))(members), strict=True):
        step = -0.35 * jnp.sign(slope)
        arrow = {"arrowstyle": "-|>", "color": RED, "lw": 2}
        right.annotate("", (at + step, value + step * slope), (at, value), arrowprops=arrow)
    right.plot([], [], color=RED, lw=2, label="down its own hypergradient")
    worst, best = int(scores.argmax()), int(scores.argmin())
    bend = {"arrowstyle": "->", "color": GREEN, "lw": 1.5, "connectionstyle": "arc3,rad=0.3"}
    ends = (members[best] + 0.05, scores[best] + 0.001), (members[worst] - 0.05, scores[worst])
    right.annotate("", *ends, arrowprops=bend)
    right.plot([], [], color=GREEN, lw=1.5, label="the worst copies the best, and explores")
    right.set(xlabel="hyperparameter h", ylabel="score S(w(h), h)", title="What is tuned")
    right.legend(fontsize=8.5)
    figure.savefig(HERE / "images" / "concepts.png", dpi=100)


if __name__ == "__main__":
    main()
