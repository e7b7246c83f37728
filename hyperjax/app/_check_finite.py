"""The NaN doctor: where training or its derivative first stops being finite, and why."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._inner import InnerState
from .._types import Batch, HParams, PyTree
from ._check_problem import Point, Problem, hparam_names, leaves, run_steps, setting

_GROWN = 1e3  # a loss or parameters so many times larger than at the start have diverged
_NUDGE = 1e-3


class Finding(NamedTuple):
    """The first thing that is not finite at one setting of the hyperparameters."""

    where: str  # the setting: "initial", "sampled 1", ...
    setting: str
    kind: str  # "training" or "meta-gradient"
    step: int  # from 1: the step whose operations are at fault
    leaves: list[str]
    cause: str  # a name for scripts, see `_ADVICE`
    text: str  # what happened and what to do

    @property
    def expected(self) -> bool:
        """Divergence far from the initial setting: ranges may reach that far, members may die."""
        return self.cause == "diverged" and self.where != "initial"


class _Fault(NamedTuple):
    kind: str
    step: int
    leaves: list[str]
    cause: str
    fact: str


_ADVICE = {
    "diverged": "lower the learning rate or its upper bound",
    "loss": "look for a logarithm, a division or an exponential in `loss`",
    "kink": "`loss` has an infinite derivative at exactly this point, as a square root or a norm "
    "has at 0; add 1e-12 under the root, or choose its argument by `where` before taking it",
    "update": "the optimizer divides by something that is 0 or overflows; give it an `eps`",
    "adam": "Adam divides by the root of its second moment, which has no derivative where a "
    "gradient entry has always been exactly 0; use hyperjax.guarded.adam (or adamw), or pass "
    "eps_root=1e-8 to optax.adam",
    "root": "the optimizer takes a root of squared gradients, which has no derivative where an "
    "entry is exactly 0; use one with an eps under the root, as hyperjax.guarded.adam, or wrap "
    "yours in hyperjax.guarded.nudge",
    "norm": "the optimizer takes the norm of a gradient that is 0, as clip_by_global_norm and muon "
    "do, which has no derivative there; use hyperjax.guarded.clip_by_global_norm, or wrap yours in "
    "hyperjax.guarded.nudge",
    "loss-kink": "the gradient of `loss` is finite and its derivative is not, as of a root, a norm "
    "or a power below 2 at 0; add 1e-12 under the root",
    "score": "the derivative of `score` is not finite; look for a root, a norm or a logarithm "
    "of 0 in it",
    "explodes": "no operation is at fault: the derivative of training grows until it overflows, as "
    "unstable training does; lower the learning rate or differentiate fewer steps (truncate=K)",
}


class Doctor:
    """Compiles once, then looks at one setting after another."""

    def __init__(self, problem: Problem, point: Point):
        self.problem, self.point = problem, point
        self._trace = jax.jit(lambda raw: _trace(problem, point, raw))
        self._state = jax.jit(lambda raw, count: run_steps(problem, point, raw, count))
        self._faults = jax.jit(lambda raw: _faults(problem, point, raw))

        def score(raw, count):
            state = run_steps(problem, point, raw, count)
            return problem.score(state.params, raw, point.split.valid)

        self._meta = jax.jit(jax.grad(score))

    def examine(self, where: str, raw: HParams) -> Finding | None:
        """The first fault at a setting, if there is one."""
        trace = jax.tree.map(np.asarray, self._trace(raw))
        fault = self._training(raw, trace)
        if fault is None and not self._meta_finite(raw, self.point.steps):
            fault = self._meta_gradient(raw)
        if fault is None:
            return None
        text = f"step {fault.step} of {self.point.steps}: {fault.fact}; {_ADVICE[fault.cause]}"
        values = setting(self.problem.space, raw)
        return Finding(where, values, fault.kind, fault.step, fault.leaves, fault.cause, text)

    def end(self) -> InnerState:
        """The state after the last step at the initial setting."""
        return self._state(self.point.raw, self.point.steps)

    def _meta_finite(self, raw: HParams, count: int) -> bool:
        return not _bad(self._meta(raw, count))

    def _training(self, raw: HParams, trace: "Trace") -> _Fault | None:
        stages = (~np.isfinite(trace.loss), ~trace.grads.all(1), ~trace.params.all(1))
        bad = np.logical_or.reduce(stages)
        if not bad.any():
            return None
        k = int(bad.argmax())
        before, after = self._state(raw, k), self._state(raw, k + 1)
        batch = jax.tree.map(lambda x: x[k], self.point.split.train)
        # Only what came before counts: an infinite loss at ordinary parameters is no divergence.
        largest = np.abs(trace.loss[:k]).max(initial=0.0)
        grown = trace.size[k] > _GROWN * max(trace.size[0], 1.0)
        grown |= largest > _GROWN * max(abs(trace.loss[0]), 1.0)
        if stages[0][k]:
            fact = f"the training loss is {trace.loss[k]}, at step 1 it was {trace.loss[0]:.3g}"
            return _Fault("training", k + 1, ["loss"], "diverged" if grown else "loss", fact)
        if stages[1][k]:
            gradient = jax.grad(self.problem.loss)(before.params, raw, batch)
            paths = _paths("params", gradient)
            fact = f"the loss is {trace.loss[k]:.3g}, its gradient is not finite at {_list(paths)}"
            cause = "kink" if self._heals(before.params, raw, batch) else "loss"
            return _Fault("training", k + 1, paths, "diverged" if grown else cause, fact)
        paths = _paths("params", after.params)
        fact = f"the gradient is finite and the update is not, at {_list(paths)}"
        return _Fault("training", k + 1, paths, "diverged" if grown else "update", fact)

    def _heals(self, params: PyTree, raw: HParams, batch: Batch) -> bool:
        """Whether the gradient is finite beside these parameters."""
        beside = jax.tree.map(lambda x: x + _NUDGE * (1 + jnp.abs(x)), params)
        return not _bad(jax.grad(self.problem.loss)(beside, raw, batch))

    def _meta_gradient(self, raw: HParams) -> _Fault:
        """Where the derivative of the score in raw hyperparameters breaks, training being fine."""
        first = next(k for k in range(self.point.steps + 1) if not self._meta_finite(raw, k))
        gradient = self._meta(raw, first)
        names = [
            name
            for name, g in zip(hparam_names(raw), jax.tree.leaves(gradient), strict=True)
            if not np.isfinite(g).all()
        ]
        fact = f"the meta-gradient after {first} steps is not finite in {_list(names)}"
        if first == 0:
            return _Fault("meta-gradient", 0, names, "score", fact)
        # A step may have broken it before the score came to depend on that.
        faults = jax.tree.map(lambda x: ~np.asarray(x[:first]), self._faults(raw))
        by_step = np.concatenate([faults.update, faults.loss], 1).any(1)
        if not by_step.any():
            params = self._state(raw, first).params
            score = jax.grad(self.problem.score)(params, raw, self.point.split.valid)
            cause = "score" if _bad(score) else "explodes"
            return _Fault("meta-gradient", first, names, cause, fact)
        k = int(by_step.argmax())
        state = self._state(raw, k)
        batch = jax.tree.map(lambda x: x[k], self.point.split.train)
        labels = [name for name, _ in leaves("params", state.params)]
        if faults.update[k].any():
            paths = [n for n, bad in zip(labels, faults.update[k], strict=True) if bad]
            cause, zeros = self._optimizer_cause(raw, state, batch, faults.update[k])
            fact += f", because the update has no derivative at {_list(paths)}, {zeros}"
            return _Fault("meta-gradient", k + 1, paths, cause, fact)
        paths = [n for n, bad in zip(labels, faults.loss[k], strict=True) if bad]
        fact += f", because the gradient has no derivative at {_list(paths)}"
        return _Fault("meta-gradient", k + 1, paths, "loss-kink", fact)

    def _optimizer_cause(
        self, raw: HParams, state: InnerState, batch: Batch, faulty: np.ndarray
    ) -> tuple[str, str]:
        """Which kind of zero in the gradient the optimizer cannot differentiate."""
        grads = jax.grad(self.problem.loss)(state.params, raw, batch)
        flat, tree = jax.tree.flatten(grads)
        zeros = sum(int((np.asarray(g) == 0).sum()) for g in flat)
        fact = f"whose gradient has {zeros:,} entries of exactly 0"
        pulled = lambda changed: _update_vjp(self.problem, state, raw, tree.unflatten(changed))
        heals = lambda changed: not _bad(pulled(changed))
        if not heals([jnp.where(g == 0, jnp.asarray(_NUDGE, g.dtype), g) for g in flat]):
            return "update", fact
        # A norm is differentiable again once any entry is not zero, a root of each entry is not.
        single = [g.ravel().at[0].set(_NUDGE).reshape(g.shape) if bad else g
                  for g, bad in zip(flat, faulty, strict=True)]  # fmt: skip
        adam = _has(state.opt_state, optax.ScaleByAdamState)
        telling = any(g.size > 1 for g, bad in zip(flat, faulty, strict=True) if bad)
        if heals(single) and (telling or not adam):
            return "norm", fact
        return ("adam" if adam else "root"), fact


class Trace(NamedTuple):
    """Training seen step by step; K steps, L leaves of parameters."""

    loss: Any  # [K] before the step
    size: Any  # [K] largest parameter before the step
    grads: Any  # [K, L] whether the gradient is finite
    params: Any  # [K, L] whether the parameters after the step are


class Faults(NamedTuple):
    """Whether derivatives of a step's parts are finite: [K, L] each."""

    update: Any
    loss: Any


def _trace(problem: Problem, point: Point, raw: HParams) -> Trace:
    def body(state, batch):
        loss, grads = jax.value_and_grad(problem.loss)(state.params, raw, batch)
        after = problem.training.step(state, raw, batch)
        size = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(state.params)]))
        return after, Trace(loss, size, _flags(grads), _flags(after.params))

    start = problem.training.init(point.params, raw)
    return jax.lax.scan(body, start, point.split.train)[1]


def _faults(problem: Problem, point: Point, raw: HParams) -> Faults:
    def body(state, batch):
        gradient = lambda p: jax.grad(problem.loss)(p, raw, batch)
        grads, pull = jax.vjp(gradient, state.params)
        hessian = pull(jax.tree.map(jnp.ones_like, grads))[0]
        update = _update_vjp(problem, state, raw, grads)
        return problem.training.step(state, raw, batch), Faults(_flags(update), _flags(hessian))

    start = problem.training.init(point.params, raw)
    return jax.lax.scan(body, start, point.split.train)[1]


def _update_vjp(problem: Problem, state: InnerState, raw: HParams, grads: PyTree) -> PyTree:
    """The derivative of the optimizer's update in the gradient, pulled back from ones."""
    optimizer = problem.optimizer(raw)
    update = lambda g: optimizer.update(g, state.opt_state, state.params)[0]
    updates, pull = jax.vjp(update, grads)
    return pull(jax.tree.map(jnp.ones_like, updates))[0]


def _flags(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])


def _bad(tree: PyTree) -> bool:
    return not all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(tree))


def _paths(prefix: str, tree: PyTree) -> list[str]:
    return [path for path, x in leaves(prefix, tree) if not np.isfinite(x).all()]


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _has(state: PyTree, kind: type) -> bool:
    is_kind = lambda x: isinstance(x, kind)
    return any(map(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))
