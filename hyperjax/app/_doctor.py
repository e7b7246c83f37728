"""`hyperjax doctor`: what is installed, on what it runs, and whether it computes rightly."""

import importlib.metadata as metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._estimators import hypergradient
from .._implicit import implicit
from .._inner import inner, stationary
from .._types import Split
from .._unroll import unroll
from ..linsolve import cg
from ..tasks._data import VARIABLE
from . import _hosts
from ._check_problem import first_line
from ._grid import grid, quantity
from ._output import Output

_NEEDED = ("jax", "jaxlib", "optax", "flax", "chex", "numpy", "orbax-checkpoint")
_EXTRAS = {"matplotlib": "demo", "optuna": "optuna"}  # package -> extra that brings it
_NOT_TESTED = {"error": None, "allowed": None, "ok": False, "text": "not run without a device"}


def doctor(out: Output) -> int:
    """Reports versions, devices, caches and the data folder, and checks one hypergradient.

    Returns 0, or 1 if a needed package is missing or outside its tested range, or the self-test
    fails. As JSON, one object with the keys "packages", "devices", "cache", "self_test", "data"
    and "ok".
    """
    packages, devices, cache = _packages(), _devices(), _cache()
    test = self_test() if devices["count"] else _NOT_TESTED
    data = os.environ.get(VARIABLE)
    facts = [(p["name"], p["text"]) for p in packages]
    facts += [("backend", devices["text"])]
    facts += [("cores", note) for note in devices["notes"]]
    facts += [("compilation cache", cache["text"]), ("self-test", test["text"])]
    facts += [("data folder", _data_text(data))]
    ok = test["ok"] and all(p["ok"] for p in packages)
    value = {"packages": packages, "devices": devices, "cache": cache, "self_test": test}
    table, _ = grid(("what", "found"), facts)
    plain = "\n".join(f"{what:<18} {found}" for what, found in facts)
    out.result({**value, "data": data, "ok": ok}, table, plain)
    return 0 if ok else 1


def _packages() -> list[dict[str, Any]]:
    python = {"name": "python", "version": platform.python_version(), "ok": True}
    rows = [{**python, "text": python["version"]}]
    ranges = _ranges()
    for name in (*_NEEDED, *_EXTRAS):
        version = _version(name)
        if version is None:
            extra = f"hyperjax[{_EXTRAS[name]}]" if name in _EXTRAS else name
            text, ok = f'not installed: pip install "{extra}"', name in _EXTRAS
        else:
            ok = within(version, ranges.get(name, ""))
            text = version if ok else f"{version}, outside the tested {ranges[name]}"
        rows.append({"name": name, "version": version, "ok": ok, "text": text})
    return rows


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _ranges() -> dict[str, str]:
    """Package -> the version range that hyperjax declares, as ">=0.10.2,<0.13"."""
    try:
        required = metadata.requires("hyperjax") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return {}
    found = {}
    for line in required:
        match = re.match(r"([A-Za-z0-9-]+)\s*((?:[<>]=?[^;,]+,?)+)", line)
        if match:
            found.setdefault(match[1], match[2].strip())
    return found


def within(version: str, bounds: str) -> bool:
    """Whether a version lies in a range of `>=` and `<`; only its leading numbers are compared."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]
    for sign, bound in re.findall(r"(>=|<)\s*([0-9.]+)", bounds):
        inside = numbers(version) >= numbers(bound)
        if inside != (sign == ">="):
            return False
    return True


def _devices() -> dict[str, Any]:
    cores = _hosts.cores()
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # a backend was asked for that is not there
        reason = first_line(error)
        return {"backend": None, "count": 0, "kinds": [], "cores": cores, "notes": [],
                "text": f"none: {reason}; check JAX_PLATFORMS"}  # fmt: skip
    backend = devices[0].platform
    kinds = sorted({device.device_kind for device in devices})
    notes = []
    if backend == "cpu" and len(devices) < cores:
        notes.append(
            f"{cores}, and JAX uses {len(devices)} of them as devices; members spread over one "
            f'device a core after jax.config.update("jax_num_cpu_devices", {cores}), '
            "before JAX is first used"
        )
    elif backend == "cpu":
        notes.append(f"{cores}, one device or more on each")
    if backend == "gpu":
        notes.append(
            "JAX takes 75% of the GPU's memory at the start, so that nvidia-smi shows it as used; "
            "XLA_PYTHON_CLIENT_PREALLOCATE=false or XLA_PYTHON_CLIENT_MEM_FRACTION=.50 changes it"
        )
    text = f"{backend}: {len(devices)} x {', '.join(kinds)}"
    return {"backend": backend, "count": len(devices), "kinds": kinds, "cores": cores,
            "notes": notes, "text": text}  # fmt: skip


def _cache() -> dict[str, Any]:
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not folder:
        text = "off: set JAX_COMPILATION_CACHE_DIR to a folder to compile each program only once"
        return {"folder": None, "bytes": 0, "text": text}
    if "://" in str(folder):  # remote storage, which only JAX can look into
        return {"folder": str(folder), "bytes": None, "text": str(folder)}
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"folder": str(folder), "bytes": size, "text": f"{folder}, {quantity(size)}"}


def _data_text(folder: str | None) -> str:
    if not folder:
        return f"none: set {VARIABLE}, or pass --data-dir, for tasks that read files"
    return folder if Path(folder).expanduser().is_dir() else f"{folder}, which does not exist"


# ---- self-test --------------------------------------------------------------------------------


def self_test() -> dict[str, Any]:
    """The implicit hypergradient of a small ridge regression against its closed form.

    With A = X'X / n + l I and w = A^-1 X'y / n, the derivative of |V w - u|^2 / 2m in l is
    -(V'(V w - u) / m)' A^-1 w.
    """
    x, y, v, u = _ridge_data()
    n, m, l2 = x.shape[0], v.shape[0], jnp.asarray(0.5, x.dtype)
    loss = lambda w, l, _: jnp.mean((x @ w - y) ** 2) / 2 + l * jnp.sum(w**2) / 2
    score = lambda w, l, _: jnp.mean((v @ w - u) ** 2) / 2
    training = inner(loss, lambda l: optax.sgd(0.5))
    response = implicit(unroll(training.step), stationary(loss), solve=cg(tol=0.0))
    estimator = hypergradient(response, score, training.init)
    start = estimator.init(jnp.zeros(x.shape[1], x.dtype), l2)
    split = Split(jnp.arange(200), ())
    found = float(jax.jit(lambda l: estimator.estimate(l, start, split)[0].grad)(l2))

    a = x.T @ x / n + l2 * jnp.eye(x.shape[1], dtype=x.dtype)
    w = jnp.linalg.solve(a, x.T @ y / n)
    exact = float(-(v.T @ (v @ w - u) / m) @ jnp.linalg.solve(a, w))
    error, allowed = abs(found - exact) / abs(exact), float(jnp.finfo(x.dtype).eps) ** 0.5
    ok = error < allowed
    verdict = "ok" if ok else "FAILED"
    text = f"{verdict}: ridge hypergradient, relative error {error:.1e} (allowed {allowed:.0e})"
    return {"error": error if error == error else None, "allowed": allowed, "ok": ok, "text": text}


def _ridge_data():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((32, 4), (32,), (16, 4), (16,))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
