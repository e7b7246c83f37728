"""`hyperjax check`: whether the derivatives of a task can be trusted, before a run is paid for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _tree
from .._estimators import hypergradient
from .._implicit import implicit, root_vjp
from .._inner import InnerState, stationary
from .._unroll import unroll
from ..linsolve import cg
from ..tasks import Task
from ._check_finite import Doctor, Finding
from ._check_gradient import GradientReport, check_gradient
from ._check_problem import (
    Point,
    Problem,
    first_line,
    hparam_names,
    make_point,
    make_problem,
    number,
)
from ._errors import AppError
from ._grid import grid, quantity
from ._output import Output

_SAMPLED = 3  # settings beside the initial one that the NaN doctor looks at
_CG_STEPS = 10
_CONVERGED = 1e-2  # of the first gradient norm
_SOLVED = 0.1  # relative residual of the adjoint system


def check(
    task: Task,
    out: Output,
    *,
    steps: int = 20,
    directions: int = 3,
    seed: int = 0,
) -> int:
    """Checks a task in four parts, each printed when it is done.

    1. The gradients of loss and score, and the unrolled hypergradient of `steps` inner steps along
       `directions` random directions, against central differences and forward mode, in float64
       where the task allows it.
    2. Training and its derivative, step by step, at the initial and at three random settings:
       the first step and leaf that are not finite, and the likely cause.
    3. Convergence and curvature after those steps: whether implicit differentiation applies.
    4. Memory of one hypergradient by each method, from the compiled programs; none is run.

    Returns 0 if the hypergradient is right and all is finite, 1 if not: a fault found is a result,
    not bad input. Divergence at a random setting alone is reported and gives 0, since ranges may
    reach into it and a population takes such members out. Parts 3 and 4 are for information.

    As JSON, one object with the keys "task", "steps", "gradient", "finite", "convergence",
    "memory" and "ok".
    """
    if steps < 1 or directions < 1:
        raise AppError(
            f"check needs at least one step and one direction; got {steps} and {directions}."
        )
    problem, point = make_problem(task), make_point(task, steps, seed)
    gradient = check_gradient(problem, point, directions, seed)
    _show_gradient(gradient, steps, out)
    doctor = Doctor(problem, point)
    findings = _examine(doctor, problem, point, seed)
    _show_findings(findings, steps, out)
    convergence = None
    if not any(f.where == "initial" and f.kind == "training" for f in findings):
        convergence = look_at_end(problem, point, doctor.end())
        out.line(f"convergence: {convergence['text']}")
        if convergence["implicit_blind_to"]:
            blind = ", ".join(convergence["implicit_blind_to"])
            out.line(f"  it has no derivative in {blind}: no effect except through the optimizer")
    memory = forecast(problem, point)
    _show_memory(memory, steps, out)
    ok = gradient.ok and all(f.expected for f in findings)
    if out.as_json:
        finite = [{**f._asdict(), "expected": f.expected} for f in findings]
        out.result({"task": task.name, "steps": steps, "gradient": gradient.as_json(),
                    "finite": finite, "convergence": convergence,
                    "memory": [m._asdict() for m in memory], "ok": ok})  # fmt: skip
    return 0 if ok else 1


# ---- the NaN doctor over several settings -----------------------------------------------------


def _examine(doctor: Doctor, problem: Problem, point: Point, seed: int) -> list[Finding]:
    keys = jax.random.split(jax.random.key(seed + 1), _SAMPLED)
    settings = {"initial": point.raw}
    settings |= {f"sampled {i + 1}": problem.space.sample(key) for i, key in enumerate(keys)}
    found = [doctor.examine(where, raw) for where, raw in settings.items()]
    return [finding for finding in found if finding is not None]


def _show_findings(findings: list[Finding], steps: int, out: Output) -> None:
    if not findings:
        where = f"at the initial and {_SAMPLED} random settings"
        out.line(f"finite: ok, training and meta-gradient over {steps} steps {where}")
    for f in findings:
        level = "note" if f.expected else "NOT FINITE"
        out.line(f"finite: {level}, {f.where} setting ({f.setting}), {f.text}")


def _show_gradient(report: GradientReport, steps: int, out: Output) -> None:
    verdict = "ok" if report.ok else "SUSPICIOUS"
    out.line(
        f"gradients, through {steps} steps: {verdict}, relative error {report.error:.1e} "
        f"(allowed {report.tolerance:.0e}, {report.precision})"
    )
    for note in report.notes:
        out.line(f"  {note}")
    if report.unused:
        out.line(f"  no effect on the score: {', '.join(report.unused)}")
    if not report.ok and not all(row.settled for row in report.rows):
        out.line("  central differences do not settle: the score may not be smooth here")
    header = ("along", "reverse", "forward", "central", "step", "error", "verdict")
    rows = [
        (r.direction, f"{r.reverse:.8g}", "-" if r.forward is None else f"{r.forward:.8g}",
         f"{r.central:.8g}", f"{r.step:.0e}", f"{r.error:.1e}", "ok" if r.ok else "differs")
        for r in report.rows
    ]  # fmt: skip
    _show(header, rows, out)


# ---- convergence and curvature ----------------------------------------------------------------


def look_at_end(problem: Problem, point: Point, end: InnerState) -> dict[str, Any]:
    """How far the inner gradient has fallen, and what conjugate gradients meet there."""

    def measure(params, raw):
        optimality = stationary(problem.loss)
        first = _tree.norm(optimality(point.params, raw, point.whole))
        cotangent = jax.grad(problem.score)(params, raw, point.split.valid)
        solve = cg(maxiter=_CG_STEPS)
        grad, _, info = root_vjp(optimality, params, raw, point.whole, cotangent, solve=solve)
        return first, grad, info

    first, grad, info = jax.jit(measure)(end.params, point.raw)
    ratio = float(info.stationarity / first) if first > 0 else 1.0
    curvature, residual = float(info.solve.curvature), float(info.solve.residual)
    blind = [
        name
        for name, g in zip(hparam_names(grad), jax.tree.leaves(grad), strict=True)
        if not np.asarray(g).any()
    ]
    trusted, why = _trust(ratio, curvature, residual)
    text = (
        f"after {point.steps} steps the training gradient is {ratio:.1e} of its first norm, "
        f"smallest curvature {curvature:.1e}: implicit differentiation "
        f"{'applies' if trusted else 'is not to be trusted'}, {why}"
    )
    return {
        "gradient_norm": number(info.stationarity),
        "gradient_ratio": number(ratio),
        "curvature": number(curvature),
        "residual": number(residual),
        "cg_steps": int(info.solve.iterations),
        "implicit_trusted": trusted,
        "implicit_blind_to": blind,
        "text": text,
    }


def _trust(ratio: float, curvature: float, residual: float) -> tuple[bool, str]:
    if not curvature > 0:
        return False, f"since the Hessian is indefinite; cg(damping=) above {-curvature:.1e} helps"
    if not ratio <= _CONVERGED:
        return False, "since training has not converged by then; take more steps, or unroll"
    if not residual <= _SOLVED:
        return False, f"since {_CG_STEPS} CG steps leave a residual of {residual:.1e}; take more"
    return True, f"with a residual of {residual:.1e} after {_CG_STEPS} CG steps"


# ---- memory -----------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Memory of one hypergradient, of one member."""

    method: str
    bytes: int | None  # of temporary values; None where the backend or the method says nothing
    note: str


def forecast(problem: Problem, point: Point) -> list[Memory]:
    """Temporary memory of one hypergradient by each method; programs are compiled, not run."""
    step = problem.training.step
    whole = lambda params, raw, batch: problem.loss(params, raw, point.whole)
    solve = cg(maxiter=_CG_STEPS)
    solved = implicit(unroll(step), stationary(whole), solve=solve)
    init = problem.training.init
    reverse = lambda response: hypergradient(response, problem.score, init).estimate
    forward = hypergradient(unroll(step), problem.score, init, mode="forward").estimate
    programs = {
        "reverse": reverse(unroll(step)),
        'reverse, checkpoint="sqrt"': reverse(unroll(step, checkpoint="sqrt")),
        'reverse, checkpoint="binomial"': reverse(unroll(step, checkpoint="binomial")),
        "forward": forward,
        "implicit": reverse(solved),
    }
    arguments = (point.raw, init(point.params, point.raw), point.split)
    return [_memory(name, estimate, arguments) for name, estimate in programs.items()]


def _memory(name: str, estimate: Callable, arguments: tuple) -> Memory:
    try:
        stats = jax.jit(estimate).lower(*arguments).compile().memory_analysis()
    except TypeError as error:  # what JAX raises where a derivative has no rule
        return Memory(name, None, f"not possible: {first_line(error)}")
    if stats is None:
        return Memory(name, None, "unknown on this backend")
    return Memory(name, int(stats.temp_size_in_bytes), "")


def _show_memory(memory: list[Memory], steps: int, out: Output) -> None:
    out.line(f"memory of one hypergradient over {steps} steps, one member, beside its arguments:")
    rows = [(m.method, m.note if m.bytes is None else quantity(m.bytes)) for m in memory]
    _show(("method", "temporary"), rows, out)


def _show(header: tuple[str, ...], rows: list[tuple[str, ...]], out: Output) -> None:
    if not out.as_json:
        table, plain = grid(header, rows)
        out.result({}, table, plain)
