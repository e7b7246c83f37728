"""Whether a run fits into memory: from its compiled program, before it begins."""

import os
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from .._forecast import Forecast, largest_below
from ..tasks import Task
from . import _hosts
from ._errors import AppError
from ._grid import quantity
from ._methods import make_method
from ._program import Program, compile_program
from ._settings import Settings


def check_fits(
    program: Program, memory: int, task: Task, settings: Settings, mesh: Mesh | None
) -> None:
    """Raise AppError, with the most members that fit, unless these do.

    Every number of members that is looked at costs a compilation; the first was there already.
    """
    devices = 1 if mesh is None else mesh.size
    over = program.forecast
    if over is None or over.total_bytes <= memory:
        return

    def forecast_of(members: int) -> Forecast:
        fewer = replace(settings, members=members)
        found = compile_program(task, make_method(task, fewer, mesh), fewer, mesh).forecast
        assert found is not None
        return found

    fit = largest_below(forecast_of, settings.members, over, memory, devices)
    most = f"the most that fit are --members {fit.size}" if fit else f"not even {devices} fit"
    raise AppError(
        f"{settings.members} members in each of {settings.seeds} studies take "
        f"{quantity(over.total_bytes)} of a device's {quantity(memory)}; {most}. Fewer --seeds "
        "or more devices help too."
    )


def device_memory(mesh: Mesh | None) -> int:
    """Bytes for a device of the mesh, on the host that has least; endless where nobody knows."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return _hosts.least((device.memory_stats() or {}).get("bytes_limit", _ENDLESS))
    sharing = 1 if mesh is None else mesh.size // jax.process_count()
    return _hosts.least(_host_memory() // sharing)


_ENDLESS = 2**50


def _host_memory() -> int:
    """What the machine has, or its container may take."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        found = _ENDLESS
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        found = min(found, int(text)) if text.isdecimal() else found
    return found
