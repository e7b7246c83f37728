"""What a person sees while a run works: a bar on a terminal, plain lines in a pipe."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ._output import Output
from ._program import History
from ._settings import Settings


class Reporter:
    """One line per event, and a bar if somebody is watching."""

    def __init__(self, out: Output, settings: Settings, bar: Progress | None, task_id):
        self._out, self._bar, self._task, self._settings = out, bar, task_id, settings

    def event(self, text: str) -> None:
        self._out.line(text)

    def chunk(self, history: History, first: int, seconds: float) -> None:
        """The chunk that began at update `first` is done."""
        done, every = first + history.steps, self._settings.every
        score = np.where(history.finite[-1], history.value[-1], np.inf).min(axis=1)
        best = f"best {score.mean():.4f}"
        for t in range(history.steps):
            self._events(history, t, (first + t + 1) * every)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, best=best)
        else:
            self.event(f"step {done * every}: {best} (mean over seeds), {seconds:.1f} s")

    def _events(self, history: History, t: int, step: int) -> None:
        parents, diverged = history.parents[t], history.diverged[t]
        own = np.arange(parents.shape[1])
        copies = int(((parents != own) & ~diverged).sum())
        if copies:
            self.event(f"step {step}: exchange, {copies} of {parents.size} members copied another")
        for study, member in np.argwhere(diverged):
            parent, seed = parents[study, member], self._settings.seed + study
            fate = f"reseeded from {parent}" if parent != member else "left alone"
            self.event(f"step {step}: member {member} of seed {seed} diverged, {fate}")


@contextmanager
def reporting(out: Output, settings: Settings, done: int) -> Iterator[Reporter]:
    """A reporter for a run of which `done` updates are behind."""
    if not out.interactive:
        yield Reporter(out, settings, None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out.console) as bar:
        task = bar.add_task("updates", total=settings.updates, completed=done, best="")
        yield Reporter(out, settings, bar, task)
