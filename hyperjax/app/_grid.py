"""A small table, for a terminal and for a pipe."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Table, str]:
    """The rows as a rich table, and as lines of columns of fixed width."""
    drawn = Table()
    for title in header:
        drawn.add_column(title, overflow="fold")
    for row in rows:
        # Text, because cells are data and square brackets would be read as markup.
        drawn.add_row(*map(Text, row))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return drawn, "\n".join(lines)


def quantity(size: float) -> str:
    """Bytes for people: 45,394 B is "44.3 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
