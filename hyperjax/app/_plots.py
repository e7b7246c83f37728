"""Draws the plots of a run folder."""

from pathlib import Path

from . import _plots_final, _plots_members
from ._plots_style import Draw, save, style
from ._record import Record

# In the order in which a report shows them.
PLOTS: dict[str, Draw] = {
    "history": _plots_members.history,
    "hparams": _plots_members.hparams,
    "table": _plots_final.table,
    "sensitivity": _plots_final.sensitivity,
    "parallel": _plots_final.parallel,
    "lineage": _plots_members.lineage,
}


def draw_plots(record: Record, folder: Path) -> list[Path]:
    """Draws what a run has data for into ``folder/plots`` and returns the files.

    A plot that the run has no data for is left out, and an older one of that name is removed, so
    that the folder never mixes two states of a run.

    Args:
        record: the run.
        folder: the run folder, or another place for the folder ``plots``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plots = Path(folder) / "plots"
    paths = []
    with style():
        plots.mkdir(parents=True, exist_ok=True)
        for name, draw in PLOTS.items():
            path = plots / f"{name}.png"
            figure = draw(record)
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                paths.append(save(figure, path))
    return paths
