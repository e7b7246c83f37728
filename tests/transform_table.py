"""A table of what transformations give: exact, or refused in the expected words.

`Table` runs the cells, writes the page, and compares the page in the tree with both.
"""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).parents[1] / "docs"
EXACT = 1e-10  # relative; the errors themselves are at 1e-15 and differ from machine to machine


class Table(NamedTuple):
    page: Path
    script: str  # that writes the page
    columns: dict[str, str]  # name of a column: its heading
    rows: dict[str, Callable[[str], float]]  # label: from the name of a column to a relative error
    # Everything that is refused, and by which words: a refusal for another reason is a failure.
    refused: dict[tuple[str, str], tuple[type[Exception], str]]
    undefined: dict[tuple[str, str], str]  # what stands in the cell instead
    head: str
    tail: str

    def cell(self, label: str, name: str) -> str:
        """What a run gives. Raises where it is neither exact nor refused as expected."""
        if (label, name) in self.undefined:
            return self.undefined[label, name]
        if (label, name) in self.refused:
            kind, words = self.refused[label, name]
            with pytest.raises(kind, match=re.escape(words)):
                self.rows[label](name)
            return f"refused: {kind.__name__}"
        assert self.rows[label](name) < EXACT
        return "exact"

    def text(self, cells: Callable[[str, str], str]) -> str:
        table = [["", *self.columns.values()], ["---"] * (1 + len(self.columns))]
        table += [[label, *(cells(label, name) for name in self.columns)] for label in self.rows]
        return self.head + "".join(f"| {' | '.join(line)} |\n" for line in table) + self.tail

    def committed(self) -> dict[tuple[str, str], str]:
        """The cells of the page as it is in the tree."""
        found = {}
        for line in _lines(self.page):
            label, *cells = (part.strip() for part in line.strip("|").split(" | "))
            if label in self.rows and len(cells) == len(self.columns):
                pairs = zip(self.columns, cells, strict=True)
                found |= {(label, name): text for name, text in pairs}
        return found

    def check_cell(self, label: str, name: str) -> None:
        found = self.committed().get((label, name), "not on the page")
        assert found == self.cell(label, name), self.rewrite

    def check_page(self) -> None:
        """The rest of the page; each of its cells is compared with a run by `check_cell`."""
        cells = {(label, name) for label in self.rows for name in self.columns}
        assert {*self.refused, *self.undefined} <= cells
        committed = self.committed()
        written = self.text(lambda label, name: committed.get((label, name), "missing"))
        assert self.page.read_text(encoding="utf-8") == written, self.rewrite

    @property
    def rewrite(self) -> str:
        return f"docs/{self.page.name} is stale: python tests/{self.script} --write"

    def main(self) -> None:
        if sys.argv[1:] != ["--write"]:
            sys.exit(f"usage: python tests/{self.script} --write")
        import conftest  # noqa: F401  float64 and eight devices

        self.page.write_text(self.text(self.cell), encoding="utf-8")


@functools.cache
def _lines(page: Path) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines() if page.exists() else []
