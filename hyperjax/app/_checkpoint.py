"""Checkpoints: the whole state of a run, written atomically, the last two kept.

Of several processes each writes and reads what its own devices hold, in the same folder.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from . import _hosts
from ._errors import AppError
from ._folder import disk_error


class Checkpoints:
    """Saves and restores one pytree of arrays per step. Use it as a context manager."""

    def __init__(self, path: Path):
        self._path = path.absolute()
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what is wrong is said below, once
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except OSError as error:
            raise disk_error(path, error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return _hosts.agreed(self._manager.latest_step() or 0) or None

    def save(self, step: int, tree: Any) -> None:
        try:
            self._manager.save(step, args=ocp.args.StandardSave(tree))
        except (OSError, ValueError) as error:
            # tensorstore reports a full or read-only disk as ValueError
            reason = str(error).splitlines()[0]
            raise AppError(f"cannot write a checkpoint in {self._path}: {reason}") from error

    def restore(self, step: int, like: Any) -> Any:
        """The tree of that step; `like` gives structure, shapes, types and where arrays lie.

        They may lie on other devices, and more or fewer, than when they were saved.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(template))
        except Exception as error:
            if _hosts.is_lost(error):
                raise
            raise AppError(
                f"the checkpoint {self._path / str(step)} is damaged ({type(error).__name__}); "
                "delete that folder, and `hyperjax resume` takes the one before."
            ) from error
