"""Several processes as one program: how they meet, what they agree on, and how one that is left
alone ends. With one process everything here is the identity.

All processes run the same command. Process 0 alone writes the run folder, apart from checkpoints,
which all write together; whatever decides what runs next is therefore asked of process 0.
"""

import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._errors import AppError

SILENCE = 100  # seconds after which JAX takes a process that says nothing for dead

_LOST = (
    "gloo",
    "nccl",
    "rccl",
    "coordination",
    "heartbeat",
    "barrier",
    "connection",
    "unavailable",
)


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes, before JAX does anything else.

    `coordinator` is HOST:PORT of process 0, with the number of processes and one's own; or "auto",
    with neither, where JAX finds them: SLURM, Open MPI, Kubernetes, Cloud TPU. Without it the
    process is alone. Raises AppError for anything else. A process that waits for the others in
    vain is ended by JAX after five minutes.
    """
    numbers = (processes, process)
    if coordinator is None:
        if numbers != (None, None):
            raise AppError("--processes and --process need --coordinator HOST:PORT.")
        return
    if coordinator == "auto":
        if numbers != (None, None):
            raise AppError("--coordinator auto finds --processes and --process; leave them out.")
    elif processes is None or process is None or not _is_address(coordinator):
        raise AppError(
            "--coordinator takes HOST:PORT of process 0, with --processes N and --process K; or "
            f"auto. Got {coordinator!r}, {processes} and {process}."
        )
    elif not 0 <= process < processes:
        raise AppError(f"--process must be in 0..{processes - 1}; got {process}.")
    _spare_standard_output()
    # A dead process must end a wait at once, and not when somebody asks for the result.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    given = {} if coordinator == "auto" else {
        "coordinator_address": coordinator, "num_processes": processes, "process_id": process,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=30, **given
        )
    except (ValueError, RuntimeError) as error:
        raise AppError(
            f"cannot join the other processes: {_first_line(error)} Where JAX finds no cluster, "
            "pass --coordinator HOST:PORT --processes N --process K."
        ) from error
    any_of(False)


def rehearse(mesh: Mesh | None) -> None:
    """Let the devices of a mesh meet while their processes are at the same place.

    Gloo connects devices at their first common sum, for which it grants 30 s. Once they have met
    they wait for one another as long as it takes; compilers and disks differ by more than that.
    """
    if not several() or mesh is None:
        return
    any_of(False)
    spread, same = (
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
        NamedSharding(mesh, PartitionSpec()),
    )
    ones = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=spread)()
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=same)(ones))


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def _spare_standard_output() -> None:
    """Gloo writes to file 1 whom it has met; results keep a standard output of their own."""
    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, ValueError):  # it is no file
        return
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1, encoding=sys.stdout.encoding)


def cores() -> int:
    """Those that this process may use: SLURM and containers often leave it a few of many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def several() -> bool:
    """Whether there are other processes. Starts JAX only if there are."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def primary() -> bool:
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def agreed(value: int) -> int:
    """What process 0 says."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


def any_of(flag: bool) -> bool:
    """Whether it is so for one process or more. All must ask; they wait for one another."""
    if not several():
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def least(value: int) -> int:
    """The least of what the processes say, in whole MiB where there are several."""
    if not several():
        return value
    return int(multihost_utils.process_allgather(np.int32(value >> 20)).min()) << 20


def check_same(what: str, text: str) -> None:
    """Raise AppError unless all processes pass the same text."""
    mark = zlib.crc32(text.encode()) >> 1
    if any_of(agreed(mark) != mark):
        raise AppError(f"the processes differ in their {what}; give all the same command.")


def check_shared(path: Path) -> None:
    """Raise AppError unless all processes see the file."""
    if any_of(not path.exists()):
        raise AppError(f"{path} is not there for all; processes need a file system they share.")


def on_primary(work: Callable[[], object]) -> None:
    """Let process 0 work while the others wait. If it raises AppError, so do they."""
    failure = None
    if primary():
        try:
            work()
        except AppError as error:
            failure = error
    failed = any_of(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise AppError("process 0 could not go on; its message says why.")


def whole(fun: Callable, argument: Any) -> Any:
    """`fun(argument)` compiled, its result in full on this host as NumPy arrays.

    `argument` may be spread over devices of all processes.
    """
    first = jax.tree.leaves(argument)[0]
    if isinstance(first, jax.Array) and not first.is_fully_addressable:
        assert isinstance(first.sharding, NamedSharding)
        everywhere = NamedSharding(first.sharding.mesh, PartitionSpec())
        return jax.device_get(jax.jit(fun, out_shardings=everywhere)(argument))
    return jax.device_get(jax.jit(fun)(argument))


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    text = str(error).lower()
    return (
        several()
        and isinstance(error, jax.errors.JaxRuntimeError)
        and any(word in text for word in _LOST)
    )


def farewell(error: Exception) -> str:
    """What to tell the user then."""
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another one, which has "
        f"probably died ({_first_line(error)}). All is kept up to the last checkpoint: start all "
        "of them again, in any number, with `hyperjax resume RUN`."
    )


def abandon(code: int) -> int:
    """End this process with `code` without waiting for the others; alone, return it."""
    if not several():
        return code
    if jax.process_index() == 0:
        time.sleep(1)  # when process 0 is gone JAX aborts the others, and they may have words too
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
